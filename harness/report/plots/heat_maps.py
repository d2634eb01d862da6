"""Scores by the depth of a needle and the length of its text: a panel a cell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.groups import (
    GroupScore,
    Value,
    group_values,
    place_of,
    scores_by,
    unsampled,
    unsampled_notes,
)
from harness.report.missed import shown_label
from harness.report.plots.style import (
    COLUMN,
    INK,
    PAGE,
    PALE,
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
_FEW, _PANELS = 2, 4
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
        f"Score by depth (percent of the text before the needle) and length (mean tokens of the "
        f"prompts, below them the nominal length) on {task}, samples a square: "
        f"{span({score.n for score in scores})}, hatched where there are none. {setting(run)}."
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
        " ".join((caption, *unsampled_notes(run), *gaps(run))),
        alt,
    )


def draw_heat_map(run: Run, scores: Sequence[GroupScore]) -> Figure:
    """Draw one task's scores, a panel a cell, all on one scale."""
    depths, lengths = (_asked(run, name) for name in ("depth", "length"))
    cells = [cell for cell in run.cells if any(score.cell == cell for score in scores)]
    columns = columns_of(len(cells), _FEW if len(cells) <= _FEW else _PANELS)
    width = COLUMN if len(cells) <= _FEW else PAGE
    rows = -(-len(cells) // columns)
    # What is left of a panel's share when names and the scale have theirs.
    across = 72 * width / columns - 40
    square = across / len(lengths)
    ticks = [_length_label(length, scores) for length in lengths]
    flat = square > max(map(text_width, ticks)) + 3
    if not flat:
        each = math.ceil(1.4 * SMALL / square)
        ticks = [tick.replace("\n", " ") * (place % each == 0) for place, tick in enumerate(ticks)]
    below = (2 * SMALL if flat else max(map(text_width, ticks))) / 72
    height = rows * (_SQUARE * len(depths) / 72 + 0.32) + below + 0.3
    figure = Figure((width, height), layout="constrained")
    axes, rest = grid(figure, len(cells), columns, sharex=True, sharey=True)
    # Perceptually uniform, and read alike without colour vision and in grey.
    colours = mpl.colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0))
    for place, (axis, cell) in enumerate(zip(axes, cells, strict=True)):
        shown = np.full((len(depths), len(lengths)), np.nan)
        for score in scores:
            if score.cell == cell:
                depth, length = score.group
                shown[depths.index(depth), lengths.index(length)] = score.scored.value
        image = axis.imshow(shown, cmap=colours, vmin=0, vmax=100, aspect="auto")
        axis.set_title(wrap(shown_label(run, cell), int(across / 4.6)))
        axis.grid(visible=False)
        axis.patch.set(facecolor="white", edgecolor=PALE, hatch="/////")
        # Tall names would tear the rows apart, so above an empty slot there are none.
        lowest = place + columns >= len(cells) if flat else place // columns == rows - 1
        axis.tick_params(length=0, labelleft=place % columns == 0, labelbottom=lowest)
        axis.tick_params(axis="x", rotation=0 if flat else 90)
        axis.set_xticks(range(len(lengths)), ticks)
        axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        if square > text_width("100") + 2:
            _number_squares(axis, shown)
    figure.supxlabel("prompt tokens, mean (nominal length)")
    figure.supylabel("depth, %")
    if rest is None:
        figure.colorbar(image, ax=axes, label="score", aspect=30)
    else:
        inside = rest.inset_axes((0.1, 0.45, 0.8, 0.1))
        figure.colorbar(image, cax=inside, orientation="horizontal", label="score")
    return figure


def _asked(run: Run, name: str) -> list[Value]:
    """Return the values of a group in order, with those that the run asked for and has no sample of."""
    return sorted([*group_values(run)[name], *unsampled(run).get(name, ())], key=place_of)


def _length_label(length: Value, scores: Sequence[GroupScore]) -> str:
    """Name a length by the tokens that prompts of it have, the nominal length in brackets below."""
    tokens = [score.prompt_tokens for score in scores if score.group[1] == length]
    return f"{np.mean(tokens):.0f}\n({length})" if tokens else f"-\n({length})"


def _number_squares(axis: Axes, shown: np.ndarray) -> None:
    """Write each score into its square, light on the dark end of the colours."""
    for (row, column), value in np.ndenumerate(shown):
        if not np.isnan(value):
            ink = INK if value > 60 else "white"
            middle: Any = {"ha": "center", "va": "center_baseline"}
            axis.text(column, row, f"{value:.0f}", fontsize=SMALL, color=ink, **middle)
