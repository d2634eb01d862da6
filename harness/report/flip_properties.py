"""What goes with a flip: samples that a cell loses beside those that it keeps.

Compared are samples that the full cache answers well, and within tasks: these differ both in length and
in what is lost. What goes with a flip need not cause it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.metric import Array
from harness.judgement import FlipRule
from harness.records import Record
from harness.report.bootstrap import Samples, Scored, generator_of, resampled_means
from harness.report.contrasts import holm
from harness.report.flips import Flips, flips
from harness.report.groups import Value, group_values, groups_of
from harness.report.run import Run
from harness.threads import in_threads

R = TypeVar("R")

SHUFFLES = 9_999
_LEAST = 2
"""Samples that a task must have on either side, for its values to scatter."""
_BATCH = 500  # shuffles drawn at once, task by task: the draw depends on it
_HELD = 100  # of these, whose values are held at once: bounds memory
_DIGITS = 10  # decimals of a statistic: equal differences must tie, however they were summed


@dataclass(frozen=True)
class Property:
    """A number that samples have, of the samples that a cell loses and of those that it keeps.

    Means are within tasks and then over these, each task weighing as much as its two sides can tell:
    lost times kept, by their sum. So a difference between tasks is none here.
    """

    cell: str
    name: str
    tasks: tuple[str, ...]
    """Those with two lost and two kept samples at least, which all have the property."""
    lost: int
    """Samples of these tasks."""
    kept: int
    of_lost: float
    """Mean of the property."""
    of_kept: float
    difference: Scored
    """`of_lost` less `of_kept`; both sides of each task are resampled."""
    p: float
    """Two-sided: what is lost is drawn anew within tasks."""
    p_adjusted: float = math.nan
    """By Holm's method over all properties and cells of a run."""


@dataclass(frozen=True)
class Rate:
    """How many samples of one group a cell loses."""

    cell: str
    name: str
    """What the samples are grouped by."""
    value: Value
    lost: int
    well: int
    """Samples of the group that the full cache answers well."""


def properties(run: Run, rule: FlipRule) -> list[Property]:
    """Return every cell and property that two samples of one task on either side tell something of.

    A property that has one value in every task is left out, as is a cell that loses all or nothing, and
    a task whose samples share contexts: what is lost is drawn as if each were independent.
    """
    return run.once(f"flip properties {rule}", lambda: _properties(run, rule))


