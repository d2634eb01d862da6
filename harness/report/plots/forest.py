"""Contrasts as forest plots: a row a pair of cells, a line its intervals, a mark its verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness.judgement import Judgement
from harness.report.contrasts import AVERAGE, LEVEL, Contrast, Verdict, contrasts
from harness.report.divergence import KL
from harness.report.names import budget_label, method_label
from harness.report.plots.style import (
    BAND,
    COLOURS,
    COLUMN,
    INK,
    PAGE,
    REFERENCE,
    Plot,
    Undrawn,
    legend,
    render,
    text_width,
    wrap,
)
from harness.report.run import Run
from harness.report.words import count_tasks, gaps, setting
from kvmerge.names import parse_name

_MOST = 24
"""Rows of a figure; the table has all of them."""
_ROW, _LINE = 12.0, 9.0
"""Points: a row of one line, and each further line of its label."""
_LABEL = 26
"""Letters of a label to a line."""
_QUESTION = "kvmerger"
"""The method whose contrasts are drawn first: what the comparison is about."""
_MARKS: Mapping[Verdict | None, Any] = {
    Verdict.FIRST: {"marker": "^", "color": COLOURS[0]},
    Verdict.SECOND: {"marker": "v", "color": COLOURS[1]},
    Verdict.EQUIVALENT: {"marker": "s", "color": COLOURS[2]},
    Verdict.UNRESOLVED: {"marker": "o", "color": INK, "markerfacecolor": "white"},
    None: {"marker": "x", "color": INK},
}
_WORDS: Mapping[Verdict | None, str] = {
    Verdict.FIRST: "first better",
    Verdict.SECOND: "second better",
    Verdict.EQUIVALENT: "equivalent",
    Verdict.UNRESOLVED: "unresolved",
    None: "no verdict",
}


def forests(run: Run, judgement: Judgement) -> list[Plot | Undrawn]:
    """Draw the contrasts of methods, on the average and on KL, and those with the full cache."""
    full = run.full_cell
    found = contrasts(run)
    of_score = [contrast for contrast in found if contrast.task == AVERAGE]
    between = [contrast for contrast in of_score if contrast.second != full]
    with_full = [contrast for contrast in of_score if contrast.second == full]
    on_kl = [contrast for contrast in found if contrast.task == KL]
    drawn: list[Plot | Undrawn] = [
        _forest(run, between, judgement.margin, "contrasts", "Contrasts of methods at one budget")
        if between
        else Undrawn("Contrasts of methods", "No two have a budget and all averaged tasks in common."),
        _forest(run, with_full, judgement.margin, "contrasts_full", "Contrasts with the full cache")
        if with_full
        else Undrawn(
            "Contrasts with the full cache", "The run has none, or nothing to compare with it."
        ),
    ]
    if on_kl:
        drawn.append(
            _forest(run, on_kl, judgement.margin, "contrasts_kl", "Contrasts of methods on KL")
        )
    return drawn


def _forest(run: Run, found: Sequence[Contrast], margin: float, name: str, title: str) -> Plot:
    shown = _most_asked(found)
    on_kl = found[0].task == KL
    verdicts = [contrast.verdict(margin) for contrast in shown]
    counts = [
        f"{_WORDS[verdict]}: {verdicts.count(verdict)}" for verdict in _MARKS if verdict in verdicts
    ]
    what = (
        "KL to the full cache (nats, less is better)"
        if on_kl
        else (f"average score over {count_tasks(len(run.averaged_tasks))}")
    )
    margin_words = "" if on_kl else f" Band: the margin of ±{margin:g} points."
    lacking = "; none where a task has one sample" if None in verdicts else ""
    caption = (
        f"Difference of the {what}, first minus second: {setting(run)}. Thin line: 95%, thick: 90% "
        f"interval, paired by sample id{lacking}.{margin_words} Better: adjusted p below {LEVEL:g}, "
        "over all rows of the table of contrasts."
    )
    if len(shown) < len(found):
        caption += (
            f" Of {len(found)} contrasts {len(shown)} are drawn, those of {method_label(_QUESTION)} "
            "first; the table has the others."
        )
    return render(
        _figure(shown, margin, on_kl),
        name,
        title,
        " ".join((caption, *gaps(run))),
        f"Differences of the {what}, a row a pair of cells. {', '.join(counts).capitalize()}.",
    )


def _most_asked(found: Sequence[Contrast]) -> list[Contrast]:
    """Return what there is room for, in the table's order, the method in question first."""

    def asked(contrast: Contrast) -> bool:
        return _QUESTION in (parse_name(cell).variant for cell in (contrast.first, contrast.second))

    places = sorted(range(len(found)), key=lambda place: not asked(found[place]))[:_MOST]
    return [found[place] for place in sorted(places)]


