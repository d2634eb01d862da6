"""Which of two cells is better, how sure that is over all comparisons made, and what would decide it.

A contrast is a cell's score minus another's over the samples that both hold. Compared are every two
cells at the same budget, and every cell with the full cache. An interval comes from the paired
bootstrap (`harness.report.bootstrap`), a p-value from flipping the two cells' marks within samples
(a sign-flip permutation test), adjusted by Holm's method over the contrasts that a table shows. Samples
of one context are flipped together.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import combinations

import numpy as np
from statsmodels.stats.multitest import multipletests

from benchmarks.metric import Array, Metric
from harness.columnar import Records
from harness.report.bootstrap import Estimate, Scored, average, gather
from harness.report.divergence import KL, divergence
from harness.report.exchanges import Term, exchanged
from harness.report.memory import is_unequal, stored
from harness.report.run import Run
from kvmerge.names import parse_name

LEVEL = 0.05
"""Family-wise error rate of the verdicts."""
AVERAGE = "average"

_DIGITS = 10  # decimals of a statistic: equal differences must tie, however they were summed


class Verdict(StrEnum):
    """What a contrast says of its two cells, A and B."""

    FIRST = "A better"
    SECOND = "B better"
    EQUIVALENT = "equivalent"
    UNRESOLVED = "unresolved"


@dataclass(frozen=True)
class Contrast:
    """Cell A against cell B, on a task, on the average over tasks, or on KL to the full cache."""

    task: str
    """A task, `average` or `kl`."""
    first: str
    """Cell A."""
    second: str
    """Cell B; the full cache wherever it takes part."""
    n: int
    """Samples that both hold, summed over tasks."""
    contexts: int
    """Contexts that they stand on: what is resampled and flipped."""
    wins: int
    """Samples on which A is better."""
    ties: int
    losses: int
    scores: tuple[tuple[Scored, Scored], ...]
    """Of A and of B, by task."""
    spreads: tuple[float, float]
    """Standard deviation of A's and B's score over seeds; NaN for a cell with one."""
    higher_is_better: bool
    in_points: bool
    """Whether the score is one of 0 to 100, which is what the margin is for."""
    bytes_ratio: float
    """Bytes that A stores, by those of B: keys, values, sizes and biases; NaN where not recorded."""
    p: float = math.nan
    """Two-sided; NaN where a task has fewer than two contexts."""
    p_adjusted: float = math.nan
    """By Holm's method over the contrasts that were compared together."""

    @property
    def scored(self) -> Scored:
        """Score of A minus score of B, with its bootstrap replicates.

        Made anew each time: of thousands of contrasts, replicates would be gigabytes.
        """
        return average([first.minus(second) for first, second in self.scores])

    @cached_property
    def value(self) -> float:
        """The difference of scores alone."""
        return float(np.mean([first.value - second.value for first, second in self.scores]))

    @cached_property
    def _intervals(self) -> list[tuple[float, float]]:
        return self.scored.intervals(95, 90)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the difference; NaN where there is none."""
        return self._intervals[0]

    @property
    def narrow(self) -> tuple[float, float]:
        """The 90% interval: inside the margin, both one-sided tests of equivalence reject at 5%."""
        return self._intervals[1]

    def estimate(self) -> Estimate:
        """Return the difference with its 95% interval."""
        return Estimate(self.value, *self.interval)

    @property
    def is_unequal(self) -> bool:
        """Whether A and B, at one budget, do not store as many bytes."""
        alike = parse_name(self.first).budget == parse_name(self.second).budget
        return alike and is_unequal(self.bytes_ratio)

    def verdict(self, margin: float) -> Verdict | None:
        """Judge the contrast; None where nothing can be said, as with one sample.

        A difference that is sure is named even where it is smaller than the margin.
        """
        if math.isnan(self.p_adjusted):
            return None
        if self.p_adjusted < LEVEL:
            return Verdict.FIRST if (self.value > 0) == self.higher_is_better else Verdict.SECOND
        low, high = self.narrow
        within = self.in_points and -margin < low and high < margin
        return Verdict.EQUIVALENT if within else Verdict.UNRESOLVED

    def needed(self, margin: float) -> int | None:
        """Return the samples with which the 90% interval would be no wider than the margin's two sides.

        By the square-root law: as wide as now, times the root of the present number over that one,
        which holds if further samples scatter, and share contexts, as these do. None unless unresolved,
        and where the interval is narrow enough already but lies across the margin's edge.
        """
        if self.verdict(margin) is not Verdict.UNRESOLVED or not self.in_points:
            return None
        low, high = self.narrow
        samples = math.ceil(self.n * ((high - low) / (2 * margin)) ** 2)
        return samples if samples > self.n else None


def pairs(run: Run) -> list[tuple[str, str]]:
    """Return what is compared: every two cells at one budget, then each with the full cache."""
    full = run.full_cell
    others = [cell for cell in run.cells if cell != full]
    alike = [
        (first, second)
        for first, second in combinations(others, 2)
        if parse_name(first).budget == parse_name(second).budget
    ]
    return alike + [(cell, full) for cell in others if full]


def contrasts(run: Run) -> list[Contrast]:
    """Compare cells on the average over tasks and on KL, adjusted together.

    A pair that lacks a task in one of its cells has no average. KL is compared between cells that have
    it on every task where any cell has. Against the full cache it is not: there it is 0 by definition,
    and cannot be less, so that flipping signs says nothing.
    """
    return run.once("contrasts", lambda: planned(run, pairs(run)))


def planned(run: Run, chosen: Sequence[tuple[str, str]]) -> list[Contrast]:
    """Compare some pairs of cells on the average over tasks and on KL, adjusted together."""
    return compared([*_on_average(run, chosen), *_on_kl(run, chosen)])


def contrasts_by_task(run: Run) -> list[Contrast]:
    """Compare cells on each task that both have, adjusted together."""
    return run.once("contrasts by task", lambda: compared(_by_task(run)))


@dataclass(frozen=True)
class Line:
    """What one contrast is made of: the mean over one or more tasks."""

    task: str
    first: str
    second: str
    terms: tuple[Term, ...]


def _by_task(run: Run) -> list[Line]:
    return [
        Line(task, first, second, terms)
        for task in run.tasks
        if run.metrics[task].parts
        for first, second in pairs(run)
        if (terms := _terms(run, [task], first, second))
    ]


def _on_average(run: Run, chosen: Sequence[tuple[str, str]]) -> list[Line]:
    tasks = run.averaged_tasks
    return [
        Line(AVERAGE, first, second, terms)
        for first, second in chosen
        if (terms := _terms(run, tasks, first, second))
    ]


def _on_kl(run: Run, chosen: Sequence[tuple[str, str]]) -> list[Line]:
    seen = divergence(run)
    return [
        Line(KL, first, second, terms)
        for first, second in chosen
        if (terms := _terms(seen, tuple(seen.tasks), first, second))
    ]


def without_kl(run: Run) -> list[str]:
    """Name the cells that lack KL on a task where another has it, as those of earlier versions do."""
    seen = divergence(run)
    others = [cell for cell in run.cells if cell != run.full_cell]
    return [cell for cell in others if any((task, cell) not in seen.records for task in seen.tasks)]


def _terms(run: Run, tasks: Sequence[str], first: str, second: str) -> tuple[Term, ...]:
    """Return two cells on some tasks; () where they have no sample of one in common."""
    known: dict[tuple[str, str, str], Term | None] = run.once("terms", dict)
    terms = []
    for task in tasks:
        key = task, first, second
        if key not in known:
            known[key] = _term(run, *key)
        term = known[key]
        if term is None:
            return ()
        terms.append(term)
    return tuple(terms)


def _term(run: Run, task: str, first: str, second: str) -> Term | None:
    if (task, first) not in run.samples or (task, second) not in run.samples:
        return None
    a, b = run.samples[task, first], run.samples[task, second]
    common = a.ids if a.ids == b.ids else set(a.ids) & set(b.ids)
    if not common:
        return None
    metric = run.metrics[task]
    scored = run.score_of(task, first, common), run.score_of(task, second, common)
    seeds = [
        _by_seed(Records.of(run.records[task, cell]).only(set(common)), metric)
        if len(run.seeds[task, cell]) > 1
        else np.empty(0)
        for cell in (first, second)
    ]
    both = a.only(common), b.only(common)
    weights = stored(run, task, first, common), stored(run, task, second, common)
    return Term(task, metric, *both, scored, (seeds[0], seeds[1]), weights)


def _by_seed(records: Records, metric: Metric) -> Array:
    """Return the score of each seed over the samples that all seeds have, `(seeds,)`."""
    seeds = sorted(set(records.values("seed")))
    if len(seeds) < 2:
        return np.empty(0)
    samples = [gather(records.where("seed", seed), metric) for seed in seeds]
    shared = set.intersection(*(set(one.ids) for one in samples))
    if not shared:
        return np.empty(0)
    return np.array([metric.score(one.only(shared).parts.mean(axis=0)) for one in samples])


def compared(lines: Sequence[Line], exchanges: int | None = None) -> list[Contrast]:
    """Return the contrasts of one family, with p-values, adjusted over those that have one.

    Args:
        lines: what is compared.
        exchanges: random exchanges of each; None: `exchanges_of` the family.
    """
    p_values = exchanged([line.terms for line in lines], exchanges)
    adjusted = holm(p_values)
    return [
        replace(_contrast(line), p=p, p_adjusted=sure)
        for line, p, sure in zip(lines, p_values, adjusted, strict=True)
    ]


def _contrast(line: Line) -> Contrast:
    metric = line.terms[0].metric
    better = [_better(term) for term in line.terms]
    of_first, of_second = np.mean([term.stored for term in line.terms], axis=0).tolist()
    return Contrast(
        task=line.task,
        first=line.first,
        second=line.second,
        n=sum(len(term.first.ids) for term in line.terms),
        contexts=sum(len(term.first.clusters) for term in line.terms),
        wins=sum(int((sign > 0).sum()) for sign in better),
        ties=sum(int((sign == 0).sum()) for sign in better),
        losses=sum(int((sign < 0).sum()) for sign in better),
        scores=tuple(term.scored for term in line.terms),
        spreads=(_spread(line.terms, 0), _spread(line.terms, 1)),
        higher_is_better=metric.higher_is_better,
        in_points=metric.averaged,
        bytes_ratio=math.nan if not of_second else of_first / of_second,
    )


def _better(term: Term) -> Array:
    """Return 1 where A's sample is better, -1 where B's is, 0 where they tie, `(samples,)`."""
    difference = term.metric.score(term.first.parts) - term.metric.score(term.second.parts)
    sign = np.sign(np.round(difference, _DIGITS))
    return np.asarray(sign if term.metric.higher_is_better else -sign)


def _spread(terms: Sequence[Term], which: int) -> float:
    """Return the standard deviation over seeds of the mean over tasks; NaN unless all have as many."""
    scores = [term.by_seed[which] for term in terms]
    if len({one.size for one in scores}) > 1 or scores[0].size < 2:
        return math.nan
    return float(np.mean(scores, axis=0).std(ddof=1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down method; NaN stays NaN and is no part of the family."""
    p = np.array(p_values, dtype=float)
    known = ~np.isnan(p)
    if known.any():
        gc.freeze()  # multipletests collects garbage: a third of a second where torch is loaded
        try:
            p[known] = multipletests(p[known], method="holm")[1]
        finally:
            gc.unfreeze()
    return [float(value) for value in p]
