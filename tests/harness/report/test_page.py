from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from benchmarks.metrics import find_metric
from harness.judgement import Judgement
from harness.records import Record
from harness.report.export.markdown import markdown
from harness.report.page import html, main, write_report
from harness.report.plots.by_budget import unaveraged_by_budget
from harness.report.plots.draw import draw_all
from harness.report.plots.style import looks
from harness.report.published import load_references
from harness.report.run import differences, load_run
from harness.report.tables.published import official_aggregates, reference_table
from harness.report.tables.scores import difference_table, score_table
from harness.report.tables.table import Table
from harness.report.terminal import _differences, print_comparison
from tests.shipped import ROOT
from tests.synthetic_run import record, write_run

TASKS = {"qa_x": "qa_f1", "code": "code_sim", "text": "perplexity"}
CELLS = ["full@1", "kvmerger@0.5", "kvmerger:sigma=3@0.35", "h2o@0.5"]


def small_run(folder: Path, **info: str) -> Path:
    """Four cells on three tasks of four samples; h2o has no records on code."""
    cells: dict = {}
    for rank, cell in enumerate(CELLS):
        cells[cell] = {}
        for task in TASKS:
            if (cell, task) == ("h2o@0.5", "code"):
                continue
            kl = None if rank == 0 else 0.1 * rank
            cells[cell][task] = [
                record(
                    str(i),
                    (4 - rank) * i / 12,
                    budget_achieved=float(cell.rpartition("@")[2]) - 0.002 * i,
                    kl_to_full=kl,
                    top1_agreement=kl and 1 - kl,
                    extra={"nll": 10.0 + rank + i, "tokens": 10} if task == "text" else {},
                )
                for i in range(4)
            ]
    return write_run(folder, TASKS, cells, **info)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_run(tmp_path_factory.mktemp("run"))
    assert main([str(folder)]) == 0
    return folder


def column(table: Table, name: str) -> dict[str, str]:
    place = table.header.index(name)
    return {row[0]: row[place] for row in table.rows}


