"""Which samples a cell breaks: those that the full cache answers well and the cell does not.

An average hides them: a cell that loses ten samples and gains nine is as good as the full cache on the
average, and not on ten samples. Such negative samples are what arXiv 2503.24000 looks at.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.metric import Array
from harness.judgement import FlipRule
from harness.report.run import Run
from kvmerge.names import parse_name

TOTAL = "total"

_DIGITS = 10  # decimals of a score: one that was averaged over seeds must meet the rule's bound


@dataclass(frozen=True)
class Flips:
    """The samples of one task that a cell loses to the full cache, or gains over it."""

    task: str
    cell: str
    n: int
    """Samples that both hold."""
    well: tuple[str, ...]
    """Ids that the full cache answers well."""
    lost: tuple[str, ...]
    """Of these, the ids that the cell answers worse by the drop or more."""
    gained: tuple[str, ...]
    """Ids that the cell answers well, and the full cache worse by the drop or more."""


def flips(run: Run, rule: FlipRule) -> Sequence[Flips]:
    """Return the flips of every task and cell that share samples with the full cache.

    In the run's order of tasks, then cells; none without a full cache. Methods that draw count by the
    mean score over their seeds. Tasks whose scores are not of 0 to 100 take no part (`without_flips`).
    """

    def found() -> list[Flips]:
        return [
            one
            for task in run.averaged_tasks
            for cell in run.cells
            if cell != run.full_cell and (one := _flips(run, rule, task, cell))
        ]

    return run.once(f"flips {rule}", found)


def without_flips(run: Run) -> list[str]:
    """Name the tasks whose scores are no points of 0 to 100, to which no rule applies."""
    return [task for task in run.tasks if task not in run.averaged_tasks]


def points(run: Run, task: str, cell: str) -> Mapping[str, float]:
    """Return the score of each sample, 0 to 100, averaged over seeds; {} without records."""
    samples = run.samples.get((task, cell))
    if samples is None:
        return {}
    scores = run.metrics[task].score(samples.parts).round(_DIGITS)
    return dict(zip(samples.ids, scores.tolist(), strict=True))


@dataclass(frozen=True)
class Count:
    """The flips of a cell in numbers, on a task or in total."""

    task: str
    """A task, or `total`."""
    cell: str
    n: int
    well: int
    lost: int
    gained: int

    @property
    def net(self) -> int:
        """Return gained less lost."""
        return self.gained - self.lost

    @property
    def lost_share(self) -> float:
        """Return lost by answered well, 0 to 1; NaN where nothing is."""
        return self.lost / self.well if self.well else math.nan


def counts(run: Run, rule: FlipRule) -> list[Count]:
    """Return the flips of every task and cell in numbers, then each cell's total over its tasks."""
    by_task = [
        Count(one.task, one.cell, one.n, len(one.well), len(one.lost), len(one.gained))
        for one in flips(run, rule)
    ]
    totals = [
        Count(
            TOTAL,
            cell,
            *(sum(getattr(one, part) for one in of) for part in ("n", "well", "lost", "gained")),
        )
        for cell in run.cells
        if (of := [one for one in by_task if one.cell == cell])
    ]
    return by_task + totals


@dataclass(frozen=True)
class Shared:
    """The samples that the methods of one budget lose, and how far they are the same ones."""

    task: str
    """A task, or `total`."""
    budget: str
    cells: tuple[str, ...]
    """The methods compared, two or more."""
    well: int
    """Samples that all hold and the full cache answers well."""
    by_any: int
    """Of these, those that a cell loses."""
    by_all: int
    by_chance: float
    """Share lost by all, of those lost by any, if methods lost as many but independently, 0 to 1."""
    alone: Mapping[str, int]
    """By cell, the samples that it alone loses."""

    @property
    def share(self) -> float:
        """Return the share lost by all, of those lost by any, 0 to 1; NaN where none is lost."""
        return self.by_all / self.by_any if self.by_any else math.nan


def shared_losses(run: Run, rule: FlipRule) -> list[Shared]:
    """Return, for each budget of two or more methods, each task that all have, and their total.

    A sample that every method loses is a hard one; one that a single method loses is that method's.
    """
    by_budget: dict[str, list[str]] = defaultdict(list)
    for cell in run.cells:
        if cell != run.full_cell:
            by_budget[str(parse_name(cell).budget)].append(cell)
    found = []
    for budget, cells in by_budget.items():
        by_task = [
            [one for one in flips(run, rule) if one.task == task and one.cell in cells]
            for task in run.averaged_tasks
        ]
        losses = [_losses(of) for of in by_task if len(of) == len(cells) > 1]
        if losses:
            found += [_shared(one.task, budget, cells, [one]) for one in losses]
            found.append(_shared(TOTAL, budget, cells, losses))
    return found


@dataclass(frozen=True)
class _Losses:
    """Which of a task's samples are lost by which cells."""

    task: str
    lost: NDArray[np.bool_]
    """`(samples, cells)`, of the samples that all hold and the full cache answers well."""

    @property
    def expected(self) -> Array:
        """Samples lost by all and by any, were the cells' losses independent, `(2,)`."""
        rates = self.lost.mean(axis=0) if len(self.lost) else np.zeros(self.lost.shape[1])
        return len(self.lost) * np.array([rates.prod(), 1 - (1 - rates).prod()])


def _losses(of: Sequence[Flips]) -> _Losses:
    well = set.intersection(*(set(one.well) for one in of))
    lost = [[sample in one.lost for one in of] for sample in sorted(well)]
    return _Losses(of[0].task, np.array(lost, dtype=bool).reshape(len(well), len(of)))


def _shared(task: str, budget: str, cells: Sequence[str], losses: Sequence[_Losses]) -> Shared:
    lost = np.concatenate([one.lost for one in losses])
    by_all, by_any = np.sum([one.expected for one in losses], axis=0)
    times = lost.sum(axis=1)
    return Shared(
        task=task,
        budget=budget,
        cells=tuple(cells),
        well=len(lost),
        by_any=int((times > 0).sum()),
        by_all=int((times == len(cells)).sum()),
        by_chance=float(by_all / by_any) if by_any else math.nan,
        alone=dict(zip(cells, lost[times == 1].sum(axis=0).tolist(), strict=True)),
    )


def _flips(run: Run, rule: FlipRule, task: str, cell: str) -> Flips | None:
    if run.full_cell is None:
        return None
    full, other = points(run, task, run.full_cell), points(run, task, cell)
    both = [sample for sample in full if sample in other]
    if not both:
        return None
    return Flips(
        task,
        cell,
        len(both),
        well=tuple(sample for sample in both if full[sample] >= rule.well),
        lost=tuple(sample for sample in both if _falls(rule, full[sample], other[sample])),
        gained=tuple(sample for sample in both if _falls(rule, other[sample], full[sample])),
    )


def _falls(rule: FlipRule, high: float, low: float) -> bool:
    """Return whether a score is good and the other one lower by the drop or more."""
    return high >= rule.well and round(high - low, _DIGITS) >= rule.drop
