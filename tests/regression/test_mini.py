"""The regression notices what it is there for: two planted faults, named by cell, sample and field."""

from __future__ import annotations

import json

import pytest

from baselines import h2o
from kvmerge import merging
from kvmerge.models import load
from tests.regression import mini as regression

TASK = "passkey"


@pytest.fixture(scope="module")
def subject():
    """One recorded sample, its settings and the embedded model."""
    settings = regression.regression_settings(f"benchmark.tasks=[{TASK}]", "limit=1")
    recorded = json.loads(regression.RECORDS.read_text(encoding="utf-8"))
    model, tokenizer = load(settings.model)
    sample = settings.samples(settings.benchmark.tasks[0])[0].id
    return {TASK: {sample: recorded[TASK][sample]}}, settings, model, tokenizer


def moved(subject):
    recorded, *parts = subject
    return list(regression.compare(recorded, regression.measure(*parts)))


def test_nothing_moves_in_the_code_as_it_is(subject):
    assert moved(subject) == []


def test_a_recent_window_that_is_off_by_one_is_named(subject, monkeypatch):
    keep = h2o.keep
    monkeypatch.setattr(
        h2o, "keep", lambda s, *, heavy, recent: keep(s, heavy=heavy + 1, recent=recent - 1)
    )
    differences = moved(subject)
    assert {d.cell for d in differences} == {"h2o@0.5", "h2o@0.35"}
    assert "merging sets or kept tokens" in {d.field for d in differences}
    assert f"cell h2o@0.35, task {TASK}, sample" in "\n".join(map(str, differences))


def test_merge_weights_that_are_not_normalised_are_named(subject, monkeypatch):
    weights = merging.gaussian_weights
    monkeypatch.setattr(
        merging, "gaussian_weights", lambda *args, **kwargs: 1.5 * weights(*args, **kwargs)
    )
    differences = moved(subject)
    assert {d.cell for d in differences} == {"kvmerger@0.5", "kvmerger@0.35"}
    assert "logits" in {d.field for d in differences}


CELL = {"entries": [5], "selection": [["aa", None]], "logits": [1.0, 2.0], "score": 1.0}
OTHER_CELL = {"entries": [6], "selection": [["bb", "cc"]], "logits": [1.0, 2.1], "score": 0.5}


def sample(prompt_hash="h", **cells):
    return {"prompt_hash": prompt_hash, "prompt_tokens": 9, "logit_tokens": [1, 2], "cells": cells}


def test_every_kind_of_difference_is_reported():
    recorded = {"t": {"s": sample(m=CELL)}}
    measured = {"t": {"s": sample("x", m=OTHER_CELL) | {"prompt_tokens": 8, "logit_tokens": [1, 3]}}}
    differences = list(regression.compare(recorded, measured))
    assert [d.field for d in differences] == [
        *("prompt_hash", "prompt_tokens", "logit_tokens"),
        *("entries kept", "merging sets or kept tokens", "logits", "score"),
    ]
    where = (
        "cell m, task t, sample s: merging sets or kept tokens of layer 0, KV head 0 (1 heads in all)"
    )
    assert str(differences[4]) == f"{where} was aa, is bb"
    assert "logits (by up to 0.1) was [1.0, 2.0]" in str(differences[5])


def test_equal_measurements_differ_in_nothing():
    assert list(regression.compare({"t": {"s": sample(m=CELL)}}, {"t": {"s": sample(m=CELL)}})) == []


def test_a_sample_and_a_cell_that_are_not_there_are_reported():
    recorded = {"t": {"s": sample(m=CELL), "u": sample(m=CELL)}}
    differences = list(regression.compare(recorded, {"t": {"s": sample()}}))
    assert [(d.sample, d.cell, d.field) for d in differences] == [
        ("s", "m", "presence"),
        ("u", "", "presence"),
    ]


def test_a_summary_counts_fields_by_cell_with_what_moved_most_first():
    recorded = {"t": {"a": sample(k=CELL, m=CELL), "b": sample(k=CELL, m=CELL)}}
    scored = CELL | {"score": 0.5}
    measured = {"t": {"a": sample("x", k=scored, m=OTHER_CELL), "b": sample(k=CELL, m=scored)}}
    assert list(regression.summary(list(regression.compare(recorded, measured)))) == [
        "summary: cell m: 5 moved (2 score, 1 entries kept, 1 logits, 1 merging sets or kept tokens)",
        "summary: shared by all cells: 1 moved (1 prompt_hash)",
        "summary: cell k: 1 moved (1 score)",
    ]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What the next call of main measures, with records in a folder of their own."""
    measured = {"t": {"s": sample(m=CELL)}}
    monkeypatch.setattr(regression, "RECORDS", tmp_path / "mini.json")
    monkeypatch.setattr(regression, "load", lambda _: (None, None))
    monkeypatch.setattr(regression, "measure", lambda *_, **__: measured)
    return measured


def test_what_moved_is_summed_up_then_listed_and_ends_with_how_to_accept_it(measured, capsys):
    assert regression.main(["record"]) == 0
    measured["t"]["s"] = sample(m=OTHER_CELL)
    capsys.readouterr()
    assert regression.main(["check"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("note: ")]
    assert [line.partition(":")[0] for line in lines[:-1]] == ["summary", *["moved"] * 4, "regression"]
    assert lines[-1].endswith(": make regression-accept")


def test_what_was_accepted_passes_the_next_check(measured, capsys):
    regression.main(["record"])
    measured["t"]["s"] = sample(m=OTHER_CELL)
    assert regression.main(["record"]) == 0
    assert regression.main(["check"]) == 0
    assert "regression-accept" not in capsys.readouterr().out


def test_make_accepts_by_recording():
    rules = (regression.RECORDS.parents[2] / "Makefile").read_text(encoding="utf-8")
    _, _, recipe = rules.partition("\nregression-accept:")
    assert "tests.regression.mini record" in recipe.splitlines()[1]
