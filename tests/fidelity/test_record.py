"""The recorder of the authors' results: what it writes, and that the records are current."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from kvmerge.errors import UserError
from tests.fidelity import record as record_vectors


@pytest.mark.parametrize("name", record_vectors.families())
def test_each_family_has_a_record_of_its_revision(name: str) -> None:
    family = importlib.import_module(f"tests.fidelity.official.{name}")
    record = json.loads((record_vectors.OUTPUT / f"{name}.json").read_text(encoding="utf-8"))
    assert record["repository"] == family.REPOSITORY
    assert record["revision"] == family.REVISION


def test_modules_that_serve_the_others_are_no_families() -> None:
    assert {"h2o", "cam"} <= set(record_vectors.families())
    assert not [name for name in record_vectors.families() if name.startswith("_")]


def test_numbers_keep_the_digits_they_have() -> None:
    found = record_vectors.plain({"x": torch.tensor([1 / 3, 2.0]), "y": (1, [True, "0110"])})
    assert found == {"x": [0.33333334, 2.0], "y": [1, [True, "0110"]]}


def test_a_checkout_that_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no revision, not abc: git clone https://github.com/x/y"):
        record_vectors.checkout(tmp_path, "x/y", "abc")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown family 'h20'"):
        record_vectors.main(["--official", str(tmp_path), "h20"])
