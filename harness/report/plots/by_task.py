"""Scores by task: a row a task, a panel a budget, a mark a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.names import budget_label, cell_label
from harness.report.plots.style import (
    BAND,
    COLUMN,
    PAGE,
    REFERENCE,
    Look,
    Plot,
    Undrawn,
    columns_of,
    grid,
    is_full,
    legend,
    mark,
    reference_mark,
    render,
    variants,
    whiskers,
    wrap,
)
from harness.report.run import Run
from harness.report.words import INTERVAL, gaps, setting
from kvmerge.cells import parse_name

_TITLE = "Scores by task"
_NAME = 22
"""Letters of a task's name to a line."""
_PITCH, _BETWEEN, _LINE = 5.2, 5.0, 9.0
"""Points: from mark to mark, from task to task, and a line of a name."""
_PANELS, _LONG = 4, 12
"""Panels side by side, and tasks that stand in one block, at most."""
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
    caption = f"Score by task, 0 to 100: {setting(run)}. Bars and band: {INTERVAL}."
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
    panels = _by_budget(run.cells)
    slots = max(len(cells) for cells in panels.values())
    lines = max(wrap(task, _NAME).count("\n") + 1 for task in tasks)
    pitch = max(slots * _PITCH, lines * _LINE) + _BETWEEN
    # Many tasks stand in two blocks side by side, each with all panels, where these are narrow enough.
    blocks = 2 if len(tasks) > _LONG and len(panels) <= 2 else 1
    rows_of_tasks = -(-len(tasks) // blocks)
    width = COLUMN if blocks == 1 and len(panels) <= 2 else PAGE
    columns = columns_of(len(panels), _PANELS)
    rows = -(-len(panels) // columns)
    height = rows * (rows_of_tasks * pitch + 28) / 72 + 0.45
    figure = Figure((width, height), layout="constrained")
    axes, rest = grid(figure, blocks * len(panels), blocks * columns, sharex=True)
    for place, axis in enumerate(axes):
        block, panel = divmod(place, len(panels))
        own = tasks[block * rows_of_tasks : (block + 1) * rows_of_tasks]
        title, cells = list(panels.items())[panel]
        axis.set_title(title)
        _draw_panel(axis, run, own, cells, by_method, pitch)
        names = [wrap(task, _NAME) for task in own]
        axis.set_yticks([(row + 0.5) * pitch for row in range(len(own))], names)
        axis.set_ylim(rows_of_tasks * pitch, 0)
        axis.tick_params(axis="y", length=0, labelleft=panel % columns == 0)
        axis.tick_params(axis="x", labelbottom=panel + columns >= len(panels))
    axes[0].set_xlim(-_EDGE, 100 + _EDGE)
    axes[0].set_xticks((0, 25, 50, 75, 100) if len(panels) * blocks < _PANELS - 1 else (0, 50, 100))
    figure.supxlabel("score")
    shown = variants(cell for cells in panels.values() for cell in cells)
    entries: list[tuple[Any, str]] = [(mark(by_method[name]), by_method[name].label) for name in shown]
    if run.full_cell and len(run.cells) > 1:
        entries.append((reference_mark(), by_method["full"].label))
    legend(figure, entries, rest)
    return figure


def _by_budget(cells: Sequence[str]) -> dict[str, list[str]]:
    """Return the cells of each budget; the full cache is a panel of its own only where it is alone."""
    panels: dict[str, list[str]] = {}
    for cell in [cell for cell in cells if not is_full(cell)] or cells:
        panels.setdefault(budget_label(parse_name(cell).budget), []).append(cell)
    return panels


def _draw_panel(
    axis: Axes,
    run: Run,
    tasks: Sequence[str],
    cells: Sequence[str],
    by_method: Mapping[str, Look],
    pitch: float,
) -> None:
    axis.grid(visible=False, axis="y")
    axis.grid(visible=True, axis="x")
    for row, task in enumerate(tasks):
        if row:
            axis.axhline(row * pitch, color="#bbbbbb", linewidth=0.5)
        if run.full_cell not in cells and (task, run.full_cell) in run.scores:
            _draw_reference(axis, run, task, row, pitch)
        for slot, cell in enumerate(cells):
            if (task, cell) not in run.scores:
                continue
            shown = run.scores[task, cell].estimate()
            look = by_method[parse_name(cell).variant]
            axis.errorbar(
                shown.value,
                (row + 0.5) * pitch + (slot - (len(cells) - 1) / 2) * _PITCH,
                xerr=whiskers([shown]),
                color=look.colour,
                marker=look.marker,
                markersize=3.8,
                elinewidth=0.9,
                capsize=1.2,
            )


def _draw_reference(axis: Axes, run: Run, task: str, row: int, pitch: float) -> None:
    full = run.scores[task, str(run.full_cell)].estimate()
    top, bottom = row * pitch + 1, (row + 1) * pitch - 1
    axis.fill_betweenx((top, bottom), full.low, full.high, color=BAND, linewidth=0)
    axis.plot((full.value,) * 2, (top, bottom), color=REFERENCE, linestyle=(0, (4, 2)))


def _alt(run: Run, tasks: Sequence[str]) -> str:
    shown = [
        (run.scores[task, cell].value, task, cell)
        for task in tasks
        for cell in run.cells
        if (task, cell) in run.scores and not (is_full(cell) and len(run.cells) > 1)
    ]
    low, high = min(shown), max(shown)
    return (
        f"Marks of {len(run.cells)} cells on {len(tasks)} tasks, a row a task and a panel a budget, "
        f"from {low[0]:.1f} ({cell_label(low[2])} on {low[1]}) to {high[0]:.1f} "
        f"({cell_label(high[2])} on {high[1]})."
    )
