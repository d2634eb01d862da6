"""The gate: the full cache against the published band, and where its verdict is shown."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import binomtest

import harness.report.gates
from harness.report.gates import Gate, Verdict, gates, log_gate, outside, sampled_gates, summary_lines
from harness.report.page import write_report
from harness.report.published import Reference, Source, load_references
from harness.report.run import Run, load_run
from harness.report.tables.published import gate_table, reference_table
from harness.report.tables.scores import score_table
from harness.report.terminal import print_comparison
from harness.results import Results
from harness.runner import run as run_settings
from tests.synthetic_run import record, write_run

REFERENCES = load_references()
BAND = Reference(
    benchmark="longbench",
    model="llama2-7b-chat",
    method="full",
    budget="1",
    task="qasper",
    published="19.2",
    samples=4,
    tolerance=1.0,
    over=(),
    source=Source.OFFICIAL,
    provenance="somewhere",
    note="",
)
CONFIG = {"model": {"dtype": "float32"}, "benchmark": {"data_dir": None, "profile": "official"}}


def a_run(
    folder: Path,
    scores: Mapping[str, float],
    n: int = 4,
    cells: tuple[str, ...] = ("full@1", "h2o@0.5"),
    **info: Any,
) -> Run:
    """A run whose full cell has these scores (0 to 100) on `n` samples a task, other cells half."""
    records = {
        cell: {
            task: [record(str(i), score / 100 / (1 + rank)) for i in range(n)]
            for task, score in scores.items()
        }
        for rank, cell in enumerate(cells)
    }
    settings = {"benchmark": "longbench", "model": "llama2-7b-chat", "config": CONFIG} | info
    write_run(folder, dict.fromkeys(scores, "qa_f1"), records, **settings)
    return load_run(folder)


def only(found: list[Gate]) -> Gate:
    (gate,) = found
    return gate


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        (19.2, Verdict.INSIDE),
        (18.2, Verdict.INSIDE),  # the ends belong to the band
        (20.2, Verdict.INSIDE),
        (18.19, Verdict.OUTSIDE),
        (20.21, Verdict.OUTSIDE),
    ],
)
def test_a_band_holds_its_ends(tmp_path: Path, score: float, verdict: Verdict) -> None:
    gate = only(gates(a_run(tmp_path, {"qasper": score}), [BAND]))
    assert gate.verdict is verdict
    assert gate.ours == pytest.approx(score)
    assert (gate.task, gate.samples, gate.published, gate.reason) == ("qasper", 4, BAND, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 3}, "3 samples run, published on 4"),
        ({"n": 5}, "5 samples run, published on 4"),
        ({"cells": ("h2o@0.5",)}, "no full cell was run"),
        ({"config": {"benchmark": {"profile": "kcf"}}}, "profile kcf, published under official"),
        ({"model": "llama2-13b-chat"}, "no task scores published for llama2-13b-chat"),
    ],
)
def test_what_cannot_be_compared_says_why(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    gate = only(gates(a_run(tmp_path, {"qasper": 19.2}, **changes), [BAND]))
    assert gate.verdict is Verdict.NOT_COMPARABLE
    assert gate.reason == reason


def test_a_number_without_a_band_judges_nothing(tmp_path: Path) -> None:
    gate = only(gates(a_run(tmp_path, {"qasper": 50}), [replace(BAND, tolerance=None)]))
    assert gate.verdict is Verdict.NOT_COMPARABLE
    assert gate.reason == "no band is set for what was read in the authors' repository"


def test_a_number_that_was_only_quoted_is_shown_as_such_and_judges_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"narrativeqa": 5.0, "qasper": 5.0}, model="mistral-7b-instruct-v0.2")
    quoted, unpublished, _ = gates(run, REFERENCES)
    assert quoted.verdict is Verdict.NOT_COMPARABLE
    assert quoted.reason == "no band is set for what was quoted in a review of the paper"
    assert quoted.text == "narrativeqa 5.00 (published 21.96, quoted in a review of the paper)"
    assert unpublished.published is None
    table = gate_table(run, REFERENCES)
    assert table is not None
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert (cells["published"], cells["read in"]) == ("21.96‡", "review")
    assert table.notes[0].startswith("‡: quoted by somebody else")
    assert table.data["source"].fillna("").tolist() == ["review", "", "secondary"]


def test_what_its_authors_published_carries_no_mark(tmp_path: Path) -> None:
    table = gate_table(a_run(tmp_path, {"qasper": 19.2}), [BAND])
    assert table is not None
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert (cells["published"], cells["read in"], table.notes) == ("19.2", "official", ())


def test_other_methods_numbers_judge_nothing(tmp_path: Path) -> None:
    assert gates(a_run(tmp_path, {"qasper": 50}), [replace(BAND, method="h2o")]) == []


def test_rows_from_a_folder_are_compared_with_that_said(tmp_path: Path) -> None:
    config = {"benchmark": {"data_dir": "rows"}}
    gate = only(gates(a_run(tmp_path, {"qasper": 19.2}, config=config), [BAND]))
    assert gate.verdict is Verdict.INSIDE
    assert gate.reason == "rows from rows: only their number was compared"


def test_many_tasks_of_which_nothing_is_published_are_one_line_and_one_row(tmp_path: Path) -> None:
    tasks = ["qasper", "trec", "samsum", "lcc"]
    run = a_run(tmp_path, dict.fromkeys(tasks, 50.0), model="mine")
    unpublished = [gate for gate in gates(run, REFERENCES) if gate.published is None]
    assert [gate.task for gate in unpublished] == tasks
    why = "no task scores published for mine"
    assert (Verdict.NOT_COMPARABLE, f"Gate not comparable, {why}: all 4 tasks.") in summary_lines(
        gates(run, REFERENCES)
    )
    table = gate_table(run, REFERENCES)
    assert table is not None
    assert [row[0] for row in table.rows if row[6] == why] == ["4 tasks"]
    assert list(table.data[table.data.reason == why].task) == tasks


def test_a_benchmark_of_which_nothing_is_published_has_no_gate(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"passkey": 19.2}, benchmark="mini")
    assert gates(run, REFERENCES) == []
    assert gate_table(run, REFERENCES) is None
    assert summary_lines([]) == []


@pytest.mark.parametrize("version", ["v0.1", "v0.2"])
def test_mistrals_average_is_for_orientation(tmp_path: Path, version: str) -> None:
    run = a_run(tmp_path, {"qasper": 30, "trec": 50}, model=f"mistral-7b-instruct-{version}")
    *tasks, average = gates(run, REFERENCES)
    assert {gate.reason for gate in tasks} == {f"no task scores published for {run.model}"}
    assert average.published is not None
    assert (average.task, average.published.published) == ("average", "38.44")
    assert average.ours == pytest.approx(40)
    assert average.verdict is Verdict.NOT_COMPARABLE
    assert average.reason.startswith("for orientation only, benchmark by a review; model version")


def test_an_orientation_needs_every_task(tmp_path: Path) -> None:
    scores = {"qasper": 30.0}
    run = a_run(tmp_path, scores, model="mistral-7b-instruct-v0.2", cells=("h2o@0.5",))
    assert gates(run, REFERENCES)[-1].ours is None


def test_zero_scrolls_judges_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"qasper": 1.0}, benchmark="zero_scrolls")
    found = gates(run, REFERENCES)
    assert [gate.task for gate in found] == ["qasper", "average"]
    assert outside(found) == set()
    assert found[1].text == "average 1.00 (published 15.30, quoted by a secondary public source)"


def test_every_longbench_task_of_llama2_has_the_documented_band() -> None:
    bands = {r.task: r for r in REFERENCES if r.tolerance is not None}
    assert len(bands) == 21
    wide = {"passage_retrieval_en", "triviaqa"}
    assert {task: r.tolerance for task, r in bands.items()} == {
        task: 2.0 if task in wide else 1.0 for task in bands
    }
    assert {(r.model, r.cell, r.source) for r in bands.values()} == {
        ("llama2-7b-chat", "full@1", Source.OFFICIAL)
    }
    assert sum(r.samples or 0 for r in bands.values()) == 4750


# Some samples of a task


def some(folder: Path, scores: list[float], **info: Any) -> Run:
    """A run whose full cell has these scores, one a sample, on qasper."""
    records = {"full@1": {"qasper": [record(str(i), each / 100) for i, each in enumerate(scores)]}}
    settings = {"benchmark": "longbench", "model": "llama2-7b-chat", "config": CONFIG} | info
    write_run(folder, {"qasper": "qa_f1"}, records, **settings)
    return load_run(folder)


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ([0, 40] * 10, Verdict.INSIDE),
        ([0, 20] * 10, Verdict.OUTSIDE),  # the highest mean that is possible is about 15
        ([30, 31] * 10, Verdict.OUTSIDE),
        ([0] * 20, Verdict.OUTSIDE),  # 18.2 and more would leave a trace in 20 samples: 16.8 at most
        ([0] * 10, Verdict.INSIDE),  # but not in 10
    ],
)
def test_some_samples_are_outside_only_if_their_interval_leaves_the_band_out(
    tmp_path: Path, scores: list[float], verdict: Verdict
) -> None:
    gate = only(sampled_gates(some(tmp_path, scores), [BAND]))
    assert gate.verdict is verdict, gate.reason
    assert gate.reason.startswith(f"by {len(scores)} samples, whose interval is ")


def test_samples_that_are_all_alike_have_the_exact_binomial_interval(tmp_path: Path) -> None:
    gate = only(sampled_gates(some(tmp_path, [0] * 20), [BAND]))
    exact = binomtest(0, 20).proportion_ci(0.95, method="exact")
    assert gate.reason.endswith(f"is 0.0 to {100 * exact.high:.1f}")


def test_more_tasks_have_wider_intervals_each(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"qasper": 0.0, "trec": 0.0}, n=20)
    found = sampled_gates(run, [BAND, replace(BAND, task="trec")])
    exact = binomtest(0, 20).proportion_ci(0.975, method="exact")
    assert {gate.reason[-4:] for gate in found} == {f"{100 * exact.high:.1f}"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"benchmark": {"profile": "kcf"}}}, "profile kcf, published under official"),
        ({"model": "llama2-13b-chat"}, "no task scores published for llama2-13b-chat"),
        ({"benchmark": "mini"}, "no task scores published for llama2-7b-chat"),
    ],
)
def test_some_samples_without_a_band_of_their_own_judge_nothing(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    gate = only(sampled_gates(some(tmp_path, [0] * 20, **changes), [BAND]))
    assert (gate.verdict, gate.reason) == (Verdict.NOT_COMPARABLE, reason)


def test_one_sample_judges_nothing(tmp_path: Path) -> None:
    gate = only(sampled_gates(some(tmp_path, [0]), [BAND]))
    assert (gate.verdict, gate.reason) == (Verdict.NOT_COMPARABLE, "one sample has no interval")


# What is said of it

INSIDE = Gate("a", 4, 19.0, BAND, Verdict.INSIDE, "")
OUTSIDE = Gate("b", 4, 12.5, BAND, Verdict.OUTSIDE, "")
UNCLEAR = Gate("c", 2, 3.0, BAND, Verdict.NOT_COMPARABLE, "2 samples run, published on 4")


def test_one_line_when_all_are_inside() -> None:
    assert summary_lines([INSIDE, replace(INSIDE, task="d")]) == [
        (Verdict.INSIDE, "Gate: the full cache is inside its published band on a, d.")
    ]


def test_what_is_outside_comes_first_with_its_numbers() -> None:
    verdicts, lines = zip(*summary_lines([UNCLEAR, INSIDE, OUTSIDE]), strict=True)
    assert verdicts == (Verdict.OUTSIDE, Verdict.INSIDE, Verdict.NOT_COMPARABLE)
    assert "OUTSIDE its published band on 1 of 2 tasks" in lines[0]
    assert lines[0].endswith(": b 12.50 (published 19.2 ± 1).")
    assert lines[2] == (
        "Gate not comparable, 2 samples run, published on 4: c 3.00 (published 19.2 ± 1)."
    )


def test_a_reason_is_said_once() -> None:
    lines = summary_lines([UNCLEAR, replace(UNCLEAR, task="d"), replace(UNCLEAR, reason="other")])
    assert [line.partition(":")[0] for _, line in lines] == [
        "Gate not comparable, 2 samples run, published on 4",
        "Gate not comparable, other",
    ]


# Where it is shown


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of three tasks with as many samples as published, one is outside its band."""
    scores = {"passage_count": 2.5, "passage_retrieval_en": 20.0, "lsht": 19.8}
    return a_run(tmp_path_factory.mktemp("mixed"), scores, n=200, cells=("full@1",))


