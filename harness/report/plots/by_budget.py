"""What is left against what was kept: a panel a method, the others pale behind it.

Points stand where they were measured: methods that keep the same would hide each other's intervals in
one panel, and moving them aside would draw budgets that nobody ran.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.report.bootstrap import Estimate
from harness.report.divergence import divergence, kl_averages
from harness.report.plots.style import (
    BAND,
    COLUMN,
    PAGE,
    PALE,
    REFERENCE,
    Look,
    Plot,
    Undrawn,
    columns_of,
    grid,
    intervals,
    is_full,
    legend,
    reference_mark,
    render,
    text_width,
    variants,
    whiskers,
    wrap,
)
from harness.report.run import Run, averages
from harness.report.words import count_tasks, gaps, setting
from kvmerge.names import parse_name

_MIB = 2.0**-20
_POINTS_SPAN, _KL_SPAN, _SHARE_SPAN = 20.0, 0.1, 0.1
"""What a vertical axis spans at least: points of a score, nats, a share of another number. Without it
differences that mean nothing would fill the panel."""
_FEW = 4
"""Panels that stand two by two in a column; more take the page's width."""
_PANEL = 1.35
"""Inches of a row of panels."""
_BARS = "Bars and band"
_GAP = (math.nan, math.nan)
"""Where a line is interrupted."""
_MEMORY: Any = {"color": REFERENCE, "linestyle": (0, (1, 1.5)), "linewidth": 0.9}


@dataclass(frozen=True)
class _Axis:
    """What runs along one side of every panel."""

    label: str
    low: float
    high: float
    ticks: Mapping[float, str] | None = None
    """Text by place; None: round numbers."""


@dataclass(frozen=True)
class _Seen:
    """What one figure shows: where each cell stands, and where the full cache does."""

    x: Mapping[str, float]
    y: Mapping[str, Estimate]
    across: _Axis
    up: _Axis
    full: Estimate | None = None
    full_x: float | None = None


def average_by_budget(run: Run, by_method: Mapping[str, Look]) -> Plot | Undrawn:
    """Draw the average score against achieved budget."""
    title = "Average score against budget"
    points, full = _average(run)
    if not points:
        return Undrawn(title, _no_average(run))
    up = _score_axis(run, points)
    seen = _Seen(_achieved(run, points), points, _budget_axis(run, points), up, full)
    return _plot(run, by_method, seen, "average_by_budget", title, _average_caption(run, points))


def average_by_memory(run: Run, by_method: Mapping[str, Look]) -> Plot | Undrawn:
    """Draw the average score against the bytes of the cache."""
    title = "Average score against memory"
    points, full = _average(run)
    bytes_of = {cell: _MIB * run.over_tasks(cell)["kv_bytes"] for cell in points}
    if not points:
        return Undrawn(title, _no_average(run))
    if any(map(math.isnan, bytes_of.values())):
        return Undrawn(title, "The bytes of the cache are not recorded.")
    full_x = _MIB * run.over_tasks(run.full_cell)["kv_bytes"] if run.full_cell else None
    most = max([*bytes_of.values(), *([full_x] if full_x else [])])
    across = _Axis("keys and values after prefill, MiB a sample", 0, 1.06 * most)
    seen = _Seen(bytes_of, points, across, _score_axis(run, points), full, full_x)
    return _plot(run, by_method, seen, "average_by_memory", title, _average_caption(run, points))


def kl_by_budget(run: Run, by_method: Mapping[str, Look]) -> Plot | Undrawn:
    """Draw KL(full || cell) against achieved budget, mean over tasks."""
    title = "KL to the full cache against budget"
    points = {cell: scored.estimate() for cell, scored in kl_averages(run).items()}
    if not points:
        return Undrawn(title, "KL to the full cache is not recorded.")
    up = _span("KL(full || cell), nats a token", [*points.values()], _KL_SPAN, (0, math.inf))
    seen = _Seen(_achieved(run, points), points, _budget_axis(run, points), up)
    over = count_tasks(len(divergence(run).tasks))
    caption = (
        "KL(full || cell) along the full cache's own answer, mean over positions, samples, then "
        f"{over}, 0 where nothing changed: {setting(run)}. {intervals(points.values(), 'Bars')}"
    )
    return _plot(run, by_method, seen, "kl_by_budget", title, caption)


