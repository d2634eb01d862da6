"""Scores by the depth of a needle and the length of its text: a panel a cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.groups import GroupScore, group_values, scores_by
from harness.report.missed import shown_label
from harness.report.plots.style import (
    BAND,
    COLUMN,
    INK,
    PAGE,
    SMALL,
    Plot,
    columns_of,
    grid,
    render,
    text_width,
    wrap,
)
from harness.report.run import Run
from harness.report.words import gaps, setting, span

_SQUARE = 10.0
"""Points of a row: a number of the smallest size stands in it."""
_FEW = 2
"""Panels that share a column; more take the page's width."""


def heat_maps(run: Run) -> list[Plot]:
    """Draw scores by depth and length: a figure for each task that is grouped by both."""
    if not {"depth", "length"} <= group_values(run).keys():
        return []
    by_task: dict[str, list[GroupScore]] = defaultdict(list)
    for score in scores_by(run, ("depth", "length")):
        if score.task in run.averaged_tasks:
            by_task[score.task].append(score)
    return [_heat_map(run, task, scores) for task, scores in by_task.items()]


def _heat_map(run: Run, task: str, scores: Sequence[GroupScore]) -> Plot:
    caption = (
        f"Score by depth (percent of the text before the needle) and length on {task}, samples a "
        f"square: {span({score.n for score in scores})}, grey where there are none. {setting(run)}."
    )
    worst = min(scores, key=lambda score: score.scored.value)
    alt = (
        f"Squares of {len({score.cell for score in scores})} cells on {task}, a panel a cell, depth "
        f"downwards and length to the right; the lowest is {worst.scored.value:.0f} "
        f"({shown_label(run, worst.cell)} at depth {worst.group[0]}, length {worst.group[1]})."
    )
    return render(
        draw_heat_map(run, scores),
        f"heat_map_{task}",
        f"Score by depth and length: {task}",
        " ".join((caption, *gaps(run))),
        alt,
    )


def draw_heat_map(run: Run, scores: Sequence[GroupScore]) -> Figure:
    """Draw one task's scores, a panel a cell, all on one scale."""
    values = group_values(run)
    depths, lengths = values["depth"], values["length"]
    cells = [cell for cell in run.cells if any(score.cell == cell for score in scores)]
    columns = columns_of(len(cells), _FEW if len(cells) <= _FEW else 4)
    width = COLUMN if len(cells) <= _FEW else PAGE
    rows = -(-len(cells) // columns)
    figure = Figure((width, rows * (_SQUARE * len(depths) / 72 + 0.45) + 0.35), layout="constrained")
    axes, rest = grid(figure, len(cells), columns, sharex=True, sharey=True)
    # Perceptually uniform, and read alike without colour vision and in grey.
    colours = mpl.colormaps["viridis"].with_extremes(bad=BAND)
    square = (72 * width / columns - 24) / len(lengths)
    for place, (axis, cell) in enumerate(zip(axes, cells, strict=True)):
        shown = np.full((len(depths), len(lengths)), np.nan)
        for score in scores:
            if score.cell == cell:
                depth, length = score.group
                shown[depths.index(depth), lengths.index(length)] = score.scored.value
        image = axis.imshow(shown, cmap=colours, vmin=0, vmax=100, aspect="auto")
        axis.set_title(wrap(shown_label(run, cell), int(72 * width / columns / 4.6)))
        axis.grid(visible=False)
        axis.tick_params(
            length=0, labelleft=place % columns == 0, labelbottom=place + columns >= len(cells)
        )
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        if square > text_width("100") + 2:
            _number_squares(axis, shown)
    figure.supxlabel("length, tokens")
    figure.supylabel("depth, %")
    if rest is None:
        figure.colorbar(image, ax=figure.axes, label="score", aspect=30)
    else:
        inside = rest.inset_axes((0.1, 0.45, 0.8, 0.1))
        figure.colorbar(image, cax=inside, orientation="horizontal", label="score")
    return figure


def _number_squares(axis: Axes, shown: np.ndarray) -> None:
    """Write each score into its square, light on the dark end of the colours."""
    for (row, column), value in np.ndenumerate(shown):
        if not np.isnan(value):
            ink = INK if value > 60 else "white"
            middle: Any = {"ha": "center", "va": "center_baseline"}
            axis.text(column, row, f"{value:.0f}", fontsize=SMALL, color=ink, **middle)
