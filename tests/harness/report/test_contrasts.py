"""Contrasts against p-values, adjustments and verdicts worked out by hand."""

from __future__ import annotations

import io
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness.records import Record
from harness.report import contrasts as module
from harness.report.contrasts import (
    AVERAGE,
    Contrast,
    Verdict,
    contrasts,
    contrasts_by_task,
    holm,
    pairs,
)
from harness.report.divergence import KL
from harness.report.exchanges import exchanges_of
from harness.report.page import write_report
from harness.report.run import Run, load_run
from harness.report.tables.contrasts import contrast_by_task_table, contrast_table
from harness.report.terminal import print_comparison
from tests.synthetic_run import record, write_run

A, B, FULL = "kvmerger@0.5", "h2o@0.5", "full@1"


def lines(scores: list[float], **fields: Any) -> list[Record]:
    return [record(f"{i:03d}", score, **fields) for i, score in enumerate(scores)]


def run_of(folder: Path, cells: dict[str, dict[str, list[Record]]], **info: Any) -> Run:
    tasks = {task: "perplexity" if task == "text" else "qa_f1" for by in cells.values() for task in by}
    return load_run(write_run(folder, tasks, cells, **info))


def of(found: list[Contrast], task: str, first: str = A, second: str = B) -> Contrast:
    (one,) = [c for c in found if (c.task, c.first, c.second) == (task, first, second)]
    return one


def test_cells_of_one_budget_meet_and_each_meets_full(tmp_path: Path) -> None:
    cells = [FULL, A, B, "cam@0.35", "h2o@0.35"]
    run = run_of(tmp_path, {cell: {"t": lines([0, 1])} for cell in cells})
    assert pairs(run) == [(A, B), ("cam@0.35", "h2o@0.35"), *((cell, FULL) for cell in cells[1:])]


def test_three_samples_have_the_p_value_of_all_eight_exchanges(tmp_path: Path) -> None:
    """Differences 50, 25, -10 points sum to 65; 8 exchanges, of which +-85, +-65 are as far: 4 / 8."""
    run = run_of(tmp_path, {A: {"t": lines([0.5, 0.5, 0.2])}, B: {"t": lines([0, 0.25, 0.3])}})
    one = of(contrasts_by_task(run), "t")
    assert one.p == one.p_adjusted == pytest.approx(0.5)
    assert one.scored.value == pytest.approx(65 / 3)
    assert (one.n, one.wins, one.ties, one.losses) == (3, 2, 0, 1)
    assert of(contrasts(run), AVERAGE).p == pytest.approx(0.5)


def test_the_average_exchanges_samples_of_all_tasks_each_weighted_by_its_task(tmp_path: Path) -> None:
    """Tasks of 2 and 4 samples: a sample of the first moves the average twice as far."""
    d, e = [0.5, 0.25], [0.75, -0.25, 0.5, 0.25]
    run = run_of(
        tmp_path,
        {
            A: {"t": lines([max(x, 0) for x in d]), "u": lines([max(x, 0) for x in e])},
            B: {"t": lines([max(-x, 0) for x in d]), "u": lines([max(-x, 0) for x in e])},
        },
    )
    weighted = [100 * x / 2 / 2 for x in d] + [100 * x / 2 / 4 for x in e]
    observed = sum(weighted)
    null = [np.dot(signs, weighted) for signs in product((1, -1), repeat=6)]
    one = of(contrasts(run), AVERAGE)
    assert one.scored.value == pytest.approx(observed)
    assert one.p == pytest.approx(2 * sum(x >= observed - 1e-9 for x in null) / 64)
    assert one.n == 6


def test_a_score_of_several_parts_is_flipped_whole(tmp_path: Path) -> None:
    """Perplexities: swap the sums of two passages, and take the difference anew each time."""
    nll = {A: [10.0, 30.0, 12.0], B: [14.0, 33.0, 25.0]}
    tokens = [10, 20, 10]

    def text(cell: str) -> list[Record]:
        return [
            record(str(i), 0.0, extra={"nll": value, "tokens": tokens[i]})
            for i, value in enumerate(nll[cell])
        ]

    run = run_of(tmp_path, {A: {"text": text(A)}, B: {"text": text(B)}})
    null = []
    for swapped in product((False, True), repeat=3):
        a = sum(nll[B if swap else A][i] for i, swap in enumerate(swapped))
        b = sum(nll[A if swap else B][i] for i, swap in enumerate(swapped))
        null.append(math.exp(a / 40) - math.exp(b / 40))
    one = of(contrasts_by_task(run), "text")
    assert one.scored.value == pytest.approx(null[0])
    assert one.p == pytest.approx(2 * sum(x <= null[0] + 1e-9 for x in null) / 8)
    assert (one.wins, one.losses, one.in_points) == (3, 0, False)
    assert contrasts(run) == []  # a perplexity has no average


