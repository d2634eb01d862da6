"""Flips against a slow count by hand, and what must hold of any scores."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.judgement import FlipRule
from harness.records import Record
from harness.report.flips import Flips, flips, points, without_flips
from harness.report.run import Run, load_run
from tests.synthetic_run import record, write_run

FULL, A, B = "full@1", "kvmerger@0.5", "h2o@0.5"
RULE = FlipRule()

Scores = Mapping[str, Sequence[float]]
"""By cell, of the samples `0`, `1`, ..."""


def run_of(folder: Path, cells: Mapping[str, Mapping[str, Sequence[Record]]]) -> Run:
    tasks = {task: "perplexity" if task == "text" else "qa_f1" for by in cells.values() for task in by}
    return load_run(write_run(folder, tasks, cells))


def scored(folder: Path, scores: Scores) -> Run:
    cells = {
        cell: {"t": [record(str(i), score) for i, score in enumerate(of)]}
        for cell, of in scores.items()
    }
    return run_of(folder, cells)


def of(found: Sequence[Flips], cell: str, task: str = "t") -> Flips:
    (one,) = [each for each in found if (each.task, each.cell) == (task, cell)]
    return one


def test_a_sample_is_lost_where_full_answers_well_and_the_cell_falls_far_enough(tmp_path: Path) -> None:
    run = scored(
        tmp_path,
        {
            FULL: [1.0, 1.0, 0.5, 0.49, 0.8, 0.0, 0.5],
            A: [0.0, 0.5, 0.0, 0.00, 0.4, 1.0, 1.0],
        },
    )
    one = of(flips(run, RULE), A)
    assert one.well == ("0", "1", "2", "4", "6")
    assert one.lost == ("0", "1", "2")
    assert one.gained == ("5", "6")
    assert one.n == 7
    strict = of(flips(run, FlipRule(well=100, drop=100)), A)
    assert (strict.well, strict.lost, strict.gained) == (("0", "1"), ("0",), ("5",))


def test_seeds_are_averaged_before_a_sample_is_judged(tmp_path: Path) -> None:
    """Marks 0, 0, 1 and 0, 1, 1 of a full 1: the first falls by 67 points, the second by 33."""
    drawn = [
        record(str(i), mark, seed=seed)
        for i, marks in enumerate([(0.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
        for seed, mark in enumerate(marks)
    ]
    run = run_of(tmp_path, {FULL: {"t": [record(str(i), 1.0) for i in range(2)]}, A: {"t": drawn}})
    one = of(flips(run, RULE), A)
    assert (one.n, one.lost, one.gained) == (2, ("0",), ())


def test_a_fall_of_exactly_the_drop_counts_however_it_was_summed(tmp_path: Path) -> None:
    """Seeds of 0, 0.4 and 0.8 are 40 points, and in floats a little more."""
    drawn = [record("0", mark, seed=seed) for seed, mark in enumerate((0.0, 0.4, 0.8))]
    run = run_of(tmp_path, {FULL: {"t": [record("0", 0.9)]}, A: {"t": drawn}})
    assert 100 * 0.9 - 100 * np.mean([0.0, 0.4, 0.8]) < 50
    assert of(flips(run, RULE), A).lost == ("0",)


def test_only_samples_that_both_hold_are_compared(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        {
            FULL: {"t": [record("a", 1.0), record("b", 1.0)], "u": [record("x", 1.0)]},
            A: {"t": [record("b", 0.0), record("c", 0.0)], "u": [record("y", 0.0)]},
        },
    )
    (one,) = flips(run, RULE)
    assert (one.task, one.n, one.well, one.lost) == ("t", 1, ("b",), ("b",))


def test_without_a_full_cache_nothing_flips(tmp_path: Path) -> None:
    run = scored(tmp_path, {A: [1.0], B: [0.0]})
    assert list(flips(run, RULE)) == []
    assert points(run, "t", FULL) == {}


def test_a_perplexity_has_no_points_to_lose(tmp_path: Path) -> None:
    def text(nll: float) -> list[Record]:
        return [record("0", math.exp(nll / 10), extra={"nll": nll, "tokens": 10})]

    cells = {
        cell: {"text": text(nll), "t": [record("0", 1.0)]} for cell, nll in ((FULL, 20.0), (A, 90.0))
    }
    run = run_of(tmp_path, cells)
    assert [(one.task, one.lost) for one in flips(run, RULE)] == [("t", ())]
    assert without_flips(run) == ["text"]


def test_a_score_of_several_parts_is_one_of_the_sample(tmp_path: Path) -> None:
    """ROUGE's geometric mean: of 1, 1 and 0 it is 0, not 67."""
    parts = [{"rouge1": 1.0, "rouge2": low, "rougel": 1.0} for low in (1.0, 0.0)]
    cells = {
        cell: {"t": [record("0", 0.9, extra=extra)]}
        for cell, extra in zip((FULL, A), parts, strict=True)
    }
    run = load_run(write_run(tmp_path, {"t": "rouge_gm"}, cells))
    assert points(run, "t", A) == {"0": 0.0}
    assert of(flips(run, RULE), A).lost == ("0",)


