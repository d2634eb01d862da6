"""The findings as figures: what folding does to the KL of each selection, a panel a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.divergence import KL
from harness.report.plots.style import COLOURS, MARKERS, PAGE, REFERENCE, STYLE
from scripts.findings.effects import ALL, Effect
from scripts.findings.tables import Key

_STEPS = (
    "values, by key",
    "keys and values",
    "mass alone",
    "values and mass",
    "values and mass fitted",
)
_BUDGET = "0.35"
_PANEL = 1.9
"""Inches of a row of panels."""
_ACROSS = 3


def draw(effects: Mapping[Key, Sequence[Effect]], out: Path) -> None:
    """Write folding.png: the change of KL at 35%, by step and selection, with 95% intervals."""
    panels = {name: found for (experiment, name), found in effects.items() if experiment == "merging"}
    if not panels:
        return
    rows = -(-len(panels) // _ACROSS)
    selections = list(
        dict.fromkeys(one.place.keep for found in panels.values() for one in _shown(found))
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, rows * _PANEL + 0.4), layout="constrained")
        grid = figure.subplots(rows, _ACROSS, squeeze=False, sharey=True)
        for axes, (name, found) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, name, _shown(found), selections)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        marks = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(marks.values(), marks, loc="outside upper center", ncols=len(marks))
        figure.supxlabel("change of KL to the full cache, nats (left is better)")
        figure.savefig(out / "folding.png", dpi=200)


def _shown(effects: Sequence[Effect]) -> list[Effect]:
    """Return what a panel shows: the change of KL by some steps, selection by selection."""
    return [
        effect
        for effect in effects
        if effect.measure == KL
        and effect.place.step in _STEPS
        and effect.place.budget == _BUDGET
        and effect.place.keep != ALL
    ]


def _panel(axes: Axes, name: str, effects: Sequence[Effect], selections: Sequence[str]) -> None:
    """Draw one setting: a row a step, a mark a selection, which has the same in every panel."""
    for number, keep in enumerate(selections):
        of_selection = {effect.place.step: effect for effect in effects if effect.place.keep == keep}
        if not of_selection:
            continue
        places = [place for place, step in enumerate(_STEPS) if step in of_selection]
        values = [of_selection[_STEPS[place]].scored.estimate() for place in places]
        axes.errorbar(
            [value.value for value in values],
            [place + 0.13 * (number - len(selections) / 2) for place in places],
            xerr=[
                [value.value - value.low for value in values],
                [value.high - value.value for value in values],
            ],
            fmt=MARKERS[number],
            color=COLOURS[number],
            markersize=3,
            elinewidth=0.8,
            label=keep,
        )
    axes.axvline(0, color=REFERENCE, linewidth=0.8)
    axes.set_yticks(range(len(_STEPS)), _STEPS)
    axes.set_ylim(len(_STEPS) - 0.4, -0.7)
    axes.grid(axis="x")
    axes.set_title(name)
