"""Lengths of answers, against what is counted by hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.records import Record
from harness.report.bootstrap import Samples, resampled_means
from harness.report.contrasts import AVERAGE
from harness.report.lengths import Bounds, Lengths, lengths, lengths_by_task
from harness.report.run import Run, load_run
from harness.report.tables.lengths import length_by_task_table, length_table
from tests.synthetic_run import record, write_run

FULL, A = "full@1", "kvmerger@0.5"
LIMIT = 8


def answers(tokens: Sequence[int], **fields: Any) -> list[Record]:
    return [record(str(i), 1.0, generated_tokens=count, **fields) for i, count in enumerate(tokens)]


def run_of(
    folder: Path, cells: Mapping[str, Mapping[str, Sequence[Record]]], limit: int | None = LIMIT
) -> Run:
    tasks = {task: "perplexity" if task == "text" else "qa_f1" for by in cells.values() for task in by}
    path = write_run(folder, tasks, cells) / "run.json"
    info = json.loads(path.read_text())
    for spec in info["tasks"].values():
        spec |= {} if limit is None else {"max_new_tokens": limit}
    path.write_text(json.dumps(info))
    return load_run(folder)


def of(found: Sequence[Lengths], cell: str, task: str = "t") -> Lengths:
    (one,) = [each for each in found if (each.task, each.cell) == (task, cell)]
    return one


def test_the_change_is_paired_by_sample(tmp_path: Path) -> None:
    run = run_of(tmp_path, {FULL: {"t": answers([2, 4, 6])}, A: {"t": answers([3, 8])}})
    one = of(lengths_by_task(run), A)
    assert (one.n, one.pairs, one.mean) == (2, 2, 5.5)
    assert one.change is not None
    assert one.change.value == pytest.approx((1 + 4) / 2)
    drawn = resampled_means("t", Samples(("0", "1"), np.array([[1.0], [4.0]])))
    assert (one.change.low, one.change.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    assert of(lengths_by_task(run), FULL).change is None


def test_seeds_are_averaged_within_a_sample(tmp_path: Path) -> None:
    drawn = [
        record("0", 1.0, seed=0, generated_tokens=2, prediction=" ", finish_reason="stop"),
        record("0", 1.0, seed=1, generated_tokens=8, prediction="x", finish_reason="length"),
        record("1", 1.0, seed=0, generated_tokens=3, prediction="x", finish_reason="stop"),
    ]
    run = run_of(tmp_path, {FULL: {"t": answers([2, 2])}, A: {"t": drawn}})
    one = of(lengths_by_task(run), A)
    assert (one.n, one.mean) == (2, 4.0)
    assert (one.cut_off, one.empty) == (Bounds(0.25, 0.25), 0.25)


def test_an_answer_that_its_end_token_ended_at_the_limit_was_not_cut_off(tmp_path: Path) -> None:
    ended = record("0", 1.0, generated_tokens=LIMIT, finish_reason="stop")
    ran_on = record("1", 1.0, generated_tokens=LIMIT, finish_reason="length")
    run = run_of(tmp_path, {A: {"t": [ended, ran_on]}})
    assert of(lengths_by_task(run), A).cut_off == Bounds(0.5, 0.5)
    table = length_table(run)
    assert table is not None
    assert table.rows == ((A, "2", "8.0", "", "50.0", "0.0"),)
    assert table.notes == ("No change to full: the run has no full cache.",)


def test_of_an_earlier_version_only_bounds_are_known(tmp_path: Path) -> None:
    run = run_of(tmp_path, {FULL: {"t": answers([1, 2])}, A: {"t": answers([LIMIT, 3])}})
    table = length_by_task_table(run)
    assert table is not None
    assert [row[5] for row in table.rows] == ["0.0", "at most 50.0"]
    assert any("do not say why an answer ended" in note for note in table.notes)
    assert list(table.data["cut_off"].isna()) == [False, True]
    assert list(table.data["cut_off_at_most"]) == [0, 0.5]


def test_without_a_limit_nothing_is_known(tmp_path: Path) -> None:
    run = run_of(tmp_path, {A: {"t": answers([LIMIT, 3])}}, limit=None)
    table = length_table(run)
    assert table is not None
    assert table.rows[0][4] == "not recorded"


def test_the_average_is_over_tasks_and_only_where_a_cell_has_all(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        {
            FULL: {"t": answers([2, 4]), "u": answers([5])},
            A: {"t": answers([4, 4]), "u": answers([7])},
            "h2o@0.5": {"t": answers([1])},
        },
    )
    found = lengths(run)
    assert [one.cell for one in found] == [FULL, A]
    one = of(found, A, AVERAGE)
    assert (one.n, one.pairs, one.mean) == (3, 3, 5.5)
    assert one.change is not None
    assert one.change.value == pytest.approx((1 + 2) / 2)
    assert np.isnan(one.change.low)  # one sample of u: no interval


def test_what_generates_nothing_has_no_length(tmp_path: Path) -> None:
    text = [record("0", 7.0, generated_tokens=0, extra={"nll": 20.0, "tokens": 10})]
    run = run_of(tmp_path, {FULL: {"text": text}, A: {"text": text}})
    assert lengths_by_task(run) == lengths(run) == []
    assert length_table(run) is length_by_task_table(run) is None


def test_one_sample_has_a_change_and_no_interval(tmp_path: Path) -> None:
    run = run_of(tmp_path, {FULL: {"t": answers([2])}, A: {"t": answers([5])}})
    table = length_by_task_table(run)
    assert table is not None
    assert table.rows[1][4] == "+3.00"


def test_cells_without_a_sample_in_common_are_not_compared(tmp_path: Path) -> None:
    run = run_of(tmp_path, {FULL: {"t": [record("x", 1.0)]}, A: {"t": answers([5])}})
    one = of(lengths_by_task(run), A)
    assert (one.pairs, one.change) == (0, None)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_exchanging_the_cells_turns_the_change_around(tokens: list[tuple[int, int]]) -> None:
    first, second = zip(*tokens, strict=True)
    changes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, full, cell in (("a", first, second), ("b", second, first)):
            cells = {FULL: {"t": answers(full)}, A: {"t": answers(cell)}}
            change = of(lengths_by_task(run_of(Path(folder) / name, cells)), A).change
            assert change is not None
            changes.append(change)
    assert changes[0].value == pytest.approx(-changes[1].value)
    assert (changes[0].low, changes[0].high) == pytest.approx(
        (-changes[1].high, -changes[1].low), nan_ok=True
    )
