"""The calibration of contrasts, in small; docs/results.md has it in full."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from scripts.null_contrasts import CELLS, any_better, covers, main, scores, tables

COUNT = 24


def test_methods_that_do_not_differ_are_rarely_told_apart() -> None:
    """With 5%, more than 4 of 24 tables happens once in 100; unadjusted p-values give most of them."""
    simulated = list(tables(COUNT, sizes=(20, 50)))
    most = binom.ppf(0.99, COUNT, 0.05)
    assert sum(any_better(one.average) for one in simulated) <= most
    assert sum(any_better(one.by_task) for one in simulated) <= most
    unadjusted = sum(any(c.p < 0.05 for c in one.by_task) for one in simulated)
    assert unadjusted > 2 * most  # so the bound would catch a family that is not adjusted
    covered = np.mean([covers(c) for one in simulated for c in one.by_task])
    assert 0.91 < covered < 0.98


def test_a_planted_difference_is_found() -> None:
    """10 points, 100 samples a task: the first cell is worse than each other one."""
    large = list(tables(8, shift=10, sizes=(100,)))
    found = [c.p_adjusted < 0.05 and c.scored.value < 0 for one in large for c in one.average[:3]]
    assert {c.first for one in large for c in one.average[:3]} == {CELLS[0]}
    assert np.mean(found) > 0.8


def test_scores_have_mass_at_both_ends_and_the_planted_shift() -> None:
    generator = np.random.default_rng(0)
    drawn = np.concatenate([scores(generator, 200, 4, 8) for _ in range(100)], axis=1)
    assert 0.2 < (drawn[1:] == 0).mean() < 0.6
    assert 0.1 < (drawn[1:] == 1).mean() < 0.7
    assert np.corrcoef(drawn[1:])[0, 1] > 0.5
    assert 100 * (drawn[1:].mean() - drawn[0].mean()) == pytest.approx(8, abs=1)


def test_the_command_prints_a_line_for_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tables", "2"])
    out = capsys.readouterr().out
    assert "| 20 | 1 |" in out
    assert "| all | 2 |" in out


def test_a_shift_beyond_the_scores_is_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--shift", "50"])
