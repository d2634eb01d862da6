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
    assert any("kept tokens of layer" in d.field for d in differences)
    assert f"cell h2o@0.35, task {TASK}, sample" in "\n".join(map(str, differences))


def test_merge_weights_that_are_not_normalised_are_named(subject, monkeypatch):
    weights = merging.gaussian_weights
    monkeypatch.setattr(
        merging, "gaussian_weights", lambda *args, **kwargs: 1.5 * weights(*args, **kwargs)
    )
    differences = moved(subject)
    assert {d.cell for d in differences} == {"kvmerger@0.5", "kvmerger@0.35"}
    assert any(d.field.startswith("logits") for d in differences)


def test_every_kind_of_difference_is_reported():
    cell = {"entries": [5], "selection": [["aa", None]], "logits": [1.0, 2.0], "score": 1.0}
    sample = {"prompt_hash": "h", "prompt_tokens": 9, "logit_tokens": [1, 2], "cells": {"m@0.5": cell}}
    other = {
        "prompt_hash": "x",
        "prompt_tokens": 8,
        "logit_tokens": [1, 3],
        "cells": {
            "m@0.5": {"entries": [6], "selection": [["bb", "cc"]], "logits": [1.0, 2.1], "score": 0.5}
        },
    }
    fields = [d.field for d in regression.compare({"t": {"s": sample}}, {"t": {"s": other}})]
    assert fields[:3] == ["prompt_hash", "prompt_tokens", "logit_tokens"]
    assert fields[3] == "entries kept"
    assert fields[4].startswith("merging sets or kept tokens of layer 0, KV head 0 (1 heads")
    assert fields[5:] == ["logits (by up to 0.1)", "score"]
    assert list(regression.compare({"t": {"s": sample}}, {"t": {"s": sample}})) == []
    assert len(list(regression.compare({"t": {"s": sample}}, {}))) == 1
