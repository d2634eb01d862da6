from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.judgement import FlipRule
from harness.report.export.latex import latex
from harness.report.export.latex_text import breakable, escape, numeric, width
from harness.report.export.tables import write_table
from harness.report.published import load_references
from harness.report.ranks import Mark
from harness.report.run import Run, load_run
from harness.report.tables.budgets import budget_table
from harness.report.tables.contrasts import contrast_by_task_table, contrast_table
from harness.report.tables.flips import flip_table, property_table, rate_table, shared_table
from harness.report.tables.lengths import length_by_task_table, length_table
from harness.report.tables.published import gate_table, reference_table
from harness.report.tables.runs import runs_table
from harness.report.tables.scores import difference_table, group_tables, score_table
from harness.report.tables.table import Table
from tests.synthetic_run import record, write_run

CELLS = ["full@1", "kvmerger@0.5", "h2o@0.5", "cam@0.5", "kvmerger@0.35", "h2o@0.35", "cam@0.35"]
MANY = [
    *CELLS,
    *(f"{method}@0.5" for method in ("kvmerger_sized", "snapkv", "pyramidkv")),
    *(f"{method}@0.35" for method in ("kvmerger:sigma=mean_distance", "kvmerger:top=0.1", "snapkv")),
    "kvmerger:budget_mode=eps_layer,thresholds=a_file_of_thresholds_with_a_very_long_name.json@0.35",
    "meanpool_chunks@0.35",
]
_LONGBENCH = (
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader gov_report "
    "qmsum multi_news vcsum trec triviaqa samsum lsht passage_count passage_retrieval_en "
    "passage_retrieval_zh lcc repobench-p"
)
LONGBENCH = _LONGBENCH.split()
HOSTILE = [
    r"\input{/etc/passwd}",
    r"$x^2$ & 100 % {of} #1 ~ _^",
    "[x] starts like an argument",
    "*",
    "任务",
    "<b>|'\"`—“",
    "tab\tand\nnewline\x00",
    "é" * 90,
    "x" * 120,
    "--- -- ?` !`",
]

needs_pdflatex = pytest.mark.skipif(
    shutil.which("pdflatex") is None,
    reason="no pdflatex (apt-get install texlive-latex-base texlive-latex-recommended)",
)


def made(folder: Path, tasks: Sequence[str], cells: Sequence[str], n: int = 3, **info: str) -> Run:
    draw = np.random.default_rng(7)
    records = {
        cell: {
            task: [
                record(
                    str(i),
                    float(draw.uniform()),
                    kl_to_full=None if cell == "full@1" else float(draw.uniform()),
                    merged_tokens=12.5,
                    evicted_tokens=30.0,
                    size_bytes=1_000_000,
                    decode_seconds=1.25,
                    extra={"groups": {"length": ["0-4k", "4-8k"][i % 2]}},
                )
                for i in range(n)
            ]
            for task in tasks
        }
        for cell in cells
    }
    return load_run(write_run(folder, dict.fromkeys(tasks, "qa_f1"), records, **info))


def all_tables(run: Run) -> list[Table]:
    references = load_references()
    tables = [
        gate_table(run, references),
        score_table(run, references),
        difference_table(run),
        contrast_table(run, 1.0),
        contrast_by_task_table(run, 1.0),
        *group_tables(run),
        flip_table(run, FlipRule()),
        shared_table(run, FlipRule()),
        property_table(run, FlipRule()),
        rate_table(run, FlipRule()),
        length_table(run),
        length_by_task_table(run),
        budget_table(run),
        reference_table(run, references),
        runs_table([run, run]),
    ]
    return [table for table in tables if table is not None]


def compile_tex(folder: Path, texts: Iterable[str], paper: str) -> str:
    """Compile tables in one document with nothing but the packages that they name; return the log."""
    texts = list(texts)
    (folder / "all.tex").write_text("\n\\clearpage\n".join(texts), encoding="utf-8")
    packages = dict.fromkeys(text.split("\n")[0].removeprefix("% ") for text in texts)
    lines = [rf"\documentclass[{paper}]{{article}}", r"\usepackage[margin=1in]{geometry}", *packages]
    document = [*lines, r"\begin{document}", r"\input{all}", r"\end{document}"]
    (folder / "main.tex").write_text("\n".join(document), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main.tex"]
    for _ in range(2):  # tables over pages know their widths the second time
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120)
        log = (folder / "main.log").read_text(encoding="utf-8", errors="replace")
        assert done.returncode == 0, log[-2000:]
    return log


def complaints(log: str) -> list[str]:
    found = re.findall(r"Overfull .*|.*Float too large.*|.*multiply defined.*|.*undefined.*", log)
    return [*found, *re.findall(r"Missing character.*", log)]


