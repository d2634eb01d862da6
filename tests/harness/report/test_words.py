"""What a report says of how a run was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.report.run import Run, load_run
from harness.report.words import ran_otherwise, ran_with
from tests.synthetic_run import record, write_run

HOW = {"batch_samples": 4, "threads": 2, "kernel": "flash+triton/float16"}


def run_of(folder: Path, *cells: dict[str, Any]) -> Run:
    names = ("full@1", "h2o@0.5", "kvmerger@0.5")
    lines = {
        name: {"t": [record(str(i), 0.5, **fields) for i in range(2)]}
        for name, fields in zip(names, cells, strict=False)
    }
    return load_run(write_run(folder, {"t": "qa_f1"}, lines))


def test_how_samples_ran_is_listed(tmp_path: Path) -> None:
    run = run_of(tmp_path, HOW, HOW | {"batch_samples": 1, "kernel": "flash/float16"})
    assert ran_with(run) == {
        "samples a batch": "1, 4",
        "threads": "2",
        "kernel": "flash+triton/float16, flash/float16",
    }


def test_what_an_earlier_version_did_not_record_is_told_and_not_guessed(tmp_path: Path) -> None:
    assert set(ran_with(run_of(tmp_path / "old", {}, {})).values()) == {"not recorded"}
    assert ran_otherwise(run_of(tmp_path / "also old", {}, {})) == []
    assert ran_with(run_of(tmp_path / "both", {}, HOW))["threads"] == "2, not recorded"


@pytest.mark.parametrize(
    ("other", "note"),
    [
        ({"threads": 1}, "with the same threads: 1, 2."),
        ({"threads": None}, "with the same threads: 2, not recorded."),
        ({"kernel": "sdpa/float16"}, "with the same kernels: flash/float16, sdpa/float16."),
    ],
)
def test_cells_that_ran_otherwise_than_each_other_are_told(
    tmp_path: Path, other: dict[str, Any], note: str
) -> None:
    assert ran_otherwise(run_of(tmp_path, HOW, HOW | other)) == [
        f"The cells of t did not all run {note}"
    ]


def test_what_belongs_to_a_method_is_no_other_way(tmp_path: Path) -> None:
    alike = HOW, HOW | {"kernel": "flash/float16"}, HOW | {"kernel": "masked/float16"}
    assert ran_otherwise(run_of(tmp_path, *alike)) == []
