"""What goes with a flip, against differences and permutations worked out one by one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.judgement import FlipRule
from harness.report.flip_properties import SHUFFLES, Property, Rate, properties, rates
from harness.report.run import Run, load_run
from harness.report.tables.flips import property_table, rate_table
from tests.synthetic_run import record, write_run

FULL, A = "full@1", "kvmerger@0.5"
RULE = FlipRule()
PROMPT, ANSWER, GOLD = "prompt tokens", "full's answer tokens", "gold answer characters"


def run_of(
    folder: Path, tasks: dict[str, tuple[Sequence[float], Sequence[bool]]], **fields: Any
) -> Run:
    """By task: the prompt tokens of samples that the full cache answers, and which of them are lost."""
    full, cell = {}, {}
    for task, (tokens, lost) in tasks.items():
        full[task] = [
            record(str(i), 1.0, prompt_tokens=int(count), **fields) for i, count in enumerate(tokens)
        ]
        cell[task] = [record(str(i), 0.0 if each else 1.0) for i, each in enumerate(lost)]
    return load_run(write_run(folder, dict.fromkeys(tasks, "qa_f1"), {FULL: full, A: cell}))


def of(found: Sequence[Property], name: str) -> Property:
    (one,) = [each for each in found if each.name == name]
    return one


def test_a_difference_is_of_means_within_tasks_weighted_by_what_they_tell(tmp_path: Path) -> None:
    """Weights 2 x 2 / 4 and 2 x 4 / 6; the tasks' own levels, 100 and 5,000, are no difference."""
    t = [110, 130, 100, 80], [True, True, False, False]
    u = [5030, 5050, 5000, 5000, 5000, 5000], [True, True, False, False, False, False]
    one = of(properties(run_of(tmp_path, {"t": t, "u": u}), RULE), PROMPT)
    weights = np.array([1.0, 8 / 6])
    assert one.of_lost == pytest.approx(np.dot(weights, [120, 5040]) / weights.sum())
    assert one.of_kept == pytest.approx(np.dot(weights, [90, 5000]) / weights.sum())
    assert one.difference.value == pytest.approx(np.dot(weights, [30, 40]) / weights.sum())
    assert (one.tasks, one.lost, one.kept) == (("t", "u"), 4, 6)
    low, high = one.difference.interval(95)
    assert low < one.difference.value < high


def test_p_is_the_share_of_all_draws_within_tasks_that_are_as_far(tmp_path: Path) -> None:
    t = [3, 8, 1, 2, 5], [True, True, False, False, False]
    u = [700, 900, 500, 800], [True, True, False, False]
    one = of(properties(run_of(tmp_path, {"t": t, "u": u}), RULE), PROMPT)
    null = [
        sum(x[i] - np.mean(x) for i in chosen) + sum(y[i] - np.mean(y) for i in other)
        for x, y in [(t[0], u[0])]
        for chosen in combinations(range(5), 2)
        for other in combinations(range(4), 2)
    ]
    observed = null[0]
    as_far = min(np.mean(null >= observed - 1e-9), np.mean(null <= observed + 1e-9))
    assert one.p == pytest.approx(2 * as_far, abs=4 * np.sqrt(as_far / SHUFFLES))


def test_values_that_all_lie_apart_have_a_small_p(tmp_path: Path) -> None:
    tokens = [*range(1, 11), *range(101, 111)]
    run = run_of(tmp_path, {"t": (tokens, [True] * 10 + [False] * 10)})
    one = of(properties(run, RULE), PROMPT)
    assert one.difference.value == pytest.approx(-100)
    assert one.p_adjusted < 0.01
    assert one.p_adjusted == one.p  # alone in its family: the other properties do not vary


@pytest.mark.parametrize("lost", [0, 1, 5, 6])
def test_of_fewer_than_two_on_a_side_nothing_is_said(tmp_path: Path, lost: int) -> None:
    run = run_of(tmp_path, {"t": ([*range(1, 7)], [i < lost for i in range(6)])})
    assert properties(run, RULE) == []
    assert property_table(run, RULE) is None