Marks = st.lists(st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 0.75, 1.0])] * 2), min_size=1, max_size=8)
Rules = st.builds(FlipRule, st.sampled_from([20, 50, 75, 100]), st.sampled_from([5, 25, 50, 100]))


def both_ways(marks: Sequence[tuple[float, float]], rule: FlipRule) -> tuple[Flips, Flips]:
    """The flips of the second cell against the first, and with the two exchanged."""
    first, second = zip(*marks, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        one = flips(scored(Path(folder) / "a", {FULL: first, A: second}), rule)
        other = flips(scored(Path(folder) / "b", {FULL: second, A: first}), rule)
    return of(one, A), of(other, A)


@given(Marks, Rules)
def test_what_is_lost_one_way_is_gained_the_other(
    marks: list[tuple[float, float]], rule: FlipRule
) -> None:
    forth, back = both_ways(marks, rule)
    assert (forth.lost, forth.gained) == (back.gained, back.lost)


@given(Marks, Rules)
def test_a_slow_count_finds_the_same(marks: list[tuple[float, float]], rule: FlipRule) -> None:
    lost, gained, well = [], [], []
    for i, (full, cell) in enumerate(marks):
        if 100 * full >= rule.well:
            well.append(str(i))
            if 100 * full - 100 * cell >= rule.drop:
                lost.append(str(i))
        if 100 * cell >= rule.well and 100 * cell - 100 * full >= rule.drop:
            gained.append(str(i))
    one, _ = both_ways(marks, rule)
    assert (one.n, one.well) == (len(marks), tuple(well))
    assert (one.lost, one.gained) == (tuple(lost), tuple(gained))
    assert set(one.lost) <= set(one.well)
    assert not set(one.lost) & set(one.gained)


@given(Marks, Rules)
def test_a_cell_like_the_full_cache_flips_nothing(
    marks: list[tuple[float, float]], rule: FlipRule
) -> None:
    alike = [(full, full) for full, _ in marks]
    one, _ = both_ways(alike, rule)
    assert (one.lost, one.gained) == ((), ())


@given(Marks, Rules)
def test_a_stricter_rule_loses_no_more(marks: list[tuple[float, float]], rule: FlipRule) -> None:
    loose, _ = both_ways(marks, FlipRule(rule.well, min(rule.drop, 5)))
    strict, _ = both_ways(marks, rule)
    assert set(strict.lost) <= set(loose.lost)
    assert set(strict.gained) <= set(loose.gained)


@pytest.mark.parametrize("cells", [(FULL, A, B), (B, A, FULL)])
def test_they_come_by_task_then_cell(tmp_path: Path, cells: tuple[str, ...]) -> None:
    tasks = {task: [record("0", 1.0)] for task in ("u", "t")}
    run = run_of(tmp_path, dict.fromkeys(cells, tasks))
    others = [cell for cell in cells if cell != FULL]
    assert [(one.task, one.cell) for one in flips(run, RULE)] == [
        (task, cell) for task in ("u", "t") for cell in others
    ]