def test_the_console_says_it_before_the_scores(mixed: Run) -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    print_comparison(mixed, console)
    first, second = console.export_text().splitlines()[:2]
    assert "OUTSIDE" in first
    assert "passage_retrieval_en 20.00 (published 9.8 ± 2)" in first
    assert "inside its published band on passage_count, lsht" in second


def test_the_report_opens_with_the_gate(mixed: Run, undrawn: None) -> None:
    page = write_report([mixed]).read_text()
    assert page.index("Gate: does the full cache") < page.index("Scores by task")
    assert "The full cache is outside its published band on passage_retrieval_en" in page
    frame = pd.read_csv(mixed.output_dir / "tables" / "gate.csv").set_index("task")
    assert frame["verdict"].to_dict() == {
        "passage_count": "inside",
        "passage_retrieval_en": "outside",
        "lsht": "inside",
    }
    assert frame.loc["lsht", ["n", "ours", "published", "tolerance"]].tolist() == [200, 19.8, 19.8, 1]


def test_the_gate_table_shows_the_numbers(mixed: Run) -> None:
    table = gate_table(mixed, REFERENCES)
    assert table is not None
    cells = dict(zip(table.header, table.rows[1], strict=True))
    assert cells["task"] == "passage_retrieval_en"
    shown = ("n", "ours", "published", "tolerance", "verdict", "reason")
    assert [cells[name] for name in shown] == ["200", "20.00", "9.8", "2", "outside", ""]
    assert "LongBench/README.md" in cells["source"]


