"""Every figure of a run, in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl

from harness.judgement import Judgement
from harness.report.plots.by_budget import (
    average_by_budget,
    average_by_memory,
    kl_by_budget,
    unaveraged_by_budget,
)
from harness.report.plots.by_task import scores_by_task
from harness.report.plots.flips import flips_by_task
from harness.report.plots.forest import forests
from harness.report.plots.heat_maps import heat_maps
from harness.report.plots.style import STYLE, Look, Plot, Undrawn
from harness.report.run import Run


@dataclass(frozen=True)
class Drawn:
    """The figures of a run, and a sentence for each that it has no numbers for."""

    plots: tuple[Plot, ...]
    notes: tuple[str, ...] = ()


def draw_all(run: Run, by_method: Mapping[str, Look], judgement: Judgement) -> Drawn:
    """Draw every figure that the run has numbers for.

    Args:
        judgement: which differences count.
    """
    with mpl.rc_context(STYLE):
        found = [
            *forests(run, judgement),
            average_by_budget(run, by_method),
            average_by_memory(run, by_method),
            kl_by_budget(run, by_method),
            *unaveraged_by_budget(run, by_method),
            scores_by_task(run, by_method),
            flips_by_task(run, by_method, judgement.flips),
            *heat_maps(run),
        ]
    return Drawn(
        tuple(one for one in found if isinstance(one, Plot)),
        tuple(str(one) for one in found if isinstance(one, Undrawn)),
    )
