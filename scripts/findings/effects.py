"""Planned contrasts: what folding adds to a selection, step by step, and what each method adds to H2O.

A cell is compared with at most two others, so that a family stays small. Which they are follows from
names alone, not from numbers; but it was not written down before anything was run: a first look at two
selections preceded it, and the comparison of each method with ours was added when ours was there. The
intervals and p-values are those of the reports (`harness.report.contrasts`): paired, by whole contexts,
adjusted by Holm's method over the contrasts of one run. The tasks of a run are pooled, since some have
one sample: every sample counts alike, and is drawn from all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from benchmarks.metric import Metric
from harness.records import Record
from harness.report.bootstrap import Scored, average
from harness.report.contrasts import Contrast, planned
from harness.report.run import Run
from kvmerge.cells import Cell, parse_cell

_DROP, _VALUES = "fold=drop", "route=cosine"
STEPS: Mapping[str, tuple[str, str]] = {
    "values, by position": ("", _DROP),
    "values, by key": (_VALUES, _DROP),
    "values, by attention": ("route=attention", _DROP),
    "keys and values": ("fold=keys_values,route=cosine", _DROP),
    "values and mass": ("bias=log_mass,route=cosine", _DROP),
    "mass alone": ("bias=log_mass,fold=drop,route=cosine", _DROP),
    "values fitted": ("fold=drop,refit=values", _DROP),
    "mass fitted": ("fold=drop,refit=bias", _DROP),
    "values and mass fitted": ("fold=drop,refit=both", _DROP),
    "keys besides values": ("fold=keys_values,route=cosine", _VALUES),
    "mass besides values": ("bias=log_mass,route=cosine", _VALUES),
}
"""What becomes of tokens that are not kept, and what that is compared with, as options of `fold`."""
OURS = {"0.35": "replay@0.341", "0.2": "replay@0.195"}
"""Our own method at budgets where it stores no more bytes than a method without any beside its keys and
values does at 0.35 and 0.2; how heads of different lengths are told apart counts."""
INSTEAD_OF_OURS = "instead of replay, which stores no more"
"""The step from our own method to another."""
INSTEAD = "instead of h2o"
"""The step from H2O's selection to another, or to another method."""
OWN_SETS = "merged, of its own sets"
"""The step from KVMerger's pivots alone to KVMerger."""
ALL = "all"
"""The mean over the selections."""
_YARDSTICK = "h2o"
_POOL = "samples"
_SCORE = Metric("score", lambda prediction, answers, all_classes=None: {}, parts=("score",))


class Place(NamedTuple):
    """Where a step is taken."""

    step: str
    keep: str
    """The selection, or the method that takes its place."""
    budget: str


@dataclass(frozen=True)
class Effect:
    """What one step does in one run."""

    place: Place
    measure: str
    """`kl` (nats, lower is better), or `average` (of the tasks' scores)."""
    n: int
    contexts: int
    scored: Scored
    """The difference, with its bootstrap replicates."""
    p_adjusted: float
    """NaN for a mean over selections, which stands on its interval alone."""
    needed: int | None
    """Samples that would resolve a score to the margin (`Contrast.needed`)."""
    bytes_ratio: float


class Pooled(Run):
    """A run whose tasks are one: samples are what is drawn, as a task may have a single one."""

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The score of a sample, 0 to 100, whatever its task's metric is."""
        return dict.fromkeys(self.tasks, _SCORE)


def pooled(run: Run) -> Run:
    """Return a run with all samples in one task; as it is where scores are not of 0 to 100."""
    if not all(metric.averaged for metric in run.metrics.values()):
        return run
    records: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for (task, cell), lines in run.records.items():
        records[_POOL, cell] += [replace(line, id=f"{task}/{line.id}") for line in lines]
    return Pooled(run.output_dir, run.info, {_POOL: _SCORE.name}, run.cells, records)


def of_folding(run: Run, margin: float) -> list[Effect]:
    """Return what folding does to each selection of a run, and on the mean over the selections.

    Args:
        run: of the factorial.
        margin: points that a score must be known to.
    """
    found = _effects(run, dict(_steps([parse_cell(cell) for cell in run.cells])), margin)
    alike: dict[tuple[str, str, str], list[Effect]] = defaultdict(list)
    for effect in found:
        if effect.place.step in STEPS:
            alike[effect.place.step, effect.place.budget, effect.measure].append(effect)
    return found + [_mean(effects) for effects in alike.values()]


def of_methods(run: Run, margin: float) -> list[Effect]:
    """Return what each method changes that stands in the place of H2O at its budget, or of ours."""
    cells = [cell for cell in map(parse_cell, run.cells) if not cell.is_full]
    places: dict[tuple[str, str], Place] = {}
    for cell in cells:
        budget, method = str(cell.budget), _variant(cell)
        for other, step in ((f"{_YARDSTICK}@{budget}", INSTEAD), (OURS.get(budget), INSTEAD_OF_OURS)):
            if other in run.cells and other.partition("@")[0] != method:
                places[cell.name, other] = Place(step, method, budget)
    return _effects(run, places, margin)


def _steps(cells: Sequence[Cell]) -> Iterator[tuple[tuple[str, str], Place]]:
    """Yield pairs of cells that differ by one step."""
    names = {(_selection(cell), str(cell.budget)): cell.name for cell in cells}
    for ((keep, rest), budget), name in names.items():
        for step, (after, before) in STEPS.items():
            if rest == after and ((keep, before), budget) in names:
                yield (name, names[(keep, before), budget]), Place(step, keep, budget)
        yardstick = ((_YARDSTICK, _DROP), budget)
        if rest == _DROP and keep != _YARDSTICK and yardstick in names:
            yield (name, names[yardstick]), Place(INSTEAD, keep, budget)
        pivots = (("pivot_only", None), budget)
        if (keep, rest) == ("kvmerger", None) and pivots in names:
            yield (name, names[pivots]), Place(OWN_SETS, keep, budget)


def _selection(cell: Cell) -> tuple[str, str | None]:
    """Return what a cell keeps, and its other options; None where it is no `fold`."""
    if cell.method_name != "fold":
        return _variant(cell), None
    options = dict(cell.options)
    keep = str(options.pop("keep", _YARDSTICK))
    return keep, ",".join(f"{key}={value}" for key, value in sorted(options.items()))


def _variant(cell: Cell) -> str:
    return cell.name.rpartition("@")[0]


def _effects(run: Run, places: Mapping[tuple[str, str], Place], margin: float) -> list[Effect]:
    return [
        _effect(contrast, places[contrast.first, contrast.second], margin)
        for contrast in planned(run, list(places))
    ]


def _effect(contrast: Contrast, place: Place, margin: float) -> Effect:
    return Effect(
        place,
        contrast.task,
        contrast.n,
        contrast.contexts,
        contrast.scored,
        contrast.p_adjusted,
        contrast.needed(margin),
        contrast.bytes_ratio,
    )


def _mean(effects: Sequence[Effect]) -> Effect:
    """Return the mean of one step over selections; they share samples, and so their resamples."""
    first = effects[0]
    return Effect(
        first.place._replace(keep=ALL),
        first.measure,
        first.n,
        first.contexts,
        average([effect.scored for effect in effects]),
        float("nan"),
        None,
        float(np.mean([effect.bytes_ratio for effect in effects])),
    )
