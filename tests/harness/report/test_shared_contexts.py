"""Samples that share a context are drawn and exchanged together, as they are not independent."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.metrics import find_metric
from harness.records import Record
from harness.report.bootstrap import Samples, resampled_means, score_task
from harness.report.contrasts import AVERAGE, Contrast, contrasts
from harness.report.export.every_eval_ever import evaluation_log
from harness.report.flip_properties import properties
from harness.report.flips import FlipRule
from harness.report.run import Run, load_run
from harness.report.summary import summarise
from harness.report.tables.contrasts import contrast_table
from tests.synthetic_run import record, write_run

FULL, A, B = "full@1", "kvmerger@0.5", "h2o@0.5"
METRIC = find_metric("qa_f1")
DIFFERENCES = (0.5, 0.25, -0.1, 0.3, 0.15, 0.4)


def lines(scores: list[float], copies: int = 1, named: bool = True) -> list[Record]:
    """Samples of one context each, so many times over."""
    return [
        record(f"{context}-{copy}", score, context_hash=f"{context:016x}" if named else None)
        for context, score in enumerate(scores)
        for copy in range(copies)
    ]


def run_of(folder: Path, cells: dict[str, list[Record]]) -> Run:
    by_task = {cell: {"t": records} for cell, records in cells.items()}
    return load_run(write_run(folder, {"t": "qa_f1"}, by_task))


def compared(folder: Path, copies: int, named: bool = True) -> Contrast:
    better = lines([max(d, 0) for d in DIFFERENCES], copies, named)
    worse = lines([max(-d, 0) for d in DIFFERENCES], copies, named)
    (one,) = [c for c in contrasts(run_of(folder, {A: better, B: worse})) if c.task == AVERAGE]
    return one


def test_copies_of_a_context_make_nothing_surer(tmp_path: Path) -> None:
    once, often = compared(tmp_path / "once", 1), compared(tmp_path / "often", 5)
    assert often.scored.value == pytest.approx(once.scored.value)
    assert often.p == once.p == 4 / 2**6  # all exchanges: no sum is as far but with -0.1 alone turned
    assert (often.n, often.contexts) == (30, 6)
    low, high = once.interval
    assert often.interval == pytest.approx((low, high), abs=0.03 * (high - low))
    without = compared(tmp_path / "unnamed", 5, named=False)
    assert (without.n, without.contexts) == (30, 30)
    assert np.ptp(without.interval) < 0.6 * (high - low)


def test_contexts_of_their_own_change_no_bit() -> None:
    values = np.random.default_rng(1).random((9, 2))
    ids = tuple("abcdefghi")
    named = resampled_means("t", Samples(ids, values, tuple(name * 16 for name in ids)))
    assert np.array_equal(named, resampled_means("t", Samples(ids, values)))


def test_a_context_is_drawn_with_all_its_samples() -> None:
    """Two contexts, of one and of three samples: both drawn, or either of them twice."""
    samples = Samples(("0", "1", "2", "3"), np.array([[0.0], [3.0], [4.0], [8.0]]), tuple("abbb"))
    means, counts = np.unique(resampled_means("t", samples), return_counts=True)
    assert means == pytest.approx([0, 15 / 4, 5])
    assert counts / counts.sum() == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of 15 contexts with 6 samples that scatter around each; taken for independent, they do not."""
    generator = np.random.default_rng(5)
    held = {"together": 0, "alone": 0}
    ids = tuple(f"{i:02d}" for i in range(90))
    for table in range(200):
        own = generator.normal(0.5, 0.1, 15).repeat(6) + generator.normal(0, 0.05, 90)
        for name, contexts in (("together", tuple(str(i // 6) for i in range(90))), ("alone", ())):
            scored = score_task(f"{table}", Samples(ids, own[:, None], contexts), METRIC, 500)
            low, high = scored.interval(95)
            held[name] += low <= 50 <= high
    assert 0.89 <= held["together"] / 200 <= 0.98
    assert held["alone"] / 200 < 0.75


def test_one_context_has_neither_interval_nor_verdict(tmp_path: Path) -> None:
    run = run_of(tmp_path, {A: lines([0.5], 8), B: lines([0.1], 8)})
    (one,) = [c for c in contrasts(run) if c.task == AVERAGE]
    assert math.isnan(one.p)
    assert all(map(math.isnan, one.interval))
    assert one.verdict(1.0) is None


def test_a_context_that_one_cell_names_holds_for_all(tmp_path: Path) -> None:
    """Else the cells would be drawn each in its own way, and no difference be paired."""
    scores = [0.2, 0.4, 0.9]
    run = run_of(tmp_path, {A: lines(scores, 2), B: lines(scores, 2, named=False)})
    (one,) = [c for c in contrasts(run) if c.task == AVERAGE]
    assert one.contexts == 3
    assert not one.scored.replicates.any()


def test_tables_and_exports_say_how_many_there_are(tmp_path: Path) -> None:
    run = run_of(tmp_path, {A: lines([0.5, 0.9], 3), B: lines([0.1, 0.2], 3)})
    table = contrast_table(run, 1.0)
    assert table is not None
    assert table.rows[0][3] == "6\n(2 contexts)"
    assert any("6 samples on 2 contexts in t" in note for note in table.notes)
    assert set(summarise(run)["contexts"]) == {2}
    assert "over contexts, within tasks" in str(evaluation_log(run, A))


def test_properties_of_samples_that_share_contexts_are_not_tested(tmp_path: Path) -> None:
    def losing(named: bool) -> Run:
        full = lines([1.0] * 8, 1, named)
        names = [r.context_hash for r in full]
        cut = [
            record(r.id, float(i % 2), prompt_tokens=i, context_hash=names[i // 2])
            for i, r in enumerate(full)
        ]
        long = [
            record(r.id, 1.0, prompt_tokens=i, context_hash=names[i // 2]) for i, r in enumerate(full)
        ]
        return run_of(tmp_path / str(named), {FULL: long, A: cut})

    rule = FlipRule(50, 50)
    assert properties(losing(named=False), rule)
    assert not properties(losing(named=True), rule)
