"""Calibrated thresholds meet the budget on the samples they were made from."""

from __future__ import annotations

import json

import pytest
import torch

from harness.runner import run
from kvmerge.errors import UserError
from scripts import calibrate
from tests.tiny_run import read_lines


def test_thresholds_meet_the_budget_on_average(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = tiny("benchmark.tasks=[trec]", "method=kvmerger", "budget=0.5")
    path = calibrate.calibrate(settings)
    content = json.loads(path.read_text())
    assert content["samples"] == len(settings.samples(settings.benchmark.tasks[0]))
    assert len(content["thresholds"]) == 2
    assert all(-1 < threshold < 1 for threshold in content["thresholds"])

    free = tiny(
        "benchmark.tasks=[trec]",
        "method=kvmerger",
        "budget=0.5",
        "method.budget_mode=eps_layer",
        f"method.thresholds={path}",
        f"output_dir={tmp_path / 'out'}",
    )
    run(free)
    achieved = [line["budget_achieved"] for line in read_lines(tmp_path / "out").values()]
    # eps_layer repairs each head, so the budget is met to the entry
    assert achieved
    assert all(0.45 < share <= 0.5 for share in achieved)


def test_the_threshold_is_where_the_mean_number_of_sets_is_the_budget():
    links = calibrate.Links(method=None, budget=None)
    similarity = torch.linspace(-0.9, 0.9, 10).expand(3, 10)
    links.by_layer[0] = [(similarity, 6)]  # 11 tokens: 5 links leave 6 entries
    threshold = links.threshold(0)
    assert (similarity[0] > threshold).sum() == 5


def test_only_kvmerger_has_thresholds(tiny):
    with pytest.raises(UserError, match="only KVMerger"):
        calibrate.calibrate(tiny("benchmark.tasks=[trec]", "method=h2o", "budget=0.5"))
    assert calibrate.main(["method=nonsense"]) == 2
    assert calibrate.main(["nonsense=1"]) == 2