def test_a_report_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys; from harness.report.page import main; main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(small_run(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_one_command_writes_every_file(reported: Path) -> None:
    written = {
        str(path.relative_to(reported))
        for path in reported.rglob("*")
        if path.is_file() and not {"predictions", "every_eval_ever"} & set(path.parts)
    }
    tables = {
        f"tables/{t}.{e}"
        for t in (
            *("scores", "differences", "contrasts", "contrasts_by_task", "budgets"),
            *("flips", "flips_in_common", "lengths", "lengths_by_task"),
        )
        for e in ("md", "csv", "tex")
    } | {"tables/scores_intervals.tex", "tables/differences_intervals.tex"}
    tables |= {"tables/flipped_samples.csv"}
    by_budget = ("average_by_budget", "average_by_memory", "kl_by_budget", "perplexity_text")
    by_task = ("scores_by_task", "flips_by_task")
    drawn = (*by_task, *by_budget, "contrasts_full")
    plots = {f"plots/{p}.{e}" for p in drawn for e in ("png", "pdf")}
    assert written == tables | plots | {"run.json", "summary.csv", "report.html", "card.md"}
    cells = list((reported / "every_eval_ever" / "data").rglob("*.json"))
    assert len(cells) == len(CELLS)


def test_score_table_holds_the_scores_and_blanks(reported: Path) -> None:
    table = score_table(load_run(reported))
    assert table.header == ("task", "n", *CELLS)
    full = column(table, "full@1")
    assert full["qa_x"].split("\n")[0] == "50.00"  # mean of 0, 4, 8, 12 twelfths
    assert full["average"].split("\n")[0] == "50.00"
    assert re.fullmatch(r"50\.00\n\[\d+\.\d\d, \d+\.\d\d\]", full["qa_x"])
    h2o = column(table, "h2o@0.5")
    assert h2o["qa_x"].startswith("12.50\n")
    assert h2o["code"] == ""
    assert h2o["average"] == ""
    notes = " ".join(table.notes)
    assert "no records: h2o@0.5 on code." in notes
    assert "No average for h2o@0.5" in notes
    assert "Not in the average, as it is not a score of 0 to 100: text." in notes


def test_tables_say_which_columns_are_cells_and_which_rows_average(reported: Path) -> None:
    run = load_run(reported)
    scores, differences = score_table(run), difference_table(run)
    assert differences is not None
    assert [scores.header[column] for column in scores.cells] == CELLS
    assert [differences.header[column] for column in differences.cells] == CELLS[1:]
    for table in (scores, differences):
        assert table.subject == "toy-1m on toy"
        assert [table.rows[row][0] for row in table.averages] == ["average"]


def test_every_caption_states_its_setting(reported: Path) -> None:
    for path in sorted((reported / "tables").glob("*.md")):
        text = path.read_text()
        for part in ("toy-1m on toy", "n = 4 samples", "seed 42", "float32", "commit 0123456789"):
            assert part in text, (path.name, part)


def test_a_modified_checkout_is_named(tmp_path: Path) -> None:
    folder = small_run(tmp_path)
    info = json.loads((folder / "run.json").read_text())
    info["git"]["dirty"] = True
    (folder / "run.json").write_text(json.dumps(info))
    assert "commit 0123456789 with local changes" in score_table(load_run(folder)).caption


def test_differences_are_to_the_full_cell(reported: Path) -> None:
    table = difference_table(load_run(reported))
    assert table is not None
    assert table.header == ("task", "pairs", *CELLS[1:])
    assert column(table, "kvmerger@0.5")["qa_x"].startswith("-12.50\n")
    assert column(table, "h2o@0.5")["code"] == ""
    frame = pd.read_csv(reported / "tables" / "differences.csv")
    row = frame[(frame["method"] == "kvmerger") & (frame["task"] == "average")].iloc[0]
    assert row["difference"] == pytest.approx(-12.5)
    assert row["ci_low"] <= -12.5 <= row["ci_high"]
    assert row["minus"] == "full@1"


def test_without_a_full_cell_there_is_no_difference_table(tmp_path: Path) -> None:
    write_run(tmp_path, {"t": "qa_f1"}, {"h2o@0.5": {"t": [record("0", 0.5)]}})
    assert difference_table(load_run(tmp_path)) is None


def test_budget_table_in_numbers(reported: Path) -> None:
    frame = pd.read_csv(reported / "tables" / "budgets.csv").set_index(["method", "budget"])
    row = frame.loc[("kvmerger", 0.5)]
    assert row["budget_achieved_mean"] == pytest.approx(0.497)
    assert row["budget_achieved_min"] == pytest.approx(0.494)
    assert row["budget_achieved_max"] == pytest.approx(0.5)
    assert (row["kv_bytes"], row["kv_bytes_full"]) == (1000, 2000)
    assert row["kl_to_full"] == pytest.approx(0.1)
    assert row["top1_agreement"] == pytest.approx(0.9)
    assert frame.loc[("h2o", 0.5), "tasks"] == 2
    assert pd.isna(frame.loc[("full", 1.0), "kl_to_full"])


def test_a_run_without_any_record_is_all_blank(tmp_path: Path) -> None:
    write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {}, "h2o@0.5": {}})
    page = write_report([load_run(tmp_path)]).read_text()
    assert "no records: full@1, h2o@0.5 on t." in page
    assert "data:image" not in page
    assert "Nothing: the run has no record yet." in page
    assert (tmp_path / "summary.csv").read_text().count("\n") == 1


def test_unequal_samples_are_pointed_out(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        {"t": "qa_f1"},
        {
            "full@1": {"t": [record("0", 0.5), record("1", 0.5)]},
            "h2o@0.5": {"t": [record("0", 0.5)]},
        },
    )
    table = score_table(load_run(tmp_path))
    assert column(table, "n") == {"t": "1 to 2", "average": ""}
    assert "different samples (n = 1 to 2)" in " ".join(table.notes)