def _properties(run: Run, rule: FlipRule) -> list[Property]:
    told = [
        of
        for of in flips(run, rule)
        if _LEAST <= len(of.lost) <= len(of.well) - _LEAST and of.task not in run.sharing
    ]
    by_cell: dict[str, list[_Stratum]] = defaultdict(list)
    for of in told:
        by_cell[of.cell].append(_stratum(run, of))
    p_values = _compared(by_cell)

    def of_cell(cell: str) -> list[Property]:
        return _of_cell(cell, by_cell.pop(cell), p_values)  # with all that is resampled

    cells = [cell for cell in run.cells if cell in by_cell]
    found = [one for of_one in in_threads(of_cell, cells) for one in of_one]
    adjusted = holm([one.p for one in found])
    return [replace(one, p_adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def rates(run: Run, rule: FlipRule) -> list[Rate]:
    """Return the losses of every cell by each value of what the benchmark groups its samples by.

    Names with one value everywhere say nothing and are left out, as is a group without a sample that
    the full cache answers well.
    """
    counts: dict[tuple[str, str, Value], list[bool]] = defaultdict(list)
    for one in flips(run, rule):
        groups, lost = _of_full(run, one.task, groups_of), set(one.lost)
        for sample in one.well:
            for name, value in groups[sample].items():
                counts[one.cell, name, value].append(sample in lost)
    return [
        Rate(cell, name, value, sum(of), len(of))
        for name, values in group_values(run).items()
        if len(values) > 1
        for cell in run.cells
        for value in values
        if (of := counts[cell, name, value])
    ]


def _of_full(run: Run, task: str, part: Callable[[Record], R]) -> Mapping[str, R]:
    """Return a part of the record of each sample that the full cache answered."""

    def parts() -> Mapping[str, R]:
        return {record.id: part(record) for record in run.of(task, run.full_cell or "")}

    return run.once(f"full cache's {part.__name__} of {task}", parts)


def _numbers(record: Record) -> dict[str, float]:
    """Return what a sample of a task is told apart by, from the full cache's record of it."""
    answers = [len(answer) for answer in record.answers]
    known = {
        "prompt tokens": float(record.prompt_tokens),
        "full's answer tokens": float(record.generated_tokens),
    }
    if answers:
        known["gold answer characters"] = float(np.mean(answers))
    grouped = {name: float(v) for name, v in groups_of(record).items() if not isinstance(v, str)}
    return known | grouped


@dataclass(frozen=True)
class _Stratum:
    """The numbers of one task's samples."""

    task: str
    names: tuple[str, ...]
    """Of properties that all samples of the task have: the parts of `samples`."""
    samples: Samples
    lost: NDArray[np.bool_]
    """`(samples,)`"""

    @property
    def weight(self) -> float:
        """Return what the task weighs: one by the variance of its difference, but for the scatter."""
        lost = int(self.lost.sum())
        return lost * (len(self.lost) - lost) / len(self.lost)

    @cached_property
    def sides(self) -> tuple[dict[str, Scored], dict[str, Scored]]:
        """The mean of each property over the lost samples and over those kept, resampled."""
        return self._side(self.lost), self._side(~self.lost)

    def _side(self, chosen: NDArray[np.bool_]) -> dict[str, Scored]:
        taken = self.samples.only(np.array(self.samples.ids)[chosen].tolist())
        means = taken.parts.mean(axis=0)
        drawn = resampled_means(self.task, taken)
        return {name: Scored(float(means[i]), drawn[:, i]) for i, name in enumerate(self.names)}

    def centred(self, names: Sequence[str]) -> Array:
        """Return the values less their means, `(samples, names)`; 0 of what the task has not."""
        values = self.samples.parts
        by_name = dict(zip(self.names, (values - values.mean(axis=0)).T, strict=True))
        return np.stack([by_name.get(name, np.zeros(len(values))) for name in names], axis=1)


def _stratum(run: Run, of: Flips) -> _Stratum:
    numbers = _of_full(run, of.task, _numbers)
    known = [numbers[sample] for sample in of.well]
    names = tuple(name for name in known[0] if all(name in each for each in known))
    values = np.array([[each[name] for name in names] for each in known])
    return _Stratum(of.task, names, Samples(of.well, values), np.isin(of.well, of.lost))


def _compared(by_cell: Mapping[str, Sequence[_Stratum]]) -> dict[tuple[str, str], float]:
    """Return the p-values of every cell and property, from one draw for cells of the same samples."""
    alike: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = defaultdict(list)
    for cell, strata in by_cell.items():
        alike[tuple((stratum.task, stratum.samples.ids) for stratum in strata)].append(cell)
    found: dict[tuple[str, str], float] = {}
    for cells in alike.values():
        if names := _varying(by_cell[cells[0]]):
            p_values = _p_values([by_cell[cell] for cell in cells], names)
            for cell, of_cell in zip(cells, p_values, strict=True):
                found |= {(cell, name): p for name, p in zip(names, of_cell, strict=True)}
    return found


def _varying(strata: Sequence[_Stratum]) -> list[str]:
    """Name the properties that have more than one value in some task."""
    names = dict.fromkeys(name for stratum in strata for name in stratum.names)
    return [name for name in names if any(stratum.centred([name]).any() for stratum in strata)]


def _of_cell(
    cell: str, strata: Sequence[_Stratum], p_values: Mapping[tuple[str, str], float]
) -> list[Property]:
    return [_property(cell, name, strata, p_values[cell, name]) for name in _varying(strata)]


def _property(cell: str, name: str, of_cell: Sequence[_Stratum], p: float) -> Property:
    strata = [stratum for stratum in of_cell if name in stratum.names]
    lost, kept = (_weighted(name, strata, side) for side in (0, 1))
    n_lost = sum(int(stratum.lost.sum()) for stratum in strata)
    return Property(
        cell,
        name,
        tuple(stratum.task for stratum in strata),
        lost=n_lost,
        kept=sum(len(stratum.lost) for stratum in strata) - n_lost,
        of_lost=lost.value,
        of_kept=kept.value,
        difference=lost.minus(kept),
        p=p,
    )


def _weighted(name: str, strata: Sequence[_Stratum], side: int) -> Scored:
    means = [stratum.sides[side][name] for stratum in strata]
    weights = [stratum.weight for stratum in strata]
    return Scored(
        float(np.average([mean.value for mean in means], weights=weights)),
        np.average([mean.replicates for mean in means], axis=0, weights=weights),
    )


def _p_values(cells: Sequence[Sequence[_Stratum]], names: Sequence[str]) -> list[list[float]]:
    """Draw what is lost anew within tasks, as many as were lost, for all properties at once.

    The weighted difference is a sum over the lost samples, each less its task's mean, times a constant.
    (`scipy.stats.permutation_test` would exchange samples of different tasks too.)

    Args:
        cells: the strata of each, which are the same but for what is lost: one draw serves them all.
        names: of the properties.

    Returns:
        for each cell, the p-value of each property.
    """
    strata = cells[0]
    centred = np.concatenate([stratum.centred(names) for stratum in strata])
    centred /= np.abs(centred).sum(axis=0)
    lost = np.stack([np.concatenate([one.lost for one in of]) for of in cells]).astype(np.float64)
    observed = (lost @ centred).round(_DIGITS)
    as_low, as_high = np.ones((2, *observed.shape))  # the observed one among them
    for places in _shuffles(strata):
        moved = np.empty((len(centred), len(places), len(names)))
        moved[places, np.arange(len(places))[:, None]] = centred
        drawn = (lost @ moved.reshape(len(centred), -1)).round(_DIGITS)
        drawn = drawn.reshape(len(cells), len(places), len(names))
        as_low += (drawn <= observed[:, None]).sum(axis=1)
        as_high += (drawn >= observed[:, None]).sum(axis=1)
    return np.minimum(2 * np.minimum(as_low, as_high) / (SHUFFLES + 1), 1).tolist()


def _shuffles(strata: Sequence[_Stratum]) -> Iterator[NDArray[np.int32]]:
    """Yield which sample's place every sample takes, its task's ones in a random order.

    A row a shuffle, `(up to _HELD, samples)`: there are `SHUFFLES` in all.
    """
    ends = np.cumsum([len(stratum.lost) for stratum in strata], dtype=np.int32)
    rows = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
    generator = generator_of(
        name for stratum in strata for name in (stratum.task, *stratum.samples.ids)
    )
    for start in range(0, SHUFFLES, _BATCH):
        count = min(_BATCH, SHUFFLES - start)
        of_task = [generator.permuted(np.tile(own, (count, 1)), axis=1) for own in rows]
        drawn = np.concatenate(of_task, axis=1)
        yield from (drawn[first : first + _HELD] for first in range(0, count, _HELD))
