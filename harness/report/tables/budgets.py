"""What each cell kept, what it weighs and how far it moves the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from harness.report.columns import COLUMNS, TABLE, Column
from harness.report.memory import beside_notes
from harness.report.run import Run
from harness.report.tables.table import Table, tidy
from harness.report.words import gaps, setting, subject
from kvmerge.names import parse_name


def budget_table(run: Run) -> Table:
    """Put cells in rows: what was kept, what it weighs, how far the predictions move from full."""
    rows = []
    data = []
    by_cell = {cell: run.over_tasks(cell) for cell in run.cells}
    shown = [
        column
        for column in TABLE
        if any(not np.isnan(values.get(column.name, np.nan)) for values in by_cell.values())
    ]
    lacking = [column.header for column in TABLE if column not in shown]
    for cell, values in by_cell.items():
        name = parse_name(cell)
        tasks = sum((task, cell) in run.records for task in run.tasks)
        rows.append((cell, str(tasks), *(_figure_text(column, values) for column in shown)))
        if values:
            data.append({"method": name.variant, "budget": str(name.budget), "tasks": tasks} | values)
    return Table(
        name="budgets",
        title="Budget, memory and fidelity",
        caption=f"What each cell kept: {setting(run)}. Means over samples, then tasks; in brackets "
        "the smallest and largest sample. Entries are per layer and KV head, after prefill; merged are "
        "the prompt tokens that share another's entry, evicted those that none stands for (told by "
        "methods that keep sizes). KV counts K and V alone, without set sizes and logit biases. "
        "KL(full || cell) in nats and top-1 agreement along the full cache's own answer.",
        header=("cell", "tasks", *(column.header for column in shown)),
        rows=tuple(rows),
        notes=(
            *gaps(run),
            *beside_notes(run),
            *([f"Not recorded: {', '.join(lacking)}."] if lacking else []),
        ),
        data=tidy(run, data, ["method", "budget", "tasks", *(column.name for column in COLUMNS)]),
        subject=subject(run),
        naming=(0,),
    )


def _figure_text(column: Column, values: Mapping[str, float]) -> str:
    """Return a figure as the table shows it, its extremes in brackets; empty where there is none."""
    text = column.text(values.get(column.name, np.nan))
    if text and column.brackets:
        low, high = (column.text(values[name]) for name in column.brackets)
        return f"{text}\n[{low}, {high}]"
    return text