def _figure(shown: Sequence[Contrast], margin: float, on_kl: bool) -> Figure:
    groups = _groups(shown)
    totals = [sum(map(_height, members)) for members in groups.values()]
    widest = max(text_width(label) for members in groups.values() for label in members)
    width = COLUMN if widest < 36 * COLUMN else PAGE
    height = (sum(totals) + 20 * len(groups)) / 72 + 0.65
    figure = Figure((width, height), layout="constrained")
    below: Any = {"height_ratios": totals}
    axes = figure.subplots(len(groups), squeeze=False, sharex=True, gridspec_kw=below)[:, 0]
    for axis, total, (title, members) in zip(axes, totals, groups.items(), strict=True):
        axis.set_title(title)
        axis.grid(visible=False, axis="y")
        axis.grid(visible=True, axis="x")
        if not on_kl:
            axis.axvspan(-margin, margin, color=BAND, linewidth=0, zorder=0)
        axis.axvline(0, color=REFERENCE, linewidth=0.8, zorder=1)
        ends = accumulate(map(_height, members))
        middles = [end - _height(label) / 2 for end, label in zip(ends, members, strict=True)]
        for middle, contrast in zip(middles, members.values(), strict=True):
            _draw_row(axis, middle, contrast, margin)
        axis.set_ylim(total, 0)
        axis.set_yticks(middles, list(members))
        axis.tick_params(axis="y", length=0)
    low, high = _reach(shown, margin, on_kl)
    axes[0].set_xlim(low, high)
    unit = "KL, nats" if on_kl else "average score, points"
    axes[-1].set_xlabel(f"first − second: {unit}")
    legend(figure, _entries(shown, margin, on_kl))
    return figure


def _groups(shown: Sequence[Contrast]) -> dict[str, dict[str, Contrast]]:
    """Return the contrasts of each budget by label; all together where each budget has but one."""
    groups: dict[str, dict[str, Contrast]] = {}
    for contrast in shown:
        first, second = (parse_name(cell) for cell in (contrast.first, contrast.second))
        pair = f"{method_label(first.variant)} − {method_label(second.variant)}"
        budget = budget_label(first.budget)
        groups.setdefault(f"budget {budget}", {})[wrap(pair, _LABEL)] = contrast
    if len(shown) > len(groups) or len(shown) == 1:
        return groups
    # As many titles as rows would be more to read than a budget in each label.
    return {
        "": {
            wrap(f"{label}, {title.removeprefix('budget ')}", _LABEL): contrast
            for title, members in groups.items()
            for label, contrast in members.items()
        }
    }


def _height(label: str) -> float:
    """Return the points that a row takes."""
    return _ROW + _LINE * label.count("\n")


def _draw_row(axis: Axes, at: float, contrast: Contrast, margin: float) -> None:
    style = _MARKS[contrast.verdict(margin)]
    for (low, high), linewidth in ((contrast.interval, 0.9), (contrast.narrow, 2.4)):
        if not math.isnan(low):
            axis.plot((low, high), (at, at), color=style["color"], linewidth=linewidth)
    axis.plot(contrast.value, at, linestyle="none", markersize=5, zorder=3, **style)


def _reach(shown: Iterable[Contrast], margin: float, on_kl: bool) -> tuple[float, float]:
    """Return what the horizontal axis spans: all intervals, 0, and the margin with room around it."""
    ends = [end for c in shown for end in (c.value, *c.interval) if not math.isnan(end)]
    around = 0.05 if on_kl else 2 * margin
    low, high = min(*ends, -around), max(*ends, around)
    room = 0.04 * (high - low)
    return low - room, high + room


def _entries(shown: Sequence[Contrast], margin: float, on_kl: bool) -> list[tuple[Any, str]]:
    present = {contrast.verdict(margin) for contrast in shown}
    entries: list[tuple[Any, str]] = [
        (Line2D([], [], linestyle="none", markersize=5, **style), _WORDS[verdict])
        for verdict, style in _MARKS.items()
        if verdict in present
    ]
    if not on_kl:
        entries.append((Patch(facecolor=BAND), f"margin, ±{margin:g}"))
    return entries
