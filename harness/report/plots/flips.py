"""Samples lost and gained by task: a row a task, a panel a budget, a bar a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from harness.judgement import FlipRule
from harness.report.flips import TOTAL, Count, counts, without_flips
from harness.report.names import cell_label
from harness.report.plots.style import (
    BAND,
    INK,
    Look,
    Plot,
    Undrawn,
    is_full,
    mark,
    render,
    variants,
)
from harness.report.plots.task_rows import PITCH, TaskRow, task_rows
from harness.report.run import Run
from harness.report.words import gaps, setting
from kvmerge.names import parse_name

_TITLE = "Samples lost and gained by task"
_BAR = 0.66 * PITCH


def flips_by_task(run: Run, by_method: Mapping[str, Look], rule: FlipRule) -> Plot | Undrawn:
    """Draw what each cell loses to the left of 0, on all it could lose, and its gains to the right."""
    found = {(one.task, one.cell): one for one in counts(run, rule)}
    tasks = [task for task in run.averaged_tasks if any(key[0] == task for key in found)]
    if not tasks:
        return Undrawn(_TITLE, "No cell shares a task scored 0 to 100 with a full cache.")
    cells = [cell for cell in run.cells if not is_full(cell) and (TOTAL, cell) in found]

    def draw(axis: Axes, rows: Sequence[TaskRow]) -> None:
        bars: dict[str, dict[float, Count]] = {}
        for row in rows:
            here = {cell: found[row.task, cell] for cell in row.places if (row.task, cell) in found}
            well = max((one.well for one in here.values()), default=0)
            axis.fill_betweenx((row.top, row.bottom), -well, 0, color=BAND, linewidth=0)
            for cell, one in here.items():
                bars.setdefault(cell, {})[row.places[cell]] = one
        for cell, of_cell in bars.items():
            _draw_bars(axis, of_cell, by_method[parse_name(cell).variant])
        axis.axvline(0, color=INK, linewidth=0.6)

    entries: list[tuple[Any, str]] = [
        (mark(by_method[name]), by_method[name].label) for name in variants(cells)
    ]
    entries.append((Patch(facecolor=BAND), "answered well by the full cache"))
    figure, axes = task_rows(cells, tasks, draw, entries, "samples lost (left) and gained (right)")
    axes[0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
    apart = without_flips(run)
    notes = [f"Not a score of 0 to 100: {', '.join(apart)}."] if apart else []
    return render(
        figure,
        "flips_by_task",
        _TITLE,
        f"Samples that {run.full_cell} answers well and a cell loses (left; grey: all of them), and "
        f"those that it gains (right): {setting(run)}. {rule.sentence} "
        + " ".join((*notes, *gaps(run))),
        _alt([found[TOTAL, cell] for cell in cells], len(tasks)),
    )


def _draw_bars(axis: Axes, of_cell: Mapping[float, Count], look: Look) -> None:
    """Draw what is lost, and hollow what is gained, from 0, with the method's mark at the end."""
    lost = {place: -one.lost for place, one in of_cell.items()}
    gained = {place: one.gained for place, one in of_cell.items() if one.gained}
    for lengths, face in ((lost, look.colour), *([(gained, "white")] if gained else [])):
        axis.barh(
            [*lengths], [*lengths.values()], _BAR, color=face, edgecolor=look.colour, linewidth=0.7
        )
        axis.plot(
            [*lengths.values()],
            [*lengths],
            color=look.colour,
            linestyle="none",
            marker=look.marker,
            markersize=3.4,
            markeredgecolor="white",
            markeredgewidth=0.4,
            clip_on=False,
        )


def _alt(totals: Sequence[Count], tasks: int) -> str:
    most, least = (choose(totals, key=lambda one: one.lost) for choose in (max, min))
    return (
        f"Bars of {len(totals)} cells on {tasks} tasks, a row a task and a panel a budget: from "
        f"{least.lost} of {least.well} samples lost in all ({cell_label(least.cell)}) to {most.lost} "
        f"of {most.well} ({cell_label(most.cell)})."
    )