def test_scores_that_count_as_no_reproduction_are_marked(mixed: Run) -> None:
    table = score_table(mixed, REFERENCES)
    assert [row[0] for row in table.rows] == [
        "passage_count",
        "passage_retrieval_en †",
        "lsht",
        "average †",
    ]
    assert table.notes[0].startswith("†: the full cache is outside its published band")
    assert set(table.data["task"]) == {"passage_count", "passage_retrieval_en", "lsht", "average"}


def test_no_mark_without_a_reason(tmp_path: Path) -> None:
    table = score_table(a_run(tmp_path, {"qasper": 19.2}), [BAND])
    assert [row[0] for row in table.rows] == ["qasper", "average"]
    assert not any("†" in note for note in table.notes)


def test_published_numbers_and_official_averages_are_marked_too(mixed: Run) -> None:
    table = reference_table(mixed, REFERENCES)
    assert table is not None
    labels = {row[0] for row in table.rows}
    assert {"passage_retrieval_en †", "category_synthetic †", "average_en †", "lsht"} <= labels
    assert "average_zh" in labels  # passage_retrieval_en is no part of it


def test_another_profile_is_said_beside_the_published_numbers(tmp_path: Path) -> None:
    config = {"benchmark": {"profile": "kcf"}}
    table = reference_table(a_run(tmp_path, {"lsht": 19.8}, config=config), REFERENCES)
    assert table is not None
    assert "Ours is by profile kcf, the published numbers are not." in table.notes


