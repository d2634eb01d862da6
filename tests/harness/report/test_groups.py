from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import runner
from harness.records import Record
from harness.report import bootstrap
from harness.report.groups import GroupScore, Value, group_values, scores_by, unsampled
from harness.report.page import write_report
from harness.report.run import Run, load_run
from harness.report.tables.scores import difference_table, group_tables, score_table
from harness.report.tables.table import Table
from tests.synthetic_run import record, write_run
from tests.tiny_run import compose

SCORES = {
    ("0-4k", "a"): [0.0, 1.0, 0.5],
    ("4-8k", "a"): [0.25],
    ("8k+", "b"): [1.0, 0.0],
    ("10k", "b"): [0.75, 0.75],
}


def grouped(
    scores: Mapping[tuple[Value, ...], list[float]], names: tuple[str, ...] = ("length", "kind")
) -> list[Record]:
    return [
        record(f"{group}-{i}", score, extra={"groups": dict(zip(names, group, strict=True))})
        for group, values in scores.items()
        for i, score in enumerate(values)
    ]


def run_of(folder: Path, cells: Mapping[str, Mapping[str, list[Record]]], **tasks: str) -> Run:
    return load_run(write_run(folder, tasks or {"t": "qa_f1"}, cells))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two cells on one task; the second has no sample in 8k+ and other scores."""
    fewer = {group: [1 - score for score in values] for group, values in SCORES.items()}
    del fewer["8k+", "b"]
    return run_of(tmp_path, {"full@1": {"t": grouped(SCORES)}, "h2o@0.5": {"t": grouped(fewer)}})


def by_group(scores: list[GroupScore], cell: str) -> dict[tuple[Value, ...], GroupScore]:
    return {score.group: score for score in scores if score.cell == cell}


# Values


def test_values_stand_in_the_order_of_their_numbers(run: Run) -> None:
    assert group_values(run) == {"length": ["0-4k", "4-8k", "8k+", "10k"], "kind": ["a", "b"]}


def test_numbers_stand_in_their_own_order(tmp_path: Path) -> None:
    records = grouped({(2048,): [1], (512,): [1], (1024,): [1]}, ("length",))
    assert group_values(run_of(tmp_path, {"full@1": {"t": records}})) == {"length": [512, 1024, 2048]}


def test_a_run_without_groups_has_none(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"full@1": {"t": [record("0", 1)]}})
    assert group_values(run) == {}
    assert scores_by(run, ("length",)) == []
    assert group_tables(run) == []


# Scores


def test_a_group_is_scored_over_its_own_samples(run: Run) -> None:
    found = by_group(scores_by(run, ("length",)), "full@1")
    assert {group: (one.n, one.scored.value) for group, one in found.items()} == {
        ("0-4k",): (3, 50.0),
        ("4-8k",): (1, 25.0),
        ("8k+",): (2, 50.0),
        ("10k",): (2, 75.0),
    }


def test_a_cell_without_samples_in_a_group_has_no_score_there(run: Run) -> None:
    assert ("8k+",) not in by_group(scores_by(run, ("length",)), "h2o@0.5")


def test_scores_come_by_task_then_group_then_cell(tmp_path: Path) -> None:
    records = grouped(SCORES)
    cells = ("h2o@0.5", "full@1")
    run = run_of(tmp_path, {cell: {"u": records, "t": records} for cell in cells}, u="qa_f1", t="qa_f1")
    found = [(one.task, one.group[0], one.cell) for one in scores_by(run, ("length",))]
    assert found == list(product(("u", "t"), ("0-4k", "4-8k", "8k+", "10k"), cells))


def test_both_names_together_give_the_groups_that_occur(run: Run) -> None:
    found = by_group(scores_by(run, ("kind", "length")), "full@1")
    assert list(found) == [("a", "0-4k"), ("a", "4-8k"), ("b", "8k+"), ("b", "10k")]
    assert found["b", "8k+"].n == 2


def test_a_sample_without_the_group_is_left_out(tmp_path: Path) -> None:
    records = [
        *grouped({(1, 0): [1.0]}, ("length", "depth")),
        *grouped({(1,): [0.0]}, ("length",)),
        record("none", 0.0),
    ]
    run = run_of(tmp_path, {"full@1": {"t": records}})
    for names, n in {("length",): 2, ("length", "depth"): 1}.items():
        (one,) = scores_by(run, names)
        assert (one.n, one.scored.value) == (n, 100 / n)


def test_seeds_are_averaged_before_samples_are_counted(tmp_path: Path) -> None:
    records = [
        record(name, score, seed=seed, extra={"groups": {"depth": 0}})
        for name, scores in {"x": [1.0, 0.0], "y": [1.0, 1.0]}.items()
        for seed, score in enumerate(scores)
    ]
    (one,) = scores_by(run_of(tmp_path, {"full@1": {"t": records}}), ("depth",))
    assert (one.n, one.scored.value) == (2, 75.0)


def test_a_group_is_scored_by_the_tasks_own_metric(tmp_path: Path) -> None:
    records = [
        record(str(i), 1.0, extra={"nll": nll, "tokens": 1.0, "groups": {"depth": i}})
        for i, nll in enumerate((0.0, 2.0))
    ]
    run = run_of(tmp_path, {"full@1": {"t": records}}, t="perplexity")
    assert [one.scored.value for one in scores_by(run, ("depth",))] == pytest.approx([1.0, np.exp(2)])


def test_cells_are_resampled_alike_within_a_group(tmp_path: Path) -> None:
    better = {group: [score / 2 + 0.25 for score in values] for group, values in SCORES.items()}
    run = run_of(tmp_path, {"full@1": {"t": grouped(SCORES)}, "h2o@0.5": {"t": grouped(better)}})
    full, h2o = (by_group(scores_by(run, ("length",)), cell) for cell in ("full@1", "h2o@0.5"))
    replicates = full["0-4k",].scored.replicates
    assert np.std(replicates) > 0
    np.testing.assert_allclose(h2o["0-4k",].scored.replicates, replicates / 2 + 25)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.floats(0, 1)), max_size=12))
def test_groups_by_hand(samples: list[tuple[int, int, float]]) -> None:
    records = [
        record(str(i), score, extra={"groups": {"x": x, "y": y}})
        for i, (x, y, score) in enumerate(samples)
    ]
    run = Run(
        Path(), {"model": "m", "benchmark": "b"}, {"t": "qa_f1"}, ("a@1",), {("t", "a@1"): records}
    )
    expected = {
        (y, x): [score for one_x, one_y, score in samples if (one_x, one_y) == (x, y)]
        for y in range(3)
        for x in range(4)
    }
    found = {one.group: (one.n, one.scored.value) for one in scores_by(run, ("y", "x"))}
    filled = {group: values for group, values in expected.items() if values}
    assert list(found) == list(filled)
    for group, values in filled.items():
        assert found[group] == (len(values), pytest.approx(100 * np.mean(values)))


def test_a_report_bootstraps_no_samples_twice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, bytes]] = []
    resampled_means = bootstrap.resampled_means

    def counted(task: str, samples: bootstrap.Samples, resamples: int) -> bootstrap.Array:
        ids = "\n".join(samples.ids).encode()
        drawn.extend((task, ids + of_cell.tobytes()) for of_cell in samples.parts.T)
        return resampled_means(task, samples, resamples)

    monkeypatch.setattr(bootstrap, "resampled_means", counted)
    score_table(run)
    difference_table(run)
    group_tables(run)
    scores_by(run, ("kind", "length"))
    assert len(drawn) == len(set(drawn)) > len(run.scores)


# Tables


def table_named(run: Run, name: str) -> Table:
    (table,) = [table for table in group_tables(run) if table.name == name]
    return table


def test_there_is_a_table_for_each_name_and_one_for_both(run: Run) -> None:
    assert [table.name for table in group_tables(run)] == [
        "scores_by_length",
        "scores_by_kind",
        "scores_by_length_and_kind",
    ]


def test_what_is_the_same_everywhere_has_no_table(tmp_path: Path) -> None:
    records = grouped({(512, 0): [1.0], (512, 50): [0.0]}, ("length", "depth"))
    run = run_of(tmp_path, {"full@1": {"t": records}})
    assert [table.name for table in group_tables(run)] == ["scores_by_depth"]


def test_groups_are_rows_and_cells_columns(run: Run) -> None:
    table = table_named(run, "scores_by_length")
    assert table.header == ("task", "length", "n", "prompt tokens", "full@1", "h2o@0.5")
    assert [row[:3] for row in table.rows] == [
        ("t", "0-4k", "3"),
        ("t", "4-8k", "1"),
        ("t", "8k+", "2"),
        ("t", "10k", "2"),
    ]
    assert table.rows[0][4].startswith("50.00\n[")
    assert table.rows[1][3:] == ("100", "25.00", "75.00")


def test_an_empty_group_is_blank_not_zero(run: Run) -> None:
    (row,) = [row for row in table_named(run, "scores_by_length").rows if row[1] == "8k+"]
    assert row[4].startswith("50.00")
    assert row[5] == ""
    both = table_named(run, "scores_by_length_and_kind")
    assert ("t", "0-4k", "b", "0", "", "", "") in both.rows


def test_the_numbers_for_programs_are_tidy(run: Run) -> None:
    frame = table_named(run, "scores_by_length_and_kind").data
    columns = "model benchmark method budget task length kind n prompt_tokens_mean score ci_low ci_high"
    assert " ".join(frame.columns) == columns
    assert len(frame) == 4 + 3
    (row,) = frame[(frame["method"] == "h2o") & (frame["length"] == "4-8k")].to_dict("records")
    assert (row["kind"], row["n"], row["score"]) == ("a", 1, 75.0)
    assert pd.isna(row["ci_low"])


def test_a_length_that_a_limit_left_out_is_named(tmp_path: Path) -> None:
    records = grouped({(512, 0): [1.0], (512, 50): [0.0]}, ("length", "depth"))
    asked = {"lengths": [512, 1024, 2048], "depths": [0, 50]}
    config = {"benchmark": asked, "limit": 2}
    run = load_run(write_run(tmp_path, {"t": "qa_f1"}, {"h2o@0.5": {"t": records}}, config=config))
    assert unsampled(run) == {"length": [1024, 2048]}
    (table,) = group_tables(run)
    assert table.notes == ("No samples of length 1024, 2048: limit=2 ends before.",)


def test_a_run_that_does_not_say_what_was_asked_for_names_nothing(run: Run) -> None:
    assert unsampled(run) == {}


# From a run to its report


def test_a_needle_run_is_reported_by_depth_and_length(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A sentence of this book. " * 20)
    settings = compose(
        "benchmark=needle",
        f"benchmark.source={tmp_path / 'book.txt'}",
        "benchmark.lengths=[300,400]",
        "benchmark.depths=[0,100]",
        "benchmark.repeats=1",
        "cells=[full@1,h2o@0.5]",
        f"model.path={checkpoint}",
        f"output_dir={tmp_path / 'out'}",
    )
    runner.run(settings)
    page = write_report([load_run(settings.output_dir)])
    records = load_run(settings.output_dir).records["number", "full@1"]
    tables = {table.name: table for table in group_tables(load_run(settings.output_dir))}
    for row in tables["scores_by_length"].rows:
        fed = [r.prompt_tokens for r in records if str(r.extra["groups"]["length"]) == row[1]]
        assert row[3] == f"{np.mean(fed):,.0f}"
        assert row[3] != row[1]
    assert [record.extra["groups"] for record in records] == [
        {"length": length, "depth": depth} for length in (300, 400) for depth in (0, 100)
    ]
    written = {path.name for path in settings.output_dir.glob("*/*")}
    for name in ("scores_by_length.csv", "scores_by_length_and_depth.tex", "heat_map_number.png"):
        assert name in written
    assert "Score by depth and length: number" in page.read_text(encoding="utf-8")