@needs_pdflatex
@pytest.mark.parametrize(
    ("tasks", "cells", "info"),
    [
        (["passkey", "passage_retrieval", "code_completion"], CELLS, {}),
        (LONGBENCH, MANY, {"benchmark": "longbench", "model": "llama2-7b-chat"}),
        (["passkey"], ["h2o@0.5"], {}),
        ([f"{place}" for place in range(60)], CELLS[:3], {}),
    ],
    ids=["seven cells", "21 tasks and 14 cells", "one cell", "60 tasks"],
)
def test_every_table_compiles_and_fits_the_page(
    tmp_path: Path, tasks: list[str], cells: list[str], info: dict[str, str]
) -> None:
    run = made(tmp_path / "run", tasks, cells, **info)
    for table in all_tables(run):
        write_table(table, tmp_path)
    texts = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("*.tex"))]
    for paper in ("a4paper", "letterpaper"):
        assert complaints(compile_tex(tmp_path, texts, paper)) == []


@needs_pdflatex
def test_hostile_texts_compile_and_fit_the_page(tmp_path: Path) -> None:
    def of(rows: Iterable[tuple[str, ...]], **fields: object) -> Table:
        table = Table(
            "x", HOSTILE[1], " ".join(HOSTILE), ("task", "[n]"), tuple(rows), (), pd.DataFrame()
        )
        return replace(table, **fields)  # type: ignore[arg-type]

    tables = [
        of(((text, "1.00\n[-0.50, 2.00]") for text in HOSTILE), subject=HOSTILE[0]),
        of(((text, text) for text in HOSTILE), notes=tuple(HOSTILE), name="y"),
        of((("a", text) for text in HOSTILE), header=("*", HOSTILE[7]), name="z"),
    ]
    assert complaints(compile_tex(tmp_path, map(latex, tables), "a4paper")) == []


@needs_pdflatex
@pytest.mark.parametrize("size", [7, 8, 9, 10])
def test_widths_are_those_of_latex(tmp_path: Path, size: int) -> None:
    text = "KVMerger passage_retrieval_en [-12.34, 56.78] <50%> Grüße"
    lines = [
        r"\documentclass{article}\begin{document}",
        rf"\fontsize{{{size}}}{{12}}\selectfont\settowidth{{\dimen0}}{{{numeric(text)}}}",
        r"\typeout{WIDTH \the\dimen0}",
        r"\end{document}",
    ]
    (tmp_path / "m.tex").write_text("\n".join(lines), encoding="utf-8")
    subprocess.run(["pdflatex", "-interaction=batchmode", "m.tex"], cwd=tmp_path, capture_output=True)
    found = re.search(r"WIDTH ([\d.]+)pt", (tmp_path / "m.log").read_text(errors="replace"))
    assert found
    assert width(text, size) == pytest.approx(float(found[1]), rel=0.03)


@pytest.fixture
def scores(tmp_path: Path) -> Table:
    return score_table(made(tmp_path, ["passkey", "quotation"], CELLS))


def body(text: str) -> list[str]:
    return text.split("\\toprule\n")[1].split("\\bottomrule")[0].splitlines()


def test_budgets_span_their_methods_below_which_names_stand(scores: Table) -> None:
    over, rule, names, *_ = body(latex(scores, intervals=False))
    assert over == r" &  &  & \multicolumn{3}{c}{50\%} & \multicolumn{3}{c}{35\%} \\"
    assert rule == r"\cmidrule(lr){4-6}\cmidrule(lr){7-9}"
    assert names.startswith("task & n & ")
    assert names.endswith(r"KVMerger & H2O & CaM & KVMerger & H2O & CaM \\")


def test_cells_stand_by_budget_in_whatever_order_they_were_run(tmp_path: Path) -> None:
    table = score_table(made(tmp_path, ["t"], ["h2o@0.35", "h2o@0.5", "full@1", "cam@0.35"]))
    over, _, names, _, row, *_ = body(latex(table, intervals=False))
    assert re.findall(r"\{(\d)\}\{c\}\{(\d+)", over) == [("2", "35"), ("1", "50")]
    assert names.count("H2O & CaM & H2O") == 1
    values = {
        cell: table.rows[0][2 + place].split("\n")[0] for place, cell in enumerate(table.header[2:])
    }
    printed = row.removesuffix(r" \\").split(" & ")[2:]
    assert sorted(printed) == sorted(values.values())
    at = printed.index(values["cam@0.35"])
    assert printed[at - 1 : at + 2] == [values[cell] for cell in ("h2o@0.35", "cam@0.35", "h2o@0.5")]


def test_a_rule_stands_before_the_average(scores: Table) -> None:
    lines = body(latex(scores, intervals=False))
    (place,) = [number for number, line in enumerate(lines) if line.startswith("average")]
    assert lines[place - 1] == r"\midrule"


def test_the_caption_is_short_and_the_rest_is_a_note_below(scores: Table) -> None:
    text = latex(scores, intervals=False)
    assert r"\caption{Scores by task, toy-\allowbreak{}1m on toy.}" in text
    assert r"\label{tab:scores-toy-1m-on-toy}" in text
    below = text.split(r"\end{tabular}")[-1]
    assert "average: plain mean over 2 tasks" in re.sub(r"\\allowbreak\{\}", "", below)


