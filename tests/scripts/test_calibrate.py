"""Calibrated thresholds meet the budget on the samples they were made from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from harness.runner import run
from kvmerge import merging
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance
from kvmerge.models import load
from kvmerge.session import Row
from scripts import calibrate
from tests.tiny_run import read_lines


def test_thresholds_meet_the_budget_on_average(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = tiny("benchmark.tasks=[trec]", "method=kvmerger", "budget=0.5")
    path = calibrate.calibrate(settings)
    content = json.loads(path.read_text())
    assert content["samples"] == len(settings.samples(settings.benchmark.tasks[0]))
    assert len(content["thresholds"]) == 2
    assert all(-1 < threshold <= 1 for threshold in content["thresholds"])

    free = tiny(
        "benchmark.tasks=[trec]",
        "method=kvmerger",
        "budget=0.5",
        "baseline=none",
        "method.budget_mode=eps_layer",
        f"method.thresholds={path}",
        f"output_dir={tmp_path / 'out'}",
    )
    run(free)
    achieved = [line["budget_achieved"] for line in read_lines(tmp_path / "out").values()]
    # eps_layer repairs each head, so the budget is met to the entry
    assert achieved
    assert all(0.45 < share <= 0.5 for share in achieved)


@pytest.mark.parametrize("linkage", merging.LINKAGES)
def test_the_thresholds_leave_the_budget_on_average(tiny, tmp_path, monkeypatch, linkage):
    monkeypatch.chdir(tmp_path)
    settings = tiny(
        "benchmark.tasks=[trec]",
        "limit=1",
        "method=kvmerger",
        "budget=0.5",
        f"method.linkage={linkage}",
    )
    content = json.loads(calibrate.calibrate(settings).read_text())
    assert content["linkage"] == linkage
    (_, cell), (task,) = settings.cells, settings.benchmark.tasks
    shares = []

    def observe(row, layer_idx, layer, kept):
        allowance = Allowance(cell.budget.entries(layer.length), cell.budget.fraction(layer.length))
        protected = cell.method.protected(layer.column_scores(), layer.length, allowance)
        threshold = content["thresholds"][layer_idx]
        ids = merging.merging_sets(layer.keys, protected, threshold=threshold, linkage=linkage)
        shares.append(float((ids.amax(-1) + 1).double().mean()) / allowance.n_keep)

    model, tokenizer = load(settings.model)
    (sample,) = settings.samples(task)
    ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
    rows, stop = [Row(cell.method, cell.budget)], Stop(1, frozenset())
    run_sample(model, torch.tensor([ids]), rows, stop, observer=observe)
    assert shares == pytest.approx([1, 1], abs=0.05)


def test_a_layer_that_was_not_seen_links_next_to_nothing():
    assert calibrate.Counts(KVMerger(), Budget.parse(0.5)).threshold(0) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["method=h2o", "budget=0.5"], r"h2o@0\.5 has no thresholds to calibrate: only KVMerger"),
        (["cells=[h2o@0.5,kvmerger@0.5]"], "2 cells were given"),
        (["method=nonsense"], "unknown method 'nonsense'"),
        (["nonsense=1"], "nonsense"),
    ],
)
def test_what_has_no_thresholds_is_named_as_it_was_given(capsys, given, message):
    assert calibrate.main(["benchmark=mini", *given]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_budget_that_holds_every_prompt_leaves_nothing_to_calibrate(tiny):
    with pytest.raises(UserError, match="budget=100000 holds every prompt"):
        calibrate.calibrate(tiny("benchmark.tasks=[trec]", "method=kvmerger", "budget=100000"))


def test_the_file_is_named_by_the_checkpoint_that_was_given(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_settings = tiny("benchmark.tasks=[trec]")
    given = [f"model.path={run_settings.model.path}", "benchmark=longbench", "benchmark.tasks=[trec]"]
    data = f"benchmark.data_dir={run_settings.resolved['benchmark']['data_dir']}"
    assert calibrate.main([*given, data, "budget=0.5", "limit=1"]) == 0
    name = Path(str(run_settings.model.path)).name
    assert Path(f"results/calibration/{name}@0.5.json").exists()
    assert f"{name}@0.5.json" in capsys.readouterr().out