def test_lower_is_better_for_perplexity(tmp_path: Path) -> None:
    def text(nll: float) -> list[Record]:
        return [record(str(i), 0.0, extra={"nll": nll + i, "tokens": 10}) for i in range(12)]

    run = run_of(tmp_path, {A: {"text": text(20)}, B: {"text": text(25)}})
    one = of(contrasts_by_task(run), "text")
    assert one.scored.value < 0
    assert one.verdict(1) is Verdict.FIRST
    assert one.needed(1) is None


def test_holm_by_hand() -> None:
    """Times 4, 3, 2, 1 in order, never below an earlier one, never above 1; NaN is not counted."""
    adjusted = holm([0.03, 0.01, math.nan, 0.04, 0.9])
    assert adjusted[:2] == pytest.approx([0.09, 0.04])
    assert math.isnan(adjusted[2])
    assert adjusted[3:] == pytest.approx([0.09, 0.9])
    assert holm([]) == []


def test_the_two_tables_are_two_families(tmp_path: Path) -> None:
    tasks = {"t": lines([1.0] * 12), "u": lines([0.5] * 12)}
    worse = {"t": lines([0.0] * 12), "u": lines([0.5] * 12)}
    run = run_of(tmp_path, {A: tasks, B: worse})
    assert of(contrasts_by_task(run), "t").p == pytest.approx(2 / 2**12)
    assert of(contrasts_by_task(run), "t").p_adjusted == pytest.approx(4 / 2**12)
    average = of(contrasts(run), AVERAGE)
    assert average.p_adjusted == average.p < 0.05  # alone in its family


def test_each_verdict(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.random(40)
    near = np.clip(noise + 0.005 * rng.choice([-1, 1], 40), 0, 1)
    cells = {
        A: {
            "better": lines([1.0] * 40),
            "worse": lines([0.0] * 40),
            "near": lines([*noise]),
            "open": lines([*noise]),
        },
        B: {
            "better": lines([0.5] * 40),
            "worse": lines([*noise]),
            "near": lines([*near]),
            "open": lines([*rng.permutation(noise)]),
        },
    }
    found = contrasts_by_task(run_of(tmp_path, cells))
    assert of(found, "better").verdict(1) is Verdict.FIRST
    assert of(found, "worse").verdict(1) is Verdict.SECOND
    assert of(found, "near").verdict(1) is Verdict.EQUIVALENT
    undecided = of(found, "open")
    assert undecided.verdict(1) is Verdict.UNRESOLVED
    low, high = np.percentile(undecided.scored.replicates, [5, 95])
    assert undecided.needed(1) == math.ceil(40 * ((high - low) / 2) ** 2)
    assert undecided.needed(2) == math.ceil(40 * ((high - low) / 4) ** 2)
    assert undecided.verdict(50) is Verdict.EQUIVALENT
    assert undecided.needed(50) is None


def test_cells_that_tie_everywhere_are_equivalent(tmp_path: Path) -> None:
    run = run_of(tmp_path, {A: {"t": lines([0, 1, 0.5])}, B: {"t": lines([0, 1, 0.5])}})
    one = of(contrasts_by_task(run), "t")
    assert (one.p, one.wins, one.ties, one.losses) == (1, 0, 3, 0)
    assert one.verdict(1) is Verdict.EQUIVALENT


def test_seeds_are_averaged_within_a_sample_and_their_spread_is_told(tmp_path: Path) -> None:
    drawn = [
        record(str(i), score, seed=seed)
        for seed, scores in enumerate([(0.0, 0.5, 1.0), (1.0, 0.5, 1.0)])
        for i, score in enumerate(scores)
    ]
    run = run_of(tmp_path, {A: {"t": drawn}, B: {"t": [record(str(i), 0.5) for i in range(3)]}})
    for one in (of(contrasts_by_task(run), "t"), of(contrasts(run), AVERAGE)):
        assert (one.n, one.wins, one.ties, one.losses) == (3, 1, 2, 0)
        assert one.scored.value == pytest.approx(50 / 3)
        assert one.spreads[0] == pytest.approx(np.std([50, 250 / 3], ddof=1))
        assert math.isnan(one.spreads[1])


def test_only_common_samples_count(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        {
            A: {"t": lines([1, 1, 1, 0, 0])},
            B: {"t": lines([0, 0, 0])},
            "cam@0.5": {"t": [record("zzz", 1.0)]},
        },
    )
    (one,) = contrasts_by_task(run)
    assert (one.n, one.scored.value) == (3, 100)
    assert len(contrasts(run)) == 1


def test_a_pair_that_lacks_a_task_has_no_average(tmp_path: Path) -> None:
    cells = {A: {"t": lines([1, 0]), "u": lines([1, 0])}, B: {"t": lines([1, 1])}}
    run = run_of(tmp_path, cells)
    assert [one.task for one in contrasts_by_task(run)] == ["t"]
    assert contrasts(run) == []
    assert contrast_table(run, 1) is None


def test_one_sample_says_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, {A: {"t": lines([1])}, B: {"t": lines([0])}})
    (one,) = contrasts_by_task(run)
    assert math.isnan(one.p)
    assert math.isnan(one.p_adjusted)
    assert np.isnan(one.interval).all()
    assert one.verdict(1) is None
    assert one.needed(1) is None
    table = contrast_by_task_table(run, 1)
    assert table is not None
    assert table.rows[0][4:] == ("+100.00", "", "", "1/0/0", "", "", "")


