"""A metric is one object: its name, how it marks a sample, how a task's score comes of that."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import metric as module
from benchmarks import metrics as listed
from benchmarks.metric import Metric, best_of
from benchmarks.metrics import METRICS, find_metric
from benchmarks.task import Task
from harness.report.run import load_run
from kvmerge.errors import UserError
from tests.synthetic_run import record, write_run

ROOT = Path(__file__).resolve().parents[2]


def test_the_metric_of_the_documentation_marks_predictions_and_is_averaged(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "add_a_metric.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
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
