"""The answers at the top of a report: right for any set of cells, and no more than was found."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from harness.judgement import Judgement
from harness.report.answers import Answer, Tone, answers, in_short
from harness.report.export.latex import latex
from harness.report.export.markdown import markdown
from harness.report.missed import missed_budgets, shown_name
from harness.report.run import Run, load_run
from harness.report.tables.scores import score_table
from harness.report.tables.table import Table
from harness.report.terminal import print_comparison
from tests.synthetic_run import record, write_run

KEEPS_UP = "Does KVMerger keep up with the full cache?"
BETTER = "Is KVMerger better than the other methods?"
OPEN = "What cannot be said?"


def scored(scores: list[float], budget: float, kl: float | None = None) -> list:
    return [
        record(str(i), score, budget_achieved=budget, kl_to_full=kl and kl + 0.001 * i)
        for i, score in enumerate(scores)
    ]


def a_run(folder: Path, cells: Mapping[str, list[float]], tasks: int = 2, **kl: float) -> Run:
    """Each cell scores alike on every task; a cell keeps what its name says."""
    names = [f"t{number}" for number in range(tasks)]
    by_cell = {
        cell: {
            task: scored(scores, float(cell.rpartition("@")[2]), kl.get(cell.partition("@")[0]))
            for task in names
        }
        for cell, scores in cells.items()
    }
    return load_run(write_run(folder, dict.fromkeys(names, "qa_f1"), by_cell))


def found(run: Run, margin: float = 1.0) -> dict[str, list[tuple[Tone, str]]]:
    return {
        answer.question: [(line.tone, line.text) for line in answer.lines]
        for answer in answers(run, Judgement(margin))
    }


HIGH, LOW = [0.9, 1.0] * 12, [0.1, 0.2] * 12


def test_a_method_that_is_behind_is_said_to_be_with_its_interval(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"full@1": HIGH, "kvmerger@0.5": LOW, "h2o@0.5": LOW, "cam@0.5": HIGH})
    said = found(run)
    (tone, text), *_ = said[KEEPS_UP]
    assert tone is Tone.BEHIND
    assert text.startswith("KVMerger at 50%: −80.0 points [−80.0, −80.0]; behind, adjusted p")
    assert (Tone.BEHIND, "Of the other methods: H2O at 50% −80.0 points [−80.0, −80.0].") in said[
        KEEPS_UP
    ]
    by_other = {text.partition(":")[0]: tone for tone, text in said[BETTER]}
    assert by_other == {"At 50% against H2O": Tone.EQUAL, "At 50% against CaM": Tone.BEHIND}
    assert in_short(run, Judgement()) == (
        "On the average KVMerger is behind the full cache (at 50%) and CaM (at 50%); it is equivalent "
        "to H2O (at 50%)."
    )


def test_the_tasks_are_named_on_which_it_is_better_and_behind(tmp_path: Path) -> None:
    cells = {
        "kvmerger@0.5": {"a": scored(HIGH, 0.5), "b": scored(LOW, 0.5), "c": scored(HIGH, 0.5)},
        "h2o@0.5": {
            "a": scored(LOW, 0.5),
            "b": scored(HIGH, 0.5),
            "c": scored(LOW[::-1] + HIGH[24:], 0.5),
        },
    }
    run = load_run(write_run(tmp_path, dict.fromkeys("abc", "qa_f1"), cells))
    ((tone, text),) = found(run)["On which tasks?"]
    assert tone is Tone.NOTE
    assert text.startswith("KVMerger at 50% against H2O: better on a (+80.0 points")
    assert "behind on b (−80.0 points" in text


def test_kl_is_told_where_it_is_resolved(tmp_path: Path) -> None:
    cells = {"full@1": HIGH, "kvmerger@0.5": LOW, "h2o@0.5": LOW}
    run = a_run(tmp_path, cells, kvmerger=0.25, h2o=0.75)
    tone, text = found(run)[BETTER][-1]
    assert tone is Tone.BETTER
    assert text == "At 50%, by KL: closer to the full cache than H2O (−0.500 nats [−0.500, −0.500])."


def test_an_unresolved_contrast_says_how_many_samples_would_tell(tmp_path: Path) -> None:
    mixed = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    run = a_run(tmp_path, {"kvmerger@0.5": mixed, "h2o@0.5": mixed[::-1]})
    tone, text = found(run)[BETTER][0]
    assert tone is Tone.OPEN
    assert "not resolved, adjusted p" in text
    assert "samples would tell (now 20)" in text
    assert any(
        "Unresolved are 1 of 1 contrasts: KVMerger at 50% against H2O (" in t
        for _, t in found(run)[OPEN]
    )


def test_without_a_full_cache_nothing_is_said_of_what_compression_costs(tmp_path: Path) -> None:
    ((tone, text),) = found(a_run(tmp_path, {"kvmerger@0.5": HIGH, "h2o@0.5": LOW}))[KEEPS_UP]
    assert tone is Tone.UNKNOWN
    assert "no full cache" in text


def test_one_sample_gives_no_interval_and_no_verdict(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"full@1": [1.0], "kvmerger@0.5": [0.0]})
    ((tone, text),) = found(run)[KEEPS_UP]
    assert tone is Tone.UNKNOWN
    assert text == "KVMerger at 50%: −100.0 points; one sample a task, so no interval and no verdict."
    assert found(run)[OPEN][0][1].startswith("One sample gives no interval and no verdict: t0 and t1")


def test_without_kvmerger_every_method_is_asked_about(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"full@1": HIGH, "h2o@0.5": LOW, "cam@0.5": HIGH})
    said = found(run)
    assert [tone for tone, _ in said["Does any method keep up with the full cache?"]] == [
        Tone.BEHIND,
        Tone.EQUAL,
    ]
    ((_, text),) = said["Which method is better at the same budget?"]
    assert text.startswith("H2O at 50% against CaM: −80.0 points")


def test_a_perplexity_is_answered_in_its_own_unit(tmp_path: Path) -> None:
    def lines(nll: float, budget: float) -> dict:
        parts = [{"nll": nll + i, "tokens": 10} for i in range(8)]
        return {
            "text": [record(str(i), 0.0, extra=p, budget_achieved=budget) for i, p in enumerate(parts)]
        }

    cells = {"full@1": lines(10, 1.0), "kvmerger@0.5": lines(20, 0.5)}
    run = load_run(write_run(tmp_path, {"text": "perplexity"}, cells))
    ((tone, text),) = found(run)[KEEPS_UP]
    assert tone is Tone.BEHIND
    assert "points" not in text
    assert " on text; behind" in text


def test_a_run_without_records_or_with_one_cell_is_answered_too(tmp_path: Path) -> None:
    empty = load_run(write_run(tmp_path / "a", {"t": "qa_f1"}, {"full@1": {}, "h2o@0.5": {}}))
    assert found(empty)[OPEN][0][1] == "Nothing: the run has no record yet."
    assert "there is no average" in found(empty)["Does H2O keep up with the full cache?"][0][1]
    alone = a_run(tmp_path / "b", {"full@1": HIGH})
    assert in_short(alone, Judgement()) == ""
    assert all(isinstance(answer, Answer) and answer.lines for answer in answers(alone, Judgement()))


@pytest.fixture
def missing(tmp_path: Path) -> Run:
    """h2o was asked for 35% and kept half; cam kept 35.3% where 35% was asked."""
    lines = {"h2o@0.35": 0.5, "cam@0.35": 0.353, "kvmerger@40": 0.6}
    cells = {
        cell: {"t": [record(str(i), 0.5, budget_achieved=kept, kept_entries=60.0) for i in range(4)]}
        for cell, kept in lines.items()
    }
    return load_run(write_run(tmp_path, {"t": "qa_f1"}, cells))


def test_a_missed_budget_is_marked_wherever_the_cell_s_name_stands(missing: Run) -> None:
    assert missed_budgets(missing) == {"h2o@0.35": "kept 50%", "kvmerger@40": "kept 60 entries"}
    assert shown_name(missing, "h2o@0.35") == "h2o@0.35 (kept 50%)"
    text = markdown(score_table(missing).of(missing))
    assert "| h2o@0.35 (kept 50%) | cam@0.35 | kvmerger@40 (kept 60 entries) |" in text
    assert "- h2o@0.35 (kept 50%): not the budget in its name" in text
    said = " ".join(text for lines in found(missing).values() for _, text in lines)
    assert "h2o@0.35 (kept 50%): not the budget in its name" in said


def test_a_missed_budget_is_told_in_print_and_on_the_terminal(missing: Run) -> None:
    assert re.search(r"H2O\W+kept\W+50\\%", latex(score_table(missing).of(missing)))
    console = Console(width=100, record=True, file=io.StringIO())
    print_comparison(missing, console)
    text = console.export_text()
    assert "(kept 50%)" in text.split("average")[0]
    assert "h2o@0.35 (kept 50%): not the budget in its name" in text


def test_averages_come_first_where_a_table_is_read(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"full@1": HIGH, "h2o@0.5": LOW})
    read = score_table(run).as_read()
    assert [row[0] for row in read.rows] == ["average", "t0", "t1"]
    assert read.averages == (0,)


def test_a_cell_that_met_its_budget_is_not_marked(tmp_path: Path) -> None:
    run = a_run(tmp_path, {"full@1": HIGH, "h2o@0.35": LOW})
    assert missed_budgets(run) == {}
    table: Table = score_table(run)
    assert table.of(run).as_read().header == table.header