def test_a_property_with_one_value_in_each_task_says_nothing(tmp_path: Path) -> None:
    half = [True, True, False, False]
    run = run_of(tmp_path, {"t": ([7] * 4, half), "u": ([9] * 4, half)})
    assert properties(run, RULE) == []


def test_answers_and_their_length_are_properties_too(tmp_path: Path) -> None:
    full = [
        record(str(i), 1.0, answers=("x" * i, "x" * (i + 2)), generated_tokens=10 - i) for i in range(4)
    ]
    cell = [record(str(i), float(i >= 2)) for i in range(4)]
    run = load_run(write_run(tmp_path, {"t": "qa_f1"}, {FULL: {"t": full}, A: {"t": cell}}))
    found = properties(run, RULE)
    assert {one.name for one in found} == {ANSWER, GOLD}
    assert (of(found, GOLD).of_lost, of(found, GOLD).of_kept) == (1.5, 3.5)
    assert (of(found, ANSWER).of_lost, of(found, ANSWER).of_kept) == (9.5, 7.5)
    assert all(one.p_adjusted >= one.p for one in found)


def grouped(folder: Path, with_groups: Sequence[bool] = (True,) * 8) -> Run:
    """A needle at depth 0 and 50, in texts of two lengths; what lies at 50 is lost, but once."""
    full, cell = [], []
    for i, known in enumerate(with_groups):
        groups = {"depth": 50 * (i % 2), "bucket": "0-4k" if i < 4 else "4-8k"}
        full.append(record(str(i), 1.0, extra={"groups": groups} if known else {}))
        cell.append(record(str(i), float(i % 2 == 0 or i == 7)))
    return load_run(write_run(folder, {"t": "qa_f1"}, {FULL: {"t": full}, A: {"t": cell}}))


def test_groups_have_rates_by_value_and_numbers_a_difference(tmp_path: Path) -> None:
    run = grouped(tmp_path)
    assert rates(run, RULE) == [
        Rate(A, "depth", 0, 0, 4),
        Rate(A, "depth", 50, 3, 4),
        Rate(A, "bucket", "0-4k", 2, 4),
        Rate(A, "bucket", "4-8k", 1, 4),
    ]
    (one,) = properties(run, RULE)
    assert (one.name, one.of_lost, one.of_kept) == ("depth", 50, 10)
    table = rate_table(run, RULE)
    assert table is not None
    assert table.rows[1] == ("depth", "50", "3 of 4")


def test_a_property_that_some_samples_lack_is_not_compared(tmp_path: Path) -> None:
    run = grouped(tmp_path, [True] * 7 + [False])
    assert properties(run, RULE) == []
    assert rates(run, RULE)[1] == Rate(A, "depth", 50, 3, 3)


@given(
    st.lists(st.integers(1, 10**6), min_size=4, max_size=8),
    st.integers(2, 6),
    st.integers(1, 10**6),
)
def test_a_shift_of_a_whole_task_changes_nothing(tokens: list[int], lost: int, shift: int) -> None:
    lost = min(lost, len(tokens) - 2)
    sides = [i < lost for i in range(len(tokens))]
    with tempfile.TemporaryDirectory() as folder:
        near = properties(run_of(Path(folder) / "a", {"t": (tokens, sides)}), RULE)
        far = properties(run_of(Path(folder) / "b", {"t": ([x + shift for x in tokens], sides)}), RULE)
    assert [one.p for one in near] == [one.p for one in far]
    assert [one.difference.value for one in near] == pytest.approx(
        [one.difference.value for one in far], abs=1e-6
    )


def test_the_table_shows_both_sides(tmp_path: Path) -> None:
    t = [110, 130, 100, 80], [True, True, False, False]
    table = property_table(run_of(tmp_path, {"t": t}), RULE)
    assert table is not None
    ((cell, name, tasks, lost, kept, of_lost, of_kept, difference, *_),) = table.rows
    assert (cell, name, tasks, lost, kept) == (A, PROMPT, "1", "2", "2")
    assert (of_lost, of_kept) == ("120.0", "90.0")
    assert difference.startswith("+30.00\n[")
