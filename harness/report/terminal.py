"""The comparison as it is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from harness.judgement import FlipRule, Judgement
from harness.report.columns import COLUMNS
from harness.report.contrasts import AVERAGE, contrasts
from harness.report.flips import TOTAL, counts
from harness.report.gates import Verdict, gates, summary_lines
from harness.report.missed import missed_budgets, shown_name
from harness.report.noise import Floor, find_floor
from harness.report.published import load_references
from harness.report.run import Run, averages, differences
from harness.report.tables.contrasts import WITHIN_NOISE, verdict_text
from harness.report.tables.noise import IN_FILES_ALONE, noise_tables, notes
from harness.report.words import gaps, setting, task_label
from kvmerge.names import parse_name

_LABEL_WIDTH = 22
_COLUMN_WIDTH = 12
_CONTRASTS = 10
_GATE_STYLE = {
    Verdict.OUTSIDE: "bold red",
    Verdict.INSIDE: "green",
    Verdict.NOT_COMPARABLE: "yellow",
}


def print_comparison(run: Run, console: Console, judgement: Judgement | None = None) -> None:
    """Print the gates, the scores, and which of the methods at a budget is better on the average.

    Rows are tasks unless the cells do not fit beside each other and the tasks do; where neither fits,
    further cells follow in further blocks.

    Args:
        run: what was answered.
        console: where it is printed.
        judgement: which differences count; None: what the run was given.
    """
    judgement = judgement or run.judgement
    for verdict, line in summary_lines(gates(run, load_references())):
        console.print(line, style=_GATE_STYLE[verdict], highlight=False)
    figures = _figures(run, judgement.flips)
    fit = max(1, (console.width - _LABEL_WIDTH) // _COLUMN_WIDTH)
    if len(run.cells) > fit >= len(figures):
        console.print(_by_cell(run, figures))
    else:
        for start in range(0, len(run.cells), fit):
            console.print(_by_task(run, run.cells[start : start + fit], figures))
    scale = "Scores 0 to 100: " if run.averaged_tasks else ""
    console.print(f"{scale}{setting(run)}.", style="dim", highlight=False)
    for line in _contrast_lines(run, judgement.margin, find_floor(run, judgement).floor):
        console.print(line, highlight=False)
    for note in gaps(run):
        console.print(note, style="yellow", highlight=False)


def print_floor(floor: Floor, console: Console) -> None:
    """Print both tables, and what says nothing."""
    for table in noise_tables(floor):
        shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        places = [place for place, name in enumerate(table.header) if name not in IN_FILES_ALONE]
        for place in places:
            shown.add_column(table.header[place], overflow="fold")
        for row in table.rows:
            shown.add_row(*(escape(row[place]) for place in places))
        console.print(shown)
    console.print(f"{setting(floor.base)}.", style="dim", highlight=False, markup=False)
    for note in notes(floor):
        console.print(note, style="yellow", highlight=False, markup=False)


def _contrast_lines(run: Run, margin: float, floor: Floor | None) -> list[str]:
    """Return a line for every two methods at one budget, the surest first; the rest is counted.

    Those within the noise floor are marked.
    """
    between = [
        contrast
        for contrast in contrasts(run)
        if contrast.task == AVERAGE and contrast.second != run.full_cell and contrast.verdict(margin)
    ]
    between.sort(key=lambda contrast: contrast.p_adjusted)
    lines = []
    for contrast in between[:_CONTRASTS]:
        low, high = contrast.interval
        verdict = verdict_text(contrast, margin, floor).replace("\n", " ")
        lines.append(
            f"{shown_name(run, contrast.first)} - {shown_name(run, contrast.second)}: "
            f"{contrast.value:+.2f} [{low:.2f}, {high:.2f}], "
            f"adjusted p {contrast.p_adjusted:.3f}: {verdict}"
        )
    if len(between) > _CONTRASTS:
        lines.append(f"{len(between) - _CONTRASTS} more contrasts: tables/contrasts.md")
    if lines and floor:
        noise = floor.noise(AVERAGE)
        lines.append(
            f"{WITHIN_NOISE}: within noise, {noise:.2f} on the average ({floor.folder})"
            if noise == noise
            else f"noise: not measured on the average ({floor.folder})"
        )
    return [escape(line) for line in lines]


@dataclass(frozen=True)
class _Figure:
    """One number of every cell that has it, as text."""

    label: str
    by_cell: Mapping[str, str]
    style: str = ""


def _figures(run: Run, rule: FlipRule) -> list[_Figure]:
    """Return the average, its difference to the full cache, each task's score, flips, budget and KL.

    Those that no cell has are left out. What is no score of 0 to 100 has a difference of its own.
    """
    scores = [
        _Figure(
            task_label(run, task),
            {
                cell: f"{run.scores[task, cell].value:.2f}"
                for cell in run.cells
                if (task, cell) in run.scores and not isnan(run.scores[task, cell].value)
            },
        )
        for task in run.tasks
    ]
    averaged = {cell: f"{scored.value:.2f}" for cell, scored in averages(run).items()}
    flipped = {one.cell: f"-{one.lost} +{one.gained}" for one in counts(run, rule) if one.task == TOTAL}
    average, *others = _differences(run)
    first = [_Figure("average", averaged, "bold"), average]
    below = [*others, _Figure("samples lost, gained", flipped, "dim"), *_below(run)]
    return [figure for figure in (*first, *scores, *below) if figure in scores or figure.by_cell]


def _differences(run: Run) -> list[_Figure]:
    """Return the differences to the full cache with their intervals: of the average, and of each task
    that is in none.
    """
    found = differences(run, run.full_cell) if run.full_cell else []
    texts: dict[str, dict[str, str]] = {AVERAGE: {}}
    texts |= {task: {} for task in run.tasks if task not in run.averaged_tasks}
    for each in found:
        shown = each.scored.estimate()
        if each.task in texts and not isnan(shown.value):
            interval = "" if isnan(shown.low) else f"\n[{shown.low:.2f}, {shown.high:.2f}]"
            texts[each.task][each.cell] = f"{shown.value:+.2f}{escape(interval)}"
    return [
        _Figure(("" if task == AVERAGE else f"{task}, ") + "difference\nto full, 95%", by_cell)
        for task, by_cell in texts.items()
    ]


def _by_task(run: Run, cells: Sequence[str], figures: Sequence[_Figure]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    for cell in cells:
        name = parse_name(cell)
        kept = missed_budgets(run).get(cell)
        header = f"{name.variant}\n@{name.budget}" + (f"\n({kept})" if kept else "")
        table.add_column(header, justify="right", overflow="fold")
    for figure in figures:
        texts = [figure.by_cell.get(cell, "") for cell in cells]
        table.add_row(figure.label, *texts, style=figure.style)
    return table


def _by_cell(run: Run, figures: Sequence[_Figure]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cell", overflow="fold")
    for figure in figures:
        table.add_column(figure.label, justify="right", overflow="fold", style=figure.style)
    for cell in run.cells:
        table.add_row(shown_name(run, cell), *(figure.by_cell.get(cell, "") for figure in figures))
    return table


def _below(run: Run) -> list[_Figure]:
    """Return what stands below the scores: the figures that have a label for the terminal."""
    by_cell = {cell: run.over_tasks(cell) for cell in run.cells}
    return [
        _Figure(
            column.terminal[0],
            {
                cell: format(values[column.name], column.terminal[1])
                for cell, values in by_cell.items()
                if not isnan(values.get(column.name, nan))
            },
            "dim",
        )
        for column in COLUMNS
        if column.terminal
    ]