def test_intervals_and_what_is_said_of_them_are_in_a_file_of_their_own(
    scores: Table, tmp_path: Path
) -> None:
    write_table(scores, tmp_path)
    without = (tmp_path / "scores.tex").read_text()
    with_intervals = (tmp_path / "scores_intervals.tex").read_text()
    assert "bootstrap" not in without
    assert not re.search(r"\[\d+\.\d+, \d+\.\d+\]", without)
    assert "bootstrap" in with_intervals
    assert len(re.findall(r"\[\d+\.\d+, \d+\.\d+\]", with_intervals)) == 3 * len(CELLS)


def test_a_table_without_columns_of_cells_keeps_its_intervals(tmp_path: Path) -> None:
    run = made(tmp_path / "run", ["t"], CELLS)
    table = contrast_table(run, 1.0)
    assert table
    write_table(table, tmp_path)
    text = (tmp_path / "contrasts.tex").read_text()
    assert r"\kvbelow{r}{" in text
    assert not (tmp_path / "contrasts_intervals.tex").exists()
    assert "KVMerger 50\\%" in text
    assert "kvmerger@" not in text


def test_nothing_is_shrunk_below_seven_points(tmp_path: Path) -> None:
    texts = [latex(table) for table in all_tables(made(tmp_path, LONGBENCH[:4], MANY))]
    sizes = {int(size) for text in texts for size in re.findall(r"\\fontsize\{(\d+)\}", text)}
    assert min(sizes) == 7
    assert not any("resizebox" in text or "scalebox" in text for text in texts)


def test_labels_differ_between_the_tables_of_a_report_and_between_runs(tmp_path: Path) -> None:
    runs = [made(tmp_path / name, ["t"], MANY, model=name) for name in ("one", "two")]
    tables = [table for run in runs for table in all_tables(run) if table.subject]
    texts = [latex(table, intervals=shown) for table in tables for shown in {True, not table.cells}]
    labels = [label for text in texts for label in re.findall(r"\\label\{(.*?)\}", text)]
    assert len(labels) == len(set(labels)) > 2 * len(tables)
    assert all(re.fullmatch(r"tab:[a-z0-9.-]+", label) for label in labels)


def test_a_table_that_is_too_wide_is_split_by_budget_beside_the_full_cache(tmp_path: Path) -> None:
    text = latex(score_table(made(tmp_path, LONGBENCH[:3], MANY)), intervals=False)
    tables = text.split(r"\begin{table}")[1:]
    assert [re.findall(r"\\multicolumn\{\d\}\{c\}\{(\d+)", one) for one in tables] == [["50"], ["35"]]
    assert all("cache" in one.split(r"\midrule")[0] for one in tables)
    assert r"See the note of Table~\ref{tab:scores-toy-1m-on-toy}." in tables[1]
    assert "average: plain mean" in tables[0]
    assert "average: plain mean" not in tables[1]


def test_best_is_bold_and_second_underlined_and_the_note_says_when(scores: Table) -> None:
    marked = replace(scores, marks={(0, 3): Mark.BEST, (0, 4): Mark.SECOND})
    row = next(line for line in body(latex(marked, intervals=False)) if line.startswith("passkey"))
    first, second = (scores.rows[0][column].split("\n")[0] for column in (3, 4))
    assert row.count(rf"\textbf{{{first}}}") == row.count(rf"\underline{{{second}}}") == 1
    assert "Bold: better than each other method at that budget" in latex(marked)
    unmarked = latex(replace(scores, marks={}))
    assert "Bold" not in unmarked
    assert "textbf" not in unmarked


def test_a_column_without_any_text_is_left_out() -> None:
    rows = (("a", "", "1.00"), ("b", "", "2.00"))
    table = Table("x", "X", "c", ("task", "nothing", "value"), rows, (), pd.DataFrame())
    assert body(latex(table))[0] == r"task & value \\"


def test_a_column_that_names_cells_may_have_other_texts() -> None:
    table = Table(
        "x", "X", "c", ("cell",), (("h2o@0.5",), ("all",), ("",)), (), pd.DataFrame(), naming=(0,)
    )
    assert body(latex(table))[2:] == [r"H2O 50\% \\", r"all \\", r" \\"]


def test_a_table_without_rows_has_its_header() -> None:
    table = Table("x", "X", "c", ("task", "n"), (), (), pd.DataFrame())
    assert r"\begin{tabular}" in latex(table)


def test_special_characters_are_escaped_and_unknown_ones_named() -> None:
    assert escape(r"a_b & 5% {x} \y") == r"a\_b \& 5\% \{x\} \textbackslash{}y"
    assert escape("é任--") == "é[U+4EFB]-{}-"
    assert numeric("-1.5\u2009[+2, -3]") == "$-$1.5 [$+$2, $-$3]"


def test_long_words_may_break_after_marks_and_anywhere_after_twelve_letters() -> None:
    assert breakable("a_b cd") == r"a\_\allowbreak{}b cd"
    assert breakable("x" * 13) == "x" * 12 + r"\allowbreak{}x"


def test_a_row_never_reads_as_the_argument_of_the_line_before() -> None:
    table = Table("x", "X", "c", ("task",), (("[a]",), ("*b",)), (), pd.DataFrame())
    assert body(latex(table))[2:] == [r"{}[a] \\", r"{}*b \\"]
