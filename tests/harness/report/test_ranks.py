from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.report.ranks import Mark, ranks
from harness.report.run import Run, load_run
from harness.report.tables.scores import score_table
from tests.synthetic_run import record, write_run

HIGH, MIDDLE, LOW = [0.9] * 12, [0.6] * 12, [0.3] * 12


def run_of(folder: Path, cells: Mapping[str, Sequence[float]], metric: str = "qa_f1") -> Run:
    """One task; a perplexity's samples have a token each, of the value's negative log-likelihood."""
    records = {
        cell: {
            "t": [
                record(
                    str(i), value, extra={"nll": value, "tokens": 1} if metric == "perplexity" else {}
                )
                for i, value in enumerate(values)
            ]
        }
        for cell, values in cells.items()
    }
    return load_run(write_run(folder, {"t": metric}, records))


def on_task(run: Run) -> dict[str, Mark]:
    return {cell: mark for (task, cell), mark in ranks(run).items() if task == "t"}


def test_the_best_beats_every_other_and_the_second_every_other_but_that(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"h2o@0.5": MIDDLE, "cam@0.5": LOW, "kvmerger@0.5": HIGH})
    assert on_task(run) == {"kvmerger@0.5": Mark.BEST, "h2o@0.5": Mark.SECOND}
    assert ranks(run)["average", "kvmerger@0.5"] is Mark.BEST


def test_of_two_that_tie_at_the_top_neither_is_marked(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"h2o@0.5": HIGH, "cam@0.5": LOW, "kvmerger@0.5": HIGH})
    assert on_task(run) == {}


def test_of_two_that_tie_below_the_best_neither_is_second(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"h2o@0.5": LOW, "cam@0.5": LOW, "kvmerger@0.5": HIGH})
    assert on_task(run) == {"kvmerger@0.5": Mark.BEST}


def test_of_two_methods_one_may_be_best_and_none_second(tmp_path: Path) -> None:
    assert on_task(run_of(tmp_path, {"h2o@0.5": LOW, "cam@0.5": HIGH})) == {"cam@0.5": Mark.BEST}


def test_each_budget_has_its_own_and_the_full_cache_takes_no_part(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        {"full@1": HIGH, "h2o@0.5": LOW, "cam@0.5": MIDDLE, "h2o@0.35": HIGH, "cam@0.35": LOW},
    )
    assert on_task(run) == {"cam@0.5": Mark.BEST, "h2o@0.35": Mark.BEST}


def test_a_method_alone_at_its_budget_is_no_best(tmp_path: Path) -> None:
    assert ranks(run_of(tmp_path, {"full@1": HIGH, "h2o@0.5": LOW})) == {}


def test_a_lower_perplexity_is_better(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"h2o@0.5": HIGH, "cam@0.5": LOW}, metric="perplexity")
    assert on_task(run) == {"cam@0.5": Mark.BEST}


def test_too_few_samples_mark_nothing(tmp_path: Path) -> None:
    assert ranks(run_of(tmp_path, {"h2o@0.5": HIGH[:1], "cam@0.5": LOW[:1]})) == {}
    few = run_of(tmp_path / "few", {"h2o@0.5": HIGH[:5], "cam@0.5": LOW[:5]})
    assert ranks(few) == {}  # no p-value of 5 samples is below 2 / 2^5


def test_a_cell_without_records_leaves_its_budget_unmarked(tmp_path: Path) -> None:
    cells = {
        "h2o@0.5": {"t": [record(str(i), 0.9) for i in range(12)]},
        "cam@0.5": {"t": [record(str(i), 0.3) for i in range(12)]},
        "kvmerger@0.5": {},
    }
    assert ranks(load_run(write_run(tmp_path, {"t": "qa_f1"}, cells))) == {}


def test_the_table_of_scores_carries_the_marks_at_their_places(tmp_path: Path) -> None:
    table = score_table(run_of(tmp_path, {"h2o@0.5": MIDDLE, "cam@0.5": LOW, "kvmerger@0.5": HIGH}))
    found = {(table.rows[row][0], table.header[column]): m for (row, column), m in table.marks.items()}
    assert found == {
        ("t", "kvmerger@0.5"): Mark.BEST,
        ("t", "h2o@0.5"): Mark.SECOND,
        ("average", "kvmerger@0.5"): Mark.BEST,
        ("average", "h2o@0.5"): Mark.SECOND,
    }
