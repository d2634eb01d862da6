"""Scores by task: a row a task, a panel a budget, a mark a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.missed import shown_label
from harness.report.plots.style import (
    BAND,
    REFERENCE,
    Look,
    Plot,
    Undrawn,
    intervals,
    is_full,
    mark,
    reference_mark,
    render,
    variants,
    whiskers,
)
from harness.report.plots.task_rows import TaskRow, task_rows
from harness.report.run import Run
from harness.report.words import count_tasks, gaps, setting
from kvmerge.names import parse_name

_TITLE = "Scores by task"
_MANY = 3
"""Panels side by side, from which on there is room for fewer ticks."""
_EDGE = 3.0
"""Room beyond 0 and 100, in which marks at the ends are whole."""


def scores_by_task(run: Run, by_method: Mapping[str, Look]) -> Plot | Undrawn:
    """Draw every score of 0 to 100 with its interval, the full cache as a line in each task's row."""
    tasks = [
        task for task in run.averaged_tasks if any((task, cell) in run.scores for cell in run.cells)
    ]
    if not tasks:
        return Undrawn(_TITLE, "No task has a score of 0 to 100.")
    figure = _figure(run, tasks, by_method)
    shown = [run.scores[key].estimate() for key in run.scores if key[0] in tasks]
    bars = intervals(shown, "Bars and band")
    caption = f"Score by task, 0 to 100: {setting(run)}. {bars}"
    others = [task for task in run.tasks if task not in tasks and run.metrics[task].parts]
    apart = [f"Not a score of 0 to 100: {', '.join(others)}."] if others else []
    return render(
        figure,
        "scores_by_task",
        _TITLE,
        " ".join((caption, *apart, *gaps(run))),
        _alt(run, tasks),
    )


def _figure(run: Run, tasks: Sequence[str], by_method: Mapping[str, Look]) -> Figure:
    def draw(axis: Axes, rows: Sequence[TaskRow]) -> None:
        for row in rows:
            if run.full_cell not in row.places and (row.task, run.full_cell) in run.scores:
                _draw_reference(axis, run, row)
        for cell in dict.fromkeys(cell for row in rows for cell in row.places):
            _draw_scores(axis, run, cell, rows, by_method[_name(cell)])

    shown = [cell for cell in run.cells if not is_full(cell)] or run.cells
    entries: list[tuple[Any, str]] = [
        (mark(by_method[name]), by_method[name].label) for name in variants(shown)
    ]
    if run.full_cell and len(run.cells) > 1:
        entries.append((reference_mark(), by_method["full"].label))
    figure, axes = task_rows(run.cells, tasks, draw, entries, "score")
    axes[0].set_xlim(-_EDGE, 100 + _EDGE)
    axes[0].set_xticks((0, 25, 50, 75, 100) if len(axes) < _MANY else (0, 50, 100))
    return figure


def _name(cell: str) -> str:
    return parse_name(cell).variant


def _draw_scores(axis: Axes, run: Run, cell: str, rows: Sequence[TaskRow], look: Look) -> None:
    places = {row.places[cell]: row.task for row in rows if (row.task, cell) in run.scores}
    shown = [run.scores[task, cell].estimate() for task in places.values()]
    if shown:
        axis.errorbar(
            [each.value for each in shown],
            [*places],
            xerr=whiskers(shown),
            color=look.colour,
            marker=look.marker,
            markersize=3.8,
            linestyle="none",
            elinewidth=0.9,
            capsize=1.2,
        )


def _draw_reference(axis: Axes, run: Run, row: TaskRow) -> None:
    full = run.scores[row.task, str(run.full_cell)].estimate()
    strip = row.top, row.bottom
    axis.fill_betweenx(strip, full.low, full.high, color=BAND, linewidth=0)
    axis.plot((full.value,) * 2, strip, color=REFERENCE, linestyle=(0, (4, 2)))


def _alt(run: Run, tasks: Sequence[str]) -> str:
    shown = [
        (run.scores[task, cell].value, task, cell)
        for task in tasks
        for cell in run.cells
        if (task, cell) in run.scores and not (is_full(cell) and len(run.cells) > 1)
    ]
    low, high = min(shown), max(shown)
    return (
        f"Marks of {len(run.cells)} cells on {count_tasks(len(tasks))}, a row a task, a panel a "
        "budget, from "
        f"{low[0]:.1f} ({shown_label(run, low[2])} on {low[1]}) to {high[0]:.1f} "
        f"({shown_label(run, high[2])} on {high[1]})."
    )
