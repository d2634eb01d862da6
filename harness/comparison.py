"""The comparison as it is printed at the end of a run."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from harness.gates import Verdict, gates, summary_lines
from harness.reference import load_references
from harness.summary import Run, averages, load_run, sample_mean
from harness.tables import gaps, setting, task_label

_TASK_WIDTH = 22
_CELL_WIDTH = 12
_GATE_STYLE = {
    Verdict.OUTSIDE: "bold red",
    Verdict.INSIDE: "green",
    Verdict.NOT_COMPARABLE: "yellow",
}


def print_comparison(output_dir: Path, console: Console) -> None:
    """Print the gates, then tasks in rows and cells in columns, average, achieved budget and KL.

    Where the console is too narrow for all cells, they follow in further blocks. Raises
    `UserError` as `load_run` does.
    """
    run = load_run(output_dir)
    for verdict, line in summary_lines(gates(run, load_references())):
        console.print(line, style=_GATE_STYLE[verdict], highlight=False)
    fit = max(1, (console.width - _TASK_WIDTH) // _CELL_WIDTH)
    for start in range(0, len(run.cells), fit):
        console.print(_block(run, run.cells[start : start + fit]))
    console.print(f"Scores 0 to 100: {setting(run)}.", style="dim", highlight=False)
    for note in gaps(run):
        console.print(note, style="yellow", highlight=False)


def _block(run: Run, cells: tuple[str, ...]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    for cell in cells:
        method, _, budget = cell.rpartition("@")
        table.add_column(f"{method}\n@{budget}", justify="right", overflow="fold")
    for task in run.tasks:
        scores = [run.scores.get((task, cell)) for cell in cells]
        table.add_row(task_label(run, task), *("" if s is None else f"{s.value:.2f}" for s in scores))
    table.add_section()
    averaged = averages(run)
    table.add_row(
        "average",
        *(f"{averaged[cell].value:.2f}" if cell in averaged else "" for cell in cells),
        style="bold",
    )
    for label, field, form in (
        ("achieved budget", "budget_achieved", ".3f"),
        ("KL to full (nats)", "kl_to_full", ".4f"),
    ):
        texts = [_mean(run, cell, field, form) for cell in cells]
        if any(texts):
            table.add_row(label, *texts, style="dim")
    return table


def _mean(run: Run, cell: str, field: str, form: str) -> str:
    """Mean over samples, then over the tasks that have the field; empty where none has."""
    means = [sample_mean(run.records.get((task, cell), []), field) for task in run.tasks]
    known = [mean for mean in means if mean == mean]
    return format(sum(known) / len(known), form) if known else ""
