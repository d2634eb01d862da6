"""Flips against a slow count by hand, and what must hold of any scores."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console

from harness.judgement import FlipRule
from harness.records import Record
from harness.report.flips import (
    TOTAL,
    Count,
    Flips,
    Shared,
    counts,
    flips,
    points,
    shared_losses,
    without_flips,
)
from harness.report.page import write_report
from harness.report.plots import flips as plot_module
from harness.report.plots.flips import flips_by_task
from harness.report.plots.style import Plot, Undrawn, looks
from harness.report.run import Run, load_run
from harness.report.tables.flips import flip_table, flipped_samples, rate_table, shared_table
from harness.report.terminal import print_comparison
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


# in numbers, and in common


def test_counts_add_up_over_tasks(tmp_path: Path) -> None:
    def marks(*scores: float) -> list[Record]:
        return [record(str(i), score) for i, score in enumerate(scores)]

    run = run_of(
        tmp_path,
        {
            FULL: {"t": marks(1, 1, 0), "u": marks(1, 0)},
            A: {"t": marks(0, 1, 1), "u": marks(0, 0)},
        },
    )
    assert counts(run, RULE) == [
        Count("t", A, 3, well=2, lost=1, gained=1),
        Count("u", A, 2, well=1, lost=1, gained=0),
        Count(TOTAL, A, 5, well=3, lost=2, gained=1),
    ]
    total = counts(run, RULE)[-1]
    assert (total.net, total.lost_share) == (-1, pytest.approx(2 / 3))


def test_of_nothing_answered_well_no_share_is_lost(tmp_path: Path) -> None:
    (one, _) = counts(scored(tmp_path, {FULL: [0.0], A: [1.0]}), RULE)
    assert (one.well, one.lost, one.gained) == (0, 0, 1)
    assert math.isnan(one.lost_share)


def test_what_all_methods_of_a_budget_lose_is_told_from_what_one_does(tmp_path: Path) -> None:
    run = scored(
        tmp_path,
        {
            FULL: [1, 1, 1, 1, 0],
            A: [0, 0, 1, 1, 0],
            B: [0, 1, 0, 1, 0],
            "cam@0.35": [0, 0, 0, 0, 0],
        },
    )
    one, total = shared_losses(run, RULE)  # one method at 35%: nothing to have in common
    assert one == Shared(
        "t", "0.5", (A, B), well=4, by_any=3, by_all=1, by_chance=0.25 / 0.75, alone={A: 1, B: 1}
    )
    assert one.share == pytest.approx(1 / 3)
    assert (total.task, total.by_any, total.by_all) == (TOTAL, 3, 1)


def test_chance_is_reckoned_within_tasks(tmp_path: Path) -> None:
    """One task where both lose all, and one where neither does: chance alone makes them agree."""
    marks = {"t": 0.0, "u": 1.0}
    full = {task: [record(str(i), 1.0) for i in range(3)] for task in marks}
    cell = {task: [record(str(i), mark) for i in range(3)] for task, mark in marks.items()}
    *_, total = shared_losses(run_of(tmp_path, {FULL: full, A: cell, B: cell}), RULE)
    assert (total.well, total.share, total.by_chance) == (6, 1.0, 1.0)


def test_only_samples_that_all_methods_hold_are_in_common(tmp_path: Path) -> None:
    cells = {
        FULL: {"t": [record(name, 1.0) for name in "abc"]},
        A: {"t": [record(name, 0.0) for name in "ab"]},
        B: {"t": [record(name, 0.0) for name in "bc"]},
    }
    one, _ = shared_losses(run_of(tmp_path, cells), RULE)
    assert (one.well, one.by_any, one.by_all) == (1, 1, 1)


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.4, 1.0])] * 4), min_size=1, max_size=8),
    Rules,
)
def test_a_slow_count_of_what_is_shared_finds_the_same(
    marks: list[tuple[float, ...]], rule: FlipRule
) -> None:
    cells = (A, B, "cam@0.5")
    scores = dict(zip((FULL, *cells), zip(*marks, strict=True), strict=True))
    times = []
    for full, *others in marks:
        if 100 * full >= rule.well:
            times.append(sum(100 * full - 100 * other >= rule.drop for other in others))
    with tempfile.TemporaryDirectory() as folder:
        one, _ = shared_losses(scored(Path(folder), scores), rule)
    assert (one.well, one.by_any) == (len(times), sum(count > 0 for count in times))
    assert (one.by_all, sum(one.alone.values())) == (times.count(3), times.count(1))
    assert math.isnan(one.share) == (one.by_any == 0)


# what is shown


def test_the_table_shows_lost_and_gained_then_their_total(tmp_path: Path) -> None:
    table = flip_table(scored(tmp_path, {FULL: [1, 1, 0], A: [0, 1, 1], B: [0, 0, 0]}), RULE)
    assert table is not None
    assert table.header == ("task", "n", "answered well", A, B)
    assert table.rows == (
        ("t", "3", "2", "-1 +1", "-2 +0"),
        (TOTAL, "3", "2", "-1 +1", "-2 +0"),
        ("net", "", "", "+0", "-2"),
        ("lost, % of answered well", "", "", "50.0", "100.0"),
    )
    assert table.averages == (1, 2, 3)
    assert "50 points or more" in table.caption
    assert list(table.data["net"]) == [0, -2, 0, -2]


def test_a_cell_that_lacks_a_task_is_blank_there(tmp_path: Path) -> None:
    one = [record("0", 1.0)]
    run = run_of(tmp_path, {FULL: {"t": one, "u": one}, A: {"t": one, "u": one}, B: {"t": one}})
    table = flip_table(run, RULE)
    assert table is not None
    assert table.rows[1] == ("u", "1", "1", "-0 +0", "")


def test_without_a_full_cache_there_are_no_tables(tmp_path: Path) -> None:
    run = scored(tmp_path, {A: [1.0], B: [0.0]})
    assert flip_table(run, RULE) is shared_table(run, RULE) is rate_table(run, RULE) is None
    assert flipped_samples(run, RULE).empty


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    text = [record("0", 7.0, extra={"nll": 20.0, "tokens": 10})]
    cells = {cell: {"text": text, "t": [record("0", 1.0)]} for cell in (FULL, A, B)}
    run = run_of(tmp_path, cells)
    for table in (flip_table(run, RULE), shared_table(run, RULE)):
        assert table is not None
        assert "No flips of text: their scores are no points of 0 to 100." in table.notes


@pytest.mark.usefixtures("undrawn")
def test_each_flipped_sample_is_listed_with_both_scores(tmp_path: Path) -> None:
    write_report([scored(tmp_path, {FULL: [1, 0, 1], A: [0.2, 0.9, 1]})])
    found = pd.read_csv(tmp_path / "tables" / "flipped_samples.csv")
    columns = ["task", "method", "budget", "id", "flip", "score_full", "score"]
    assert found[columns].to_numpy().tolist() == [
        ["t", "kvmerger", 0.5, 0, "lost", 100.0, 20.0],
        ["t", "kvmerger", 0.5, 1, "gained", 0.0, 90.0],
    ]


def test_the_console_shows_them_in_total(tmp_path: Path) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    print_comparison(scored(tmp_path, {FULL: [1, 1, 0], A: [0, 1, 1]}), console)
    (line,) = [row for row in console.export_text().splitlines() if "samples lost, gained" in row]
    assert line.split()[-2:] == ["-1", "+1"]


def test_the_figure_says_what_is_lost(tmp_path: Path) -> None:
    run = scored(tmp_path, {FULL: [1, 1, 0], A: [0, 1, 1], B: [0, 0, 0]})
    drawn = flips_by_task(run, looks([run]), RULE)
    assert isinstance(drawn, Plot)
    assert "from 1 of 2 samples lost in all (KVMerger 50%) to 2 of 2 (H2O 50%)" in drawn.alt
    assert RULE.sentence in drawn.caption


def test_its_bars_are_as_long_as_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plot_module, "render", lambda figure, *_: figures.append(figure))
    run = scored(tmp_path, {FULL: [1, 1, 0], A: [0, 1, 1], B: [0, 0, 0]})
    flips_by_task(run, looks([run]), RULE)
    patches = [patch for axis in figures[0].axes for patch in axis.patches]
    assert [bar.get_width() for bar in patches if isinstance(bar, Rectangle)] == [-1, 1, -2]


def test_without_a_full_cache_it_is_not_drawn(tmp_path: Path) -> None:
    run = scored(tmp_path, {A: [1.0], B: [0.0]})
    drawn = flips_by_task(run, looks([run]), RULE)
    assert isinstance(drawn, Undrawn)
    assert "full cache" in str(drawn)