def unaveraged_by_budget(run: Run, by_method: Mapping[str, Look]) -> list[Plot]:
    """Draw each task that has no place in the average, such as a perplexity, against budget."""
    return [
        plot
        for task, metric in run.metrics.items()
        if not metric.averaged and metric.parts and (plot := _task_by_budget(run, task, by_method))
    ]


def _task_by_budget(run: Run, task: str, by_method: Mapping[str, Look]) -> Plot | None:
    shown = {
        cell: run.scores[task, cell].estimate() for cell in run.cells if (task, cell) in run.scores
    }
    points = {cell: at for cell, at in shown.items() if not is_full(cell)}
    if not points:
        return None
    metric = run.metrics[task]
    name, better = metric.name, "higher" if metric.higher_is_better else "lower"
    middle = abs(next(iter(points.values())).value)
    up = _span(f"{name} ({better} is better)", [*shown.values()], _SHARE_SPAN * middle)
    full = shown.get(run.full_cell) if run.full_cell else None
    seen = _Seen(_achieved(run, points), points, _budget_axis(run, points), up, full)
    title = f"{name.capitalize()} of {task} against budget"
    caption = (
        f"{name.capitalize()} of {task}, {better} is better: {setting(run)}. "
        f"{intervals(shown.values(), _BARS)}"
    )
    return _plot(run, by_method, seen, f"{name}_{task}", title, caption)


def _average(run: Run) -> tuple[dict[str, Estimate], Estimate | None]:
    """Return the average of each compressing cell, and the full cache's."""
    averaged = {cell: scored.estimate() for cell, scored in averages(run).items()}
    full = averaged.pop(run.full_cell, None) if run.full_cell else None
    return averaged, full


def _no_average(run: Run) -> str:
    if not run.averaged_tasks:
        return "No task has a score of 0 to 100."
    return "No cell beside the full cache has records of every task."


def _average_caption(run: Run, points: Mapping[str, Estimate]) -> str:
    over = count_tasks(len(run.averaged_tasks))
    return (
        f"Average score (plain mean over {over}): {setting(run)}. {intervals(points.values(), _BARS)} "
        "Each cell stands on its own; the contrasts have the paired intervals."
    )


def _achieved(run: Run, cells: Mapping[str, Estimate]) -> dict[str, float]:
    return {cell: 100 * run.over_tasks(cell)["budget_achieved_mean"] for cell in cells}


def _budget_axis(run: Run, cells: Mapping[str, Estimate]) -> _Axis:
    """Return an axis with a tick at each budget that was kept: the requested one where that was met."""
    ticks = {}
    for cell, achieved in _achieved(run, cells).items():
        budget = parse_name(cell).budget.value
        met = isinstance(budget, float) and abs(achieved - 100 * budget) <= max(0.5, budget)
        at = 100 * budget if met else achieved
        ticks[at] = f"{at:.3g}"
    room = max(0.1 * (max(ticks) - min(ticks)), 0.05 * max(ticks))
    low, high = min(ticks) - room, max(ticks) + room
    label = "entries kept after prefill, % of the prompt's tokens"
    return _Axis(label, low, high, dict(sorted(ticks.items())))


def _score_axis(run: Run, cells: Mapping[str, Estimate]) -> _Axis:
    points, full = _average(run)
    shown = [*points.values(), *([full] if full else [])]
    return _span("average score", shown, _POINTS_SPAN, (0, 100))