# While a run goes on


@pytest.mark.parametrize(
    ("score", "level", "text"),
    [
        (30, "WARNING", "Gate: qasper 30.00 (published 19.2 ± 1) is outside"),
        (19, "INFO", "Gate: qasper 19.00 (published 19.2 ± 1) is inside"),
    ],
)
def test_a_finished_task_is_logged(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    score: float,
    level: str,
    text: str,
) -> None:
    run = a_run(tmp_path, {"trec": score, "qasper": score})
    other = replace(BAND, task="trec")
    monkeypatch.setattr(harness.report.gates, "load_references", lambda: [BAND, other])
    caplog.set_level(logging.INFO)
    log_gate(run.benchmark, Results(run.output_dir), "qasper")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [(level, text)]


def test_a_run_logs_each_task_as_it_ends(
    tiny: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny("cells=[full@1]", "benchmark.tasks=[qasper,trec]")
    band = replace(BAND, model=settings.model.name, samples=3, published="100")
    monkeypatch.setattr(harness.report.gates, "load_references", lambda: [band])
    caplog.set_level(logging.INFO)
    run_settings(settings, after_task=partial(log_gate, settings.benchmark.name))
    messages = [r.getMessage() for r in caplog.records if r.name == "harness.report.gates"]
    assert len(messages) == 1
    assert messages[0].endswith("(published 100 ± 1) is outside")
