"""The layout of figures by task: a row a task, a panel a budget, in a row a place for each method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.names import budget_label
from harness.report.plots.style import COLUMN, PAGE, columns_of, grid, is_full, legend, wrap
from kvmerge.names import parse_name

PITCH = 5.2
"""Points from method to method."""
_NAME = 22
"""Letters of a task's name to a line."""
_BETWEEN, _LINE = 5.0, 9.0
"""Points: from task to task, and a line of a name."""
_LOWEST = 1.5
"""Inches: what a legend of some lines, the axis and one row need."""
_PANELS, _LONG = 4, 12
"""Panels side by side, and tasks that stand in one block, at most."""


@dataclass(frozen=True)
class TaskRow:
    """Where a panel draws a task, in points from its top."""

    task: str
    top: float
    bottom: float
    places: Mapping[str, float]
    """By cell of the panel."""


def task_rows(
    cells: Sequence[str],
    tasks: Sequence[str],
    draw: Callable[[Axes, Sequence[TaskRow]], None],
    entries: Sequence[tuple[Any, str]],
    label: str,
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, which share their horizontal axis.

    Args:
        cells: those of a budget share a panel.
        tasks: from top to bottom; many of them stand in two blocks.
        draw: draws the tasks of a panel into it, best all that is of one cell at once: matplotlib takes
            as long for a mark as for twenty.
        entries: of the legend.
        label: of the horizontal axis.
    """
    panels = _by_budget(cells)
    slots = max(len(of) for of in panels.values())
    lines = max(wrap(task, _NAME).count("\n") + 1 for task in tasks)
    pitch = max(slots * PITCH, lines * _LINE) + _BETWEEN
    # Two blocks side by side, each with all panels, where these are narrow enough.
    blocks = 2 if len(tasks) > _LONG and len(panels) <= 2 else 1
    rows_of_tasks = -(-len(tasks) // blocks)
    width = COLUMN if blocks == 1 and len(panels) <= 2 else PAGE
    columns = columns_of(len(panels), _PANELS)
    rows = -(-len(panels) // columns)
    height = max(_LOWEST, rows * (rows_of_tasks * pitch + 28) / 72 + 0.45)
    figure = Figure((width, height), layout="constrained")
    axes, rest = grid(figure, blocks * len(panels), blocks * columns, sharex=True)
    for place, axis in enumerate(axes):
        block, panel = divmod(place, len(panels))
        own = tasks[block * rows_of_tasks : (block + 1) * rows_of_tasks]
        title, of_panel = list(panels.items())[panel]
        axis.set_title(title)
        axis.grid(visible=False, axis="y")
        axis.grid(visible=True, axis="x")
        draw(axis, [_row(task, number, of_panel, pitch) for number, task in enumerate(own)])
        for number in range(1, len(own)):
            axis.axhline(number * pitch, color="#bbbbbb", linewidth=0.5)
        names = [wrap(task, _NAME) for task in own]
        axis.set_yticks([(number + 0.5) * pitch for number in range(len(own))], names)
        axis.set_ylim(rows_of_tasks * pitch, 0)
        axis.tick_params(axis="y", length=0, labelleft=panel % columns == 0)
        axis.tick_params(axis="x", labelbottom=panel + columns >= len(panels))
    figure.supxlabel(label)
    legend(figure, entries, rest)
    return figure, axes


def _by_budget(cells: Sequence[str]) -> dict[str, list[str]]:
    """Return the cells of each budget; the full cache is a panel of its own only where it is alone."""
    panels: dict[str, list[str]] = {}
    for cell in [cell for cell in cells if not is_full(cell)] or cells:
        panels.setdefault(f"budget {budget_label(parse_name(cell).budget)}", []).append(cell)
    return panels


def _row(task: str, number: int, cells: Sequence[str], pitch: float) -> TaskRow:
    middle = (number + 0.5) * pitch
    places = {cell: middle + (i - (len(cells) - 1) / 2) * PITCH for i, cell in enumerate(cells)}
    return TaskRow(task, number * pitch + 1, (number + 1) * pitch - 1, places)