def _span(
    label: str,
    shown: Sequence[Estimate],
    least: float,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> _Axis:
    """Return an axis that holds all intervals, no shorter than `least`, nowhere beyond `within`.

    A little room stays on either side, so that a mark at an end is whole.
    """
    ends = [end for e in shown for end in (e.low, e.value, e.high) if not math.isnan(end)]
    low, high = min(ends), max(ends)
    if within[0] == 0 and math.isinf(within[1]):
        low = 0.0
    missing = max(0.0, least - (high - low))
    low, high = max(within[0], low - missing / 2), min(within[1], high + missing / 2)
    low, high = max(within[0], min(low, high - least)), min(within[1], max(high, low + least))
    room = 0.06 * (high - low)
    return _Axis(label, low - room, high + room)


def _plot(
    run: Run, by_method: Mapping[str, Look], seen: _Seen, name: str, title: str, caption: str
) -> Plot:
    figure = _figure(seen, by_method)
    return render(figure, name, title, " ".join((caption, *gaps(run))), _alt(seen, by_method))


def _figure(seen: _Seen, by_method: Mapping[str, Look]) -> Figure:
    methods = variants(seen.y)
    columns = columns_of(len(methods), 2 if len(methods) <= _FEW else 4)
    width = COLUMN if len(methods) <= _FEW else PAGE
    rows = -(-len(methods) // columns)
    figure = Figure((width, rows * _PANEL + 0.75), layout="constrained")
    axes, rest = grid(figure, len(methods), columns, sharex=True, sharey=True)
    for place, (axis, method) in enumerate(zip(axes, methods, strict=True)):
        _draw_panel(axis, method, methods, seen, by_method)
        room = 72 * width / columns
        axis.set_title(wrap(by_method[method].label, int(room / 4.6)))
        axis.tick_params(labelleft=place % columns == 0, labelbottom=place + columns >= len(methods))
    axes[0].set_xlim(seen.across.low, seen.across.high)
    axes[0].set_ylim(seen.up.low, seen.up.high)
    if seen.across.ticks is not None:
        _set_ticks(axes[0], seen.across, 72 * width / columns - 30)
    figure.supxlabel(seen.across.label)
    figure.supylabel(seen.up.label)
    entries: list[tuple[Any, str]] = []
    if seen.full:
        entries.append((reference_mark(), by_method["full"].label))
    if seen.full_x:
        entries.append((Line2D([], [], **_MEMORY), "its memory"))
    if len(methods) > 1:
        entries.append((Line2D([], [], color=PALE, marker=".", markersize=4), "the other methods"))
    if entries:
        legend(figure, entries, rest)
    return figure


def _draw_panel(
    axis: Axes, method: str, methods: Sequence[str], seen: _Seen, by_method: Mapping[str, Look]
) -> None:
    if seen.full:
        if not math.isnan(seen.full.low):
            axis.axhspan(seen.full.low, seen.full.high, color=BAND, linewidth=0, zorder=0)
        axis.axhline(seen.full.value, color=REFERENCE, linestyle=(0, (4, 2)), zorder=1.5)
    if seen.full_x:
        axis.axvline(seen.full_x, **_MEMORY, zorder=1.5)
    # One line with gaps: of n methods n lines in n panels would take minutes.
    pale = [
        point
        for other in methods
        if other != method
        for point in (*((seen.x[c], seen.y[c].value) for c in _along(seen, other)), _GAP)
    ]
    axis.plot(
        *np.transpose(pale or [_GAP]), color=PALE, marker=".", markersize=4, linewidth=0.8, zorder=1.8
    )
    cells = _along(seen, method)
    look = by_method[method]
    axis.errorbar(
        [seen.x[c] for c in cells],
        [seen.y[c].value for c in cells],
        yerr=whiskers([seen.y[c] for c in cells]),
        color=look.colour,
        marker=look.marker,
        elinewidth=0.9,
        capsize=2,
    )


def _along(seen: _Seen, method: str) -> list[str]:
    """Return a method's cells from the least that is kept on."""
    return sorted((c for c in seen.y if parse_name(c).variant == method), key=seen.x.__getitem__)


def _set_ticks(axis: Axes, across: _Axis, points: float) -> None:
    """Put a tick at every budget, and its number wherever it does not touch the one before."""
    end = -math.inf
    texts = []
    for place, text in (across.ticks or {}).items():
        middle = points * (place - across.low) / (across.high - across.low)
        half = text_width(text) / 2 + 1.5
        texts.append(text if middle - half > end else "")
        end = middle + half if texts[-1] else end
    axis.set_xticks([*(across.ticks or {})], texts)


def _alt(seen: _Seen, by_method: Mapping[str, Look]) -> str:
    lines = [
        f"{by_method[method].label} "
        + ", ".join(f"{seen.y[c].value:.3g} at {seen.x[c]:.3g}" for c in _along(seen, method))
        for method in variants(seen.y)
    ]
    full = f" The full cache has {seen.full.value:.3g}." if seen.full else ""
    return f"{seen.up.label} against {seen.across.label}: {'; '.join(lines)}.{full}"