def test_kl_is_compared_between_methods_lower_being_better(tmp_path: Path) -> None:
    def with_kl(kl: float) -> dict[str, list[Record]]:
        return {
            task: [record(f"{i:03d}", 0.5, kl_to_full=kl * (i + 1)) for i in range(n)]
            for task, n in (("t", 8), ("u", 6))
        }

    full = {task: lines([0.5] * n) for task, n in (("t", 8), ("u", 6))}
    run = run_of(tmp_path, {FULL: full, A: with_kl(0.1), B: with_kl(0.2)})
    (one,) = [c for c in contrasts(run) if c.task == KL]
    assert (one.first, one.second, one.n) == (A, B, 14)
    assert one.scored.value == pytest.approx(-0.1 * (4.5 + 3.5) / 2)
    assert one.verdict(1) is Verdict.FIRST
    assert one.needed(1) is None
    assert (one.wins, one.ties, one.losses) == (14, 0, 0)


def test_kl_that_an_earlier_version_did_not_record_is_not_compared(tmp_path: Path) -> None:
    some = lines([0.5, 0.5])
    run = run_of(tmp_path, {A: {"t": lines([0.5, 0.5], kl_to_full=0.1)}, B: {"t": some}})
    assert [one.task for one in contrasts(run)] == [AVERAGE]
    table = contrast_table(run, 1)
    assert table is not None
    assert any("not recorded" in note and B in note for note in table.notes)


def test_the_same_run_gives_the_same_numbers_in_any_order_of_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cells = {cell: {"t": lines([*rng.random(30)])} for cell in (A, B, "cam@0.5")}
    once = contrasts_by_task(run_of(tmp_path / "a", cells))
    again = contrasts_by_task(run_of(tmp_path / "b", dict(reversed(cells.items()))))
    assert of(once, "t").p == of(again, "t", B, A).p
    low, high = of(again, "t", B, A).interval
    assert of(once, "t").interval == pytest.approx((-high, -low))


def test_a_run_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, {A: {"t": lines([0, 1])}, B: {"t": lines([1, 1])}})
    first = contrasts(run)
    monkeypatch.setattr(module, "compared", None)
    assert contrasts(run) is first


def test_larger_families_get_more_exchanges() -> None:
    assert [exchanges_of(size) for size in (1, 200, 400, 5000)] == [9_999, 9_999, 19_999, 49_999]
    assert 2 * 400 / (exchanges_of(400) + 1) < 0.05


@pytest.mark.usefixtures("undrawn")
def test_tables_and_page_show_them(tmp_path: Path) -> None:
    run = run_of(tmp_path, {A: {"t": lines([0, 1] * 10)}, B: {"t": lines([1, 0] * 10)}})
    page = write_report([run]).read_text()
    assert "Contrasts on the average and on KL" in page
    for name, ending in product(("contrasts", "contrasts_by_task"), ("md", "tex", "csv")):
        assert (tmp_path / "tables" / f"{name}.{ending}").exists()
    text = (tmp_path / "tables" / "contrasts.md").read_text()
    assert "unresolved [" in text
    row = pd.read_csv(tmp_path / "tables" / "contrasts.csv").iloc[0]
    assert (row["a"], row["b"], row["difference"], row["verdict"]) == (A, B, 0, "unresolved")
    assert row["samples_needed"] > 20


def test_the_console_names_the_better_method(tmp_path: Path) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    print_comparison(
        run_of(tmp_path, {A: {"t": lines([1.0] * 12)}, B: {"t": lines([0.0] * 12)}}), console
    )
    assert f"{A} - {B}: +100.00 [100.00, 100.00], adjusted p 0.000: A better" in console.export_text()


def test_the_console_shows_no_more_than_ten(tmp_path: Path) -> None:
    cells = {f"h2o:recent_ratio=0.{n}@0.5": {"t": lines([0, n / 10])} for n in range(1, 7)}
    console = Console(width=200, record=True, file=io.StringIO())
    print_comparison(run_of(tmp_path, cells), console)
    text = console.export_text()
    assert text.count("adjusted p") == 10
    assert "5 more contrasts" in text