class Page(HTMLParser):
    """Collects what a browser would have to load, and the texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("link", "iframe", "object", "embed"):
            self.loads.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_self_contained(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    page = Page(text)
    assert len(page.loads) == 7
    assert all(load.startswith("data:image/png;base64,iVBOR") for load in page.loads)
    assert "url(" not in (Path(html.__file__).parent / "page.css").read_text()
    assert "50.00" in page.texts
    assert "decode_policy" in "".join(page.texts)
    assert "packages.torch" in page.texts
    assert "2.13.0" in page.texts


def test_the_page_escapes_what_a_run_says(tmp_path: Path, undrawn: None) -> None:
    small_run(tmp_path, model="<script>alert(1)</script>")
    page = write_report([load_run(tmp_path)]).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_reports_of_one_run_are_equal_byte_for_byte(reported: Path, tmp_path: Path) -> None:
    write_report([load_run(reported)], tmp_path / "again")
    again = dict(digests(tmp_path / "again"))
    assert {"report.html", "tables/scores.tex", "plots/scores_by_task.pdf"} <= again.keys()
    assert again.items() <= dict(digests(reported)).items()


def test_several_runs_get_a_section_each_and_a_common_table(tmp_path: Path, undrawn: None) -> None:
    first = small_run(tmp_path / "one")
    second = small_run(tmp_path / "two", model="another")
    third = small_run(tmp_path / "three")
    out = tmp_path / "out"
    assert main([str(first), str(second), str(third), "--out", str(out), "--separate"]) == 0
    assert {path.name for path in (out / "tables").iterdir()} == {
        "runs.md",
        "runs.csv",
        "runs.tex",
        "toy-toy-1m-1",
        "toy-another",
        "toy-toy-1m-2",
    }
    assert (out / "plots" / "toy-another" / "scores_by_task.png").exists()
    frame = pd.read_csv(out / "tables" / "runs.csv")
    assert frame.groupby("output_dir").size().tolist() == [11, 11, 11]
    assert set(frame["model"]) == {"toy-1m", "another"}
    text = (out / "report.html").read_text()
    assert text.count("<section") == 4  # with that of all runs
    assert all((folder / "summary.csv").exists() for folder in (first, second, third))
    assert not (first / "tables").exists()


def test_an_output_dir_given_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_run(tmp_path)
    assert main([str(folder), str(folder / ".." / folder.name)]) == 2
    assert "given twice" in capsys.readouterr().err


def test_a_user_error_is_one_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "no run.json" in printed.err
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    assert printed.out == ""


LONGBENCH_EN = [
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
]


def longbench(folder: Path, tasks: list[str], model: str = "llama2-7b-chat") -> Path:
    """Task number k scores k in the full cell, and k + 1 with KVMerger."""
    cells = {
        cell: {task: [record("0", (k + more) / 100)] for k, task in enumerate(tasks)}
        for more, cell in enumerate(("full@1", "kvmerger@0.5"))
    }
    tasks_metric = dict.fromkeys(tasks, "qa_f1")
    return write_run(folder, tasks_metric, cells, benchmark="longbench", model=model)


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    run = load_run(longbench(tmp_path, LONGBENCH_EN))
    table = reference_table(run, load_references())
    assert table is not None
    rows = {(row[0], row[1], row[4]): row for row in table.rows}
    assert rows["qasper", "full@1", "official"][3:7] == ("19.2", "official", "1.00", "-18.20")
    assert rows["triviaqa", "kvmerger@0.5", "secondary"][3:7] == (
        "83.62‡",
        "secondary",
        "11.00",
        "-72.62",
    )
    assert rows["qasper", "full@1", "secondary"][3:7] == ("", "secondary", "1.00", "")
    assert rows["trec", "h2o@0.5", "secondary"][5:7] == ("", "")  # this run has no such cell
    nine = [4, 6, 0, 13, 2, 9, 8, 10, 1]
    assert rows["average", "kvmerger@0.5", "secondary"][5] == f"{sum(nine) / 9 + 1:.2f}"
    assert rows["average_zh", "full@1", "official"][5] == ""  # its Chinese tasks were not run
    assert all(row[7] for row in table.rows)
    assert any(note.startswith("‡: quoted") for note in table.notes)
    assert "review: quoted in a review of the paper" in table.caption
    marked = {row[4] for row in table.rows if row[3].endswith("‡")}
    assert marked == {"review", "secondary"}


def test_the_official_average_is_of_category_means(tmp_path: Path) -> None:
    run = load_run(longbench(tmp_path, LONGBENCH_EN))
    found = official_aggregates(run, load_references())
    assert list(found) == ["average_en"]
    # Categories in the order of the tasks: 3 of three, then few-shot, synthetic and code.
    categories = [1, 4, 7, 10, 12.5, 14.5]
    assert found["average_en"]["full@1"].value == pytest.approx(sum(categories) / 6)
    table = score_table(run, load_references())
    assert column(table, "full@1")["average_en"] == f"{sum(categories) / 6:.2f}"
    assert column(table, "full@1")["average"] == "7.50"


def test_an_official_average_needs_all_its_tasks(tmp_path: Path) -> None:
    run = load_run(longbench(tmp_path, LONGBENCH_EN[:-1]))
    assert official_aggregates(run, load_references()) == {}


def test_another_models_numbers_are_shown_without_a_difference(tmp_path: Path) -> None:
    run = load_run(longbench(tmp_path, ["qasper"], model="smollm2-135m"))
    table = reference_table(run, load_references())
    assert table is not None
    (row,) = [row for row in table.rows if row[:2] == ("qasper", "kvmerger@0.5")]
    assert row[2:7] == ("llama2-7b-chat", "20.04‡", "secondary", "1.00", "")
    assert "the models differ" in table.notes[0]


def test_a_benchmark_without_published_numbers_has_no_such_table(reported: Path) -> None:
    assert reference_table(load_run(reported), load_references()) is None


def test_the_console_shows_scores_average_and_budget(reported: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_comparison(load_run(reported), console)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["qa_x", "50.00", "37.50", "25.00", "12.50"] in lines
    assert ["code", "50.00", "37.50", "25.00"] in lines
    assert ["average", "50.00", "37.50", "25.00"] in lines
    assert ["achieved", "budget", "0.997", "0.497", "0.347", "0.497"] in lines


def test_a_narrow_console_gets_blocks_and_loses_nothing(reported: Path) -> None:
    console = Console(width=48, record=True, file=io.StringIO())
    print_comparison(load_run(reported), console)
    text = console.export_text()
    assert all(number in text for number in ("50.00", "37.50", "25.00", "12.50"))
    assert "…" not in text
    assert text.count("average") == 2


def test_the_console_says_how_far_each_cell_is_from_the_full_cache(tmp_path: Path) -> None:
    def lines(*scores: float) -> list[Record]:
        return [record(str(i), score) for i, score in enumerate(scores)]

    cells = {"full@1": {"t": lines(1, 1, 1, 0)}, "h2o@0.5": {"t": lines(1, 0, 1, 0)}}
    run = load_run(write_run(tmp_path / "both", {"t": "qa_f1"}, cells))
    ((text,),) = [figure.by_cell.values() for figure in _differences(run)]
    shown = differences(run, "full@1")[-1].scored.estimate()
    assert text == f"-25.00\n[{shown.low:.2f}, {shown.high:.2f}]"
    assert shown.low < -25 < shown.high
    console = Console(width=60, record=True, file=io.StringIO())
    print_comparison(run, console)
    assert f"[{shown.low:.2f}, {shown.high:.2f}]" in console.export_text()
    alone = load_run(write_run(tmp_path / "alone", {"t": "qa_f1"}, {"h2o@0.5": cells["h2o@0.5"]}))
    print_comparison(alone, console)
    assert "difference" not in console.export_text()


def test_what_has_no_average_has_a_difference_of_its_own(reported: Path) -> None:
    average, text = _differences(load_run(reported))
    assert set(average.by_cell) == {"kvmerger@0.5", "kvmerger:sigma=3@0.35"}  # h2o lacks a task
    assert text.label.startswith("text, difference")
    assert set(text.by_cell) == set(CELLS[1:])


def test_many_cells_stand_in_rows_where_the_tasks_fit_beside_each_other(tmp_path: Path) -> None:
    cells = {f"h2o@0.{n}": {"t": [record("0", n / 10, budget_achieved=n / 10)]} for n in range(1, 9)}
    run = write_run(tmp_path, {"t": "qa_f1"}, cells)
    console = Console(width=80, record=True, file=io.StringIO())
    print_comparison(load_run(run), console)
    lines = [line.split() for line in console.export_text().splitlines()]
    for n in range(1, 9):
        assert [f"h2o@0.{n}", f"{10 * n}.00", f"{10 * n}.00", f"{n / 10:.3f}"] in lines


def test_a_perplexity_is_drawn_against_the_budget_and_has_no_average(tmp_path: Path) -> None:
    def line(nll: float, budget: float) -> list[Record]:
        parts = {"nll": nll, "tokens": 10}
        return [record("0", 0.0, budget_achieved=budget, extra=parts)]

    cells = {"full@1": {"t": line(10, 1)}, "h2o@0.5": {"t": line(20, 0.5)}}
    run = write_run(tmp_path, {"t": "perplexity"}, cells)
    console = Console(width=100, record=True, file=io.StringIO())
    print_comparison(load_run(run), console)
    text = console.export_text()
    assert "2.72" in text
    assert "7.39" in text
    assert "average" not in text
    assert "Scores 0 to 100" not in text
    drawn = draw_all(load_run(run), looks([load_run(run)]), Judgement())
    plots = {plot.name: plot for plot in drawn.plots}
    assert "average_by_budget" not in plots
    assert plots["perplexity_t"].title == "Perplexity of t against budget"
    assert plots["perplexity_t"].caption.startswith("Perplexity of t, lower is better: toy-1m on toy")


def test_any_metric_without_an_average_is_drawn_by_its_own_name(tmp_path: Path) -> None:
    cells = {"full@1": {"t": [record("0", 0.5)]}, "h2o@0.5": {"t": [record("0", 0.25)]}}
    run = load_run(write_run(tmp_path, {"t": "qa_f1"}, cells))
    run.__dict__["metrics"] = {"t": replace(find_metric("qa_f1"), name="bits", averaged=False)}
    (plot,) = unaveraged_by_budget(run, looks([run]))
    assert (plot.name, plot.title) == ("bits_t", "Bits of t against budget")
    assert plot.caption.startswith("Bits of t, higher is better: ")


def test_answers_that_are_withheld_have_no_picture(tmp_path: Path) -> None:
    cells = {"full@1": {"t": [record("0", 0.5)]}, "h2o@0.5": {"t": [record("0", 0.25)]}}
    run = load_run(write_run(tmp_path, {"t": "unscored"}, cells))
    assert unaveraged_by_budget(run, looks([run])) == []


TABLE = Table(
    name="x",
    title="A_B",
    caption="100 % & more",
    header=("task", "n"),
    rows=(("a|b_c", "1.00\n[0.50, 2.00]"), ("d", "")),
    notes=("note #1",),
    data=pd.DataFrame(),
)


def test_markdown_keeps_its_columns() -> None:
    lines = markdown(TABLE).splitlines()
    assert "| a\\|b_c | 1.00 [0.50, 2.00] |" in lines
    assert "| --- | ---: |" in lines
    assert "| d |  |" in lines
    assert "- note #1" in lines


def test_a_setting_is_read_at_its_place_and_one_that_is_not_recorded_is_left_out(
    tmp_path: Path,
) -> None:
    info = {"dtype": None, "git": None, "config": {"deep": {"dtype": "float16", "commit": "abc"}}}
    run = load_run(small_run(tmp_path, **info))
    assert run.recorded("config", "deep", "dtype") == "float16"
    assert run.recorded("git", "commit") is None
    assert run.recorded("model", "anything") is None
    assert "float16" not in score_table(run).caption
    assert "commit" not in score_table(run).caption


def test_methods_keep_their_look_across_runs(tmp_path: Path) -> None:
    tasks = {"t": "qa_f1"}
    lines = [record("0", 0.5)]
    first = load_run(write_run(tmp_path / "a", tasks, {"h2o@0.5": {"t": lines}}))
    second = load_run(
        write_run(tmp_path / "b", tasks, {"cam@0.5": {"t": lines}, "h2o@0.2": {"t": lines}})
    )
    by_method = looks([first, second])
    assert set(by_method) == {"full", "h2o", "cam"}
    assert len({look.colour for look in by_method.values()}) == 3
    assert len({look.marker for look in by_method.values()}) == 3
