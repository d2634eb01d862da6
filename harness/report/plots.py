"""The figures of a report, in one fixed style that survives colour blindness and grey print."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness.report.bootstrap import Estimate
from harness.report.groups import GroupScore, group_values, scores_by
from harness.report.run import Run, averages
from harness.report.words import INTERVAL, count_tasks, gaps, setting, task_label
from kvmerge.cells import parse_name
from kvmerge.files import write_atomically

# Okabe and Ito's colours; with a marker each, so that nothing is told by colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
_FULL = "#444444"
INK = "#222222"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
_BARS_A_ROW = 44
_PANELS_A_ROW = 4
_NUMBERED_SQUARES = 60


@dataclass(frozen=True)
class Plot:
    """One figure, drawn."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    png: bytes
    pdf: bytes

    def write(self, folder: Path) -> None:
        """Write `<name>.png` and `<name>.pdf`."""
        write_atomically(folder / f"{self.name}.png", self.png)
        write_atomically(folder / f"{self.name}.pdf", self.pdf)


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str


def looks(runs: Iterable[Run]) -> dict[str, Look]:
    """Choose for each method one look for a whole report, in order of first appearance."""
    names = dict.fromkeys(parse_name(cell).variant for run in runs for cell in run.cells)
    others = [name for name in names if name != "full"]
    return {"full": Look(_FULL, "_")} | {
        name: Look(COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, name in enumerate(others)
    }


def draw_all(run: Run, by_method: Mapping[str, Look]) -> list[Plot]:
    """Draw every figure that the run has numbers for."""
    with mpl.rc_context(STYLE):
        drawn = [
            scores_by_task(run, by_method),
            average_by_budget(run, by_method),
            kl_by_budget(run, by_method),
            *unaveraged_by_budget(run, by_method),
            *heat_maps(run),
        ]
    return [plot for plot in drawn if plot is not None]


def scores_by_task(run: Run, by_method: Mapping[str, Look]) -> Plot | None:
    """Draw bars per task, one a cell: colour is the method, the paler the smaller its budget."""
    tasks = [task for task in run.tasks if any((task, cell) in run.scores for cell in run.cells)]
    if not tasks:
        return None
    percent = [task for task in tasks if task in run.averaged_tasks]
    others = [task for task in tasks if task not in run.averaged_tasks]
    a_row = max(1, _BARS_A_ROW // len(run.cells))
    rows = [*_split(percent, a_row), *([task] for task in others)]
    title = "Scores by task"
    figure, axes = _figure(title, run, n_rows=len(rows), width=9.5, row_height=2.5)
    fills = _fills(run.cells, by_method)
    step = min(0.86 / len(run.cells), 0.2)
    widest = max(map(len, rows))
    for axis, row in zip(axes, rows, strict=True):
        for i, cell in enumerate(run.cells):
            bars = [
                (x + (i - (len(run.cells) - 1) / 2) * step, run.scores[task, cell].estimate())
                for x, task in enumerate(row)
                if (task, cell) in run.scores
            ]
            if not bars:
                continue
            axis.bar(
                [x for x, _ in bars],
                [shown.value for _, shown in bars],
                width=0.92 * step,
                color=fills[cell],
                edgecolor=by_method[parse_name(cell).variant].colour,
                linewidth=0.7,
            )
            axis.errorbar(
                [x for x, _ in bars],
                [shown.value for _, shown in bars],
                yerr=_bars([shown for _, shown in bars]),
                fmt="none",
                ecolor=INK,
                elinewidth=0.8,
                capsize=1.5,
                capthick=0.8,
            )
        axis.set_xticks(range(len(row)), [_wrap(task_label(run, task)) for task in row])
        axis.tick_params(axis="x", length=0)
        # Every row is as wide as the fullest one, so that bars do not change width between rows.
        axis.set_xlim(-0.5, widest - 0.5)
        axis.set_ylabel("score" if row[0] in percent else run.tasks[row[0]])
        axis.set_ylim(bottom=0)
    columns = [
        [
            Patch(facecolor=fills[cell], edgecolor=by_method[method].colour, label=cell)
            for cell in run.cells
            if parse_name(cell).variant == method
        ]
        for method in dict.fromkeys(parse_name(cell).variant for cell in run.cells)
    ]
    _legend(figure, columns)
    caption = f"Score by task: {setting(run)}. Bars: {INTERVAL}."
    return render(figure, "scores_by_task", title, " ".join((caption, *gaps(run))))


def average_by_budget(run: Run, by_method: Mapping[str, Look]) -> Plot | None:
    """Draw the average score against achieved budget, one line a method, full as a band."""
    averaged = {cell: scored.estimate() for cell, scored in averages(run).items()}
    points = {cell: shown for cell, shown in averaged.items() if parse_name(cell).variant != "full"}
    if not points:
        return None
    title = "Average score against budget"
    over = count_tasks(len(run.averaged_tasks))
    figure, (axis,) = _figure(title, run, n_rows=1, width=6.4, row_height=3.6)
    _lines(axis, run, points, by_method)
    if run.full_cell in averaged:
        full = averaged[run.full_cell]
        axis.axhline(full.value, color=_FULL, linewidth=1.2, linestyle=(0, (5, 2)), label="full")
        if not np.isnan(full.low):
            axis.axhspan(full.low, full.high, color=_FULL, alpha=0.09, linewidth=0)
    axis.set_ylabel(f"average score over {over}")
    _legend(figure, [[handle] for handle in axis.get_legend_handles_labels()[0]])
    caption = (
        f"Average score (plain mean over {over}): {setting(run)}. Bars and band: "
        f"{INTERVAL}, each cell on its own; the table of differences has the paired intervals."
    )
    return render(figure, "average_by_budget", title, " ".join((caption, *gaps(run))))


def kl_by_budget(run: Run, by_method: Mapping[str, Look]) -> Plot | None:
    """Draw KL(full || cell) against achieved budget, mean over tasks; None where nothing has it."""
    cells = [cell for cell in run.cells if parse_name(cell).variant != "full"]
    divergence = {
        key: values["kl_to_full"]
        for key, values in run.figures.items()
        if not np.isnan(values["kl_to_full"])
    }
    # A task on which nothing was compared, such as one of a single token, is left out for all.
    tasks = [task for task in run.tasks if any((task, cell) in divergence for cell in cells)]
    points = {
        cell: Estimate(float(np.mean([divergence[task, cell] for task in tasks])), np.nan, np.nan)
        for cell in cells
        if tasks and all((task, cell) in divergence for task in tasks)
    }
    if not points:
        return None
    title = "KL to the full cache against budget"
    figure, (axis,) = _figure(title, run, n_rows=1, width=6.4, row_height=3.6)
    _lines(axis, run, points, by_method)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("KL(full || cell), nats a token")
    _legend(figure, [[handle] for handle in axis.get_legend_handles_labels()[0]])
    caption = (
        "KL(full || cell) along the full cache's own answer, mean over positions, samples, then "
        f"{count_tasks(len(tasks))}: {setting(run)}."
    )
    return render(figure, "kl_by_budget", title, " ".join((caption, *gaps(run))))


def heat_maps(run: Run) -> list[Plot]:
    """Draw scores by depth and length, a panel a cell: a figure for each task grouped by both."""
    if not {"depth", "length"} <= group_values(run).keys():
        return []
    by_task: dict[str, list[GroupScore]] = {}
    for score in scores_by(run, ("depth", "length")):
        if score.task in run.averaged_tasks:
            by_task.setdefault(score.task, []).append(score)
    return [_heat_map(run, task, scores) for task, scores in by_task.items()]


def _heat_map(run: Run, task: str, scores: Sequence[GroupScore]) -> Plot:
    title = f"Score by depth and length: {task}"
    counts = sorted({score.n for score in scores})
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    caption = (
        f"Score by depth (percent of the text before it) and length (tokens) on {task}; samples "
        f"a square: {n}, grey where there are none. {setting(run)}."
    )
    figure = _heat_map_figure(run, title, scores)
    return render(figure, f"heat_map_{task}", title, " ".join((caption, *gaps(run))))


def _heat_map_figure(run: Run, title: str, scores: Sequence[GroupScore]) -> Figure:
    values = group_values(run)
    depths, lengths = values["depth"], values["length"]
    cells = [cell for cell in run.cells if any(score.cell == cell for score in scores)]
    n_columns = min(_PANELS_A_ROW, len(cells))
    n_rows = math.ceil(len(cells) / n_columns)
    width = max(2.1 * n_columns + 1.2, 5.0)
    figure = Figure((width, n_rows * (0.22 * len(depths) + 1.0) + 0.9), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    # Perceptually uniform, and read alike without colour vision and in grey.
    colours = mpl.colormaps["viridis"].with_extremes(bad="#e4e4e4")
    for axis in axes.flat[len(cells) :]:
        axis.remove()
    for axis, cell in zip(axes.flat, cells, strict=False):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for score in scores:
            if score.cell == cell:
                depth, length = score.group
                grid[depths.index(depth), lengths.index(length)] = score.scored.value
        image = axis.imshow(grid, cmap=colours, vmin=0, vmax=100, aspect="auto")
        axis.set_title(_wrap(cell), loc="left", fontsize=8.5)
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        axis.set_xlabel("length, tokens", fontsize=8)
        if grid.size <= _NUMBERED_SQUARES:
            _number_squares(axis, grid)
    for axis in axes[:, 0]:
        axis.set_ylabel("depth, %")
    figure.colorbar(image, ax=figure.axes, label="score", aspect=30)
    subtitle = "\n".join(textwrap.wrap(setting(run), int(width * 15)))
    figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=7.5, color="#555555")
    return figure


def _number_squares(axis: Axes, grid: np.ndarray) -> None:
    """Write each score into its square, light on the dark end of the colours."""
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            ink = INK if value > 60 else "white"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=ink)


def unaveraged_by_budget(run: Run, by_method: Mapping[str, Look]) -> list[Plot]:
    """Draw each task that has no place in the average, such as a perplexity, against achieved budget.

    One line a method, full as a dashed line.
    """
    return [
        _task_by_budget(run, task, by_method)
        for task, metric in run.metrics.items()
        if not metric.averaged and metric.parts
    ]


def _task_by_budget(run: Run, task: str, by_method: Mapping[str, Look]) -> Plot:
    shown = {
        cell: run.scores[task, cell].estimate() for cell in run.cells if (task, cell) in run.scores
    }
    points = {cell: at for cell, at in shown.items() if cell != run.full_cell}
    metric = run.metrics[task]
    name, better = metric.name, "higher" if metric.higher_is_better else "lower"
    title = f"{name.capitalize()} of {task} against budget"
    figure, (axis,) = _figure(title, run, n_rows=1, width=6.4, row_height=3.6)
    if points:
        _lines(axis, run, points, by_method)
    if run.full_cell in shown:
        full = shown[run.full_cell].value
        axis.axhline(full, color=_FULL, linewidth=1.2, linestyle=(0, (5, 2)), label="full")
    axis.set_ylabel(f"{name} ({better} is better)")
    _legend(figure, [[handle] for handle in axis.get_legend_handles_labels()[0]])
    caption = (
        f"{name.capitalize()} of {task}, {better} is better: {setting(run)}. Bars: {INTERVAL}, each "
        "cell alone."
    )
    return render(figure, f"{name}_{task}", title, " ".join((caption, *gaps(run))))


def _lines(axis: Axes, run: Run, points: dict[str, Estimate], by_method: Mapping[str, Look]) -> None:
    """Draw one line a method; methods are moved apart a little where their budgets coincide."""
    achieved = {cell: 100 * run.over_tasks(cell)["budget_achieved_mean"] for cell in points}
    methods = list(dict.fromkeys(parse_name(cell).variant for cell in points))
    span = max(achieved.values()) - min(achieved.values())
    for i, method in enumerate(methods):
        cells = sorted((c for c in points if parse_name(c).variant == method), key=achieved.__getitem__)
        nudge = (i - (len(methods) - 1) / 2) * 0.012 * (span or 1)
        look = by_method[method]
        axis.errorbar(
            [achieved[cell] + nudge for cell in cells],
            [points[cell].value for cell in cells],
            yerr=None if np.isnan(points[cells[0]].low) else _bars([points[c] for c in cells]),
            color=look.colour,
            marker=look.marker,
            markersize=5.5,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=2.5,
            label=method,
        )
    axis.margins(x=0.08)
    if not span:
        axis.set_xlim(min(achieved.values()) - 10, min(achieved.values()) + 10)
    axis.set_xlabel("achieved budget: entries kept after prefill, % of prompt tokens")


def _bars(shown: Sequence[Estimate]) -> np.ndarray:
    """Return the lengths below and above the values, `(2, n)`; 0 where there is no interval."""
    lengths = np.array([[e.value - e.low for e in shown], [e.high - e.value for e in shown]])
    # A percentile interval need not hold the value of the sample it was drawn from.
    return np.clip(np.nan_to_num(lengths), 0, None)


def _fills(
    cells: Sequence[str], by_method: Mapping[str, Look]
) -> dict[str, tuple[float, float, float]]:
    fills = {}
    for method in dict.fromkeys(parse_name(cell).variant for cell in cells):
        own = sorted(
            (cell for cell in cells if parse_name(cell).variant == method),
            key=lambda cell: parse_name(cell).budget.value,
            reverse=True,
        )
        colour = np.array(to_rgb(by_method[method].colour))
        for rank, cell in enumerate(own):
            white = 0.7 * rank / max(1, len(own) - 1) if len(own) > 1 else 0.0
            r, g, b = colour + (1 - colour) * white
            fills[cell] = (float(r), float(g), float(b))
    return fills


def _figure(
    title: str, run: Run, *, n_rows: int, width: float, row_height: float
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, n_rows * row_height + 1.2), layout="constrained")
    axes = figure.subplots(n_rows, 1, squeeze=False)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    subtitle = "\n".join(textwrap.wrap(setting(run), int(width * 15)))
    axes[0].set_title(subtitle, loc="left", fontsize=7.5, color="#555555", pad=8)
    return figure, list(axes)


def _legend(figure: Figure, columns: Sequence[Sequence[Artist]]) -> None:
    """Put a legend below the axes, one column a method; short columns are filled with blanks."""
    longest = max(map(len, columns))
    blank = Patch(alpha=0, label=" ")
    figure.legend(
        handles=[
            handle for column in columns for handle in (*column, *[blank] * (longest - len(column)))
        ],
        loc="outside lower center",
        ncols=min(len(columns), int(figure.get_figwidth() / 1.3)),
        fontsize=8.5,
    )


def render(figure: Figure, name: str, title: str, caption: str) -> Plot:
    """Return a finished figure as files' contents."""
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160)
    # Without its date a file changes only where the numbers do.
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return Plot(name, title, caption, png.getvalue(), pdf.getvalue())


def _split(items: list[str], most: int) -> list[list[str]]:
    """Split into as few rows as `most` a row allows, of nearly equal length."""
    if not items:
        return []
    n_rows = -(-len(items) // most)
    size = -(-len(items) // n_rows)
    return [items[start : start + size] for start in range(0, len(items), size)]


def _wrap(label: str) -> str:
    return "\n".join(textwrap.wrap(label.replace("_", "_ "), 16)).replace("_ ", "_")
