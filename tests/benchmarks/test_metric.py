"""A metric is one object: its name, how it marks a sample, how a task's score comes of that."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import metric as module
from benchmarks import metrics as listed
from benchmarks.metric import Metric, best_of
from benchmarks.metrics import METRICS, check_found, find_metric, metric_module
from benchmarks.task import Task
from harness.report.run import load_run
from kvmerge.errors import UserError
from tests.own_parts import MODULES, importable, install, write
from tests.synthetic_run import record, write_run

ROOT = Path(__file__).resolve().parents[2]


def test_the_metric_of_the_documentation_marks_predictions_and_is_averaged(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "add_a_metric.md").read_text(encoding="utf-8")
    example, outside = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = dict(vars(module))
    exec(example, names)
    added: Metric = names["FIRST_WORD"]
    monkeypatch.setattr(listed, "METRICS", {**METRICS, added.name: added})
    task = Task("t", added, 8)
    assert task.mark("Paris is it", ["London", "Paris"]) == {"score": 1.0}
    assert task.mark("", [""]) == {"score": 0.0}
    lines = [record("0", 1.0), record("1", 0.0)]
    run = load_run(write_run(tmp_path, {"t": "first_word"}, {"full@1": {"t": lines}}))
    assert run.scores["t", "full@1"].value == 50

    monkeypatch.syspath_prepend(write(tmp_path / "modules", {"my_metrics.py": outside}))
    try:
        own = find_metric("my_metrics.FIRST_WORD")
        check_found(own)
        assert own.sample("Paris is it", ["London", "Paris"]) == {"score": 1.0}
    finally:
        sys.modules.pop("my_metrics", None)


def test_a_name_that_no_metric_has_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown metric 'qa_f'\. Did you mean 'qa_f1'"):
        find_metric("qa_f")


def test_a_run_whose_metric_is_unknown_is_refused_naming_the_task(tmp_path):
    run = load_run(write_run(tmp_path, {"t": "bleu"}, {"full@1": {"t": [record("0", 0.5)]}}))
    with pytest.raises(UserError, match=r"run\.json, task t: unknown metric 'bleu'"):
        assert run.scores


def test_every_metric_is_listed_under_its_own_name_and_scores_its_parts():
    for name, one in METRICS.items():
        assert one.name == name
        means = np.full((3, len(one.parts)), 0.5)
        assert one.score(means).shape == (3,)
        assert one.averaged == (name not in ("perplexity", "unscored"))


def test_the_best_answer_counts_and_none_at_all_is_as_the_metric_says():
    rule = best_of(lambda prediction, answer: float(prediction == answer), without=0.25)
    assert rule("a", ["b", "a"]) == {"score": 1.0}
    assert rule("a", []) == {"score": 0.25}
    with pytest.raises(ValueError, match="empty"):
        best_of(lambda prediction, answer: 1.0)("a", [])


def test_perplexity_is_of_the_mean_loss_and_lower_is_better():
    perplexity = find_metric("perplexity")
    marks = perplexity.sample(np.log(8.0) * 4, 4)
    assert marks["score"] == pytest.approx(8)
    assert (marks["nll"], marks["tokens"]) == (pytest.approx(np.log(8.0) * 4), 4)
    assert not perplexity.higher_is_better
    # 2 nats over 1 token and 4 over 3: the ratio of the sums, not the mean of the ratios
    assert perplexity.score(np.array([3.0, 2.0])) == pytest.approx(np.exp(1.5))


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules outside the project, one of them with metrics."""
    folder = write(tmp_path / "modules", MODULES)
    monkeypatch.syspath_prepend(folder)
    with importable():
        yield folder


def test_a_metric_outside_the_project_is_called_as_it_is_found(modules, tmp_path):
    install(modules, "pack", {"kvmerge.metrics": {"begins": "own_metrics:PLAIN", "gone": "own_lost:M"}})
    for name in ("own_metrics.BEGINS", "begins", "own_metrics.PLAIN"):
        found = find_metric(name)
        assert found.name == name
        assert found.sample("Paris", ["Rome", "Pisa"]) == {"score": 1.0}
        assert metric_module(name) == "own_metrics"
    assert metric_module("qa_f1") is None
    lines = [record("0", 1.0), record("1", 0.0)]
    run = load_run(write_run(tmp_path / "out", {"t": "begins"}, {"full@1": {"t": lines}}))
    assert run.scores["t", "full@1"].value == 50
    with pytest.raises(UserError, match=r"^metric 'gone': own_lost.M cannot be loaded: .* of pack\)"):
        find_metric("gone")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("own_metrics.begins", "own_metrics.begins is no benchmarks.metric.Metric"),
        ("own_metrics.BEGIN", r"own_metrics.BEGIN cannot be loaded: .* Choices by name: accuracy, "),
        ("begins", "unknown metric 'begins'"),
    ],
)
def test_what_is_no_metric_is_told_in_a_sentence(modules, name, why):
    with pytest.raises(UserError, match=why):
        find_metric(name)


def test_a_metric_that_is_announced_by_the_name_of_another_is_refused(modules):
    install(modules, "pack", {"kvmerge.metrics": {"qa_f1": "own_metrics:PLAIN"}})
    with pytest.raises(UserError, match=r"qa_f1 is in two places: benchmarks.metrics and .*pack"):
        find_metric("qa_f1")
    assert find_metric("rouge_l") is METRICS["rouge_l"]


def test_a_metric_that_no_report_could_find_is_refused_before_anything_is_run(modules):
    import own_metrics

    check_found(find_metric("qa_f1"))
    check_found(own_metrics.BEGINS)
    with pytest.raises(UserError, match=r"unknown metric 'begins'.* e.g. 'my_metrics.FIRST_WORD'"):
        check_found(own_metrics.PLAIN)
    with pytest.raises(UserError, match="another metric is called 'qa_f1'"):
        check_found(own_metrics.LIKE_ANOTHER)
