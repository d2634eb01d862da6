"""Which of two cells is better, how sure that is over all comparisons made, and what would decide it.

A contrast is a cell's score minus another's over the samples that both hold. Compared are every two
cells at the same budget, and every cell with the full cache. An interval comes from the paired
bootstrap (`harness.report.bootstrap`), a p-value from flipping the two cells' marks within samples
(a sign-flip permutation test), adjusted by Holm's method over the contrasts that a table shows. Samples
of one context are flipped together.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy.stats import permutation_test
from statsmodels.stats.multitest import multipletests

from benchmarks.metric import Array, Metric
from harness.records import Record
from harness.report.bootstrap import SEED, Samples, Scored, average, gather
from harness.report.divergence import KL, divergence
from harness.report.memory import is_unequal, stored
from harness.report.run import Run
from kvmerge.cells import parse_name

LEVEL = 0.05
"""Family-wise error rate of the verdicts."""
EXCHANGES = 9_999
"""Random exchanges of a family of up to 200 contrasts; all 2^n where those are fewer."""
MOST_EXCHANGES = 49_999
"""Beyond `EXCHANGES` a family gets 50 a contrast, as Holm's first step divides by their number."""
AVERAGE = "average"

_BATCH = 500  # exchanges held at once: bounds memory; the draw does not depend on it
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
    scored: Scored
    """Score of A minus score of B, with its bootstrap replicates."""
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

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the difference; NaN where there is none."""
        return self.scored.interval(95)

    @cached_property
    def narrow(self) -> tuple[float, float]:
        """The 90% interval: inside the margin, both one-sided tests of equivalence reject at 5%."""
        return self.scored.interval(90)

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
            return Verdict.FIRST if (self.scored.value > 0) == self.higher_is_better else Verdict.SECOND
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
    if "contrasts" not in run.memo:
        run.memo["contrasts"] = planned(run, pairs(run))
    found: list[Contrast] = run.memo["contrasts"]
    return found


def planned(run: Run, chosen: Sequence[tuple[str, str]]) -> list[Contrast]:
    """Compare some pairs of cells on the average over tasks and on KL, adjusted together."""
    return compared([*_on_average(run, chosen), *_on_kl(run, chosen)])


def contrasts_by_task(run: Run) -> list[Contrast]:
    """Compare cells on each task that both have, adjusted together."""
    if "contrasts_by_task" not in run.memo:
        lines = [
            Line(task, first, second, terms)
            for task in run.tasks
            if run.metrics[task].parts
            for first, second in pairs(run)
            if (terms := _terms(run, [task], first, second))
        ]
        run.memo["contrasts_by_task"] = compared(lines)
    found: list[Contrast] = run.memo["contrasts_by_task"]
    return found


@dataclass(frozen=True)
class Term:
    """Two cells on one task: rows of `first` and `second` are the same samples."""

    task: str
    metric: Metric
    first: Samples
    second: Samples
    scored: tuple[Scored, Scored]
    by_seed: tuple[Array, Array] = (np.empty(0), np.empty(0))
    """Scores of either cell by seed, `(seeds,)`."""
    stored: tuple[float, float] = (math.nan, math.nan)
    """Bytes that either cell stores of a sample, the mean."""

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What exchanges depend on."""
        return self.task, self.first.ids


@dataclass(frozen=True)
class Line:
    """What one contrast is made of: the mean over one or more tasks."""

    task: str
    first: str
    second: str
    terms: tuple[Term, ...]


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
    terms = []
    for task in tasks:
        if (task, first) not in run.samples or (task, second) not in run.samples:
            return ()
        a, b = run.samples[task, first], run.samples[task, second]
        common = set(a.ids) & set(b.ids)
        if not common:
            return ()
        metric = run.metrics[task]
        scored = run.score_of(task, first, common), run.score_of(task, second, common)
        seeds = [
            _by_seed([r for r in run.records[task, cell] if r.id in common], metric)
            for cell in (first, second)
        ]
        both = a.only(common), b.only(common)
        weights = stored(run, task, first, common), stored(run, task, second, common)
        terms.append(Term(task, metric, *both, scored, (seeds[0], seeds[1]), weights))
    return tuple(terms)


def _by_seed(records: Iterable[Record], metric: Metric) -> Array:
    """Return the score of each seed over the samples that all seeds have, `(seeds,)`."""
    by_seed: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_seed[record.seed].append(record)
    if len(by_seed) < 2:
        return np.empty(0)
    samples = [gather(by_seed[seed], metric) for seed in sorted(by_seed)]
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
        scored=average([term.scored[0].minus(term.scored[1]) for term in line.terms]),
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


def exchanges_of(contrasts: int) -> int:
    """Return how many random exchanges a family of contrasts gets."""
    return min(max(EXCHANGES, 50 * contrasts - 1), MOST_EXCHANGES)


def exchanged(lines: Sequence[Sequence[Term]], exchanges: int | None = None) -> list[float]:
    """Return the two-sided p-value of each contrast; NaN where a task has fewer than two contexts.

    Those over the same samples share their exchanges, so that one draw serves them all.
    """
    exchanges = exchanges or exchanges_of(len(lines))
    together: dict[tuple[tuple[str, tuple[str, ...]], ...], list[int]] = defaultdict(list)
    for place, terms in enumerate(lines):
        if all(len(term.first.clusters) > 1 for term in terms):
            together[tuple(term.key for term in terms)].append(place)
    p_values = [math.nan] * len(lines)
    for key, places in together.items():
        found = _exchange_test(key, [lines[place] for place in places], exchanges)
        for place, p in zip(places, found, strict=True):
            p_values[place] = float(p)
    return p_values


def _exchange_test(
    key: Sequence[tuple[str, tuple[str, ...]]], lines: Sequence[Sequence[Term]], exchanges: int
) -> Array:
    """Exchange the marks of two cells within contexts, in contrasts that are over the same samples.

    The statistic is the difference of scores itself. With half the sum m and half the difference d of a
    pair's parts, signs s make it score(mean m + mean s d) - score(mean m - mean s d), for any metric.
    All pairs of a context have one sign.
    """
    blocks = [_blocks([terms[position] for terms in lines]) for position in range(len(key))]

    def statistic(signs: Array, axis: int) -> Array:  # always the last one
        total = np.zeros((*signs.shape[:-1], len(lines)))
        start = 0
        for middle, half, metrics in blocks:
            contexts, contrasts, parts = half.shape
            moved = signs[..., start : start + contexts] @ half.reshape(contexts, contrasts * parts)
            moved = moved.reshape(*signs.shape[:-1], contrasts, parts)
            start += contexts
            for metric, chosen in metrics:
                used = slice(len(metric.parts))
                mean, shift = middle[chosen][:, used], moved[..., chosen, used]
                up, down = mean + shift, mean - shift
                total[..., chosen] += (metric.score(up) - metric.score(down)) / len(blocks)
        return np.asarray(total.round(_DIGITS), dtype=np.float64)

    names = "\n".join(name for task, ids in key for name in (task, *ids)).encode()
    digest = int.from_bytes(hashlib.sha256(names).digest()[:8], "big")
    size = sum(len(half) for _, half, _ in blocks)
    found = permutation_test(
        (np.ones(size),),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=exchanges,
        batch=_BATCH,
        axis=-1,
        rng=np.random.default_rng([SEED, digest]),
    )
    return np.asarray(found.pvalue)


def _blocks(terms: Sequence[Term]) -> tuple[Array, Array, list[tuple[Metric, list[int]]]]:
    """Return one task's mean m `(contrasts, parts)`, its sums of d / n over the samples of each context
    `(contexts, contrasts, parts)`, and metrics.

    A metric with fewer parts than another leaves the last ones 0.
    """
    n, width = len(terms[0].first.ids), max(len(term.metric.parts) for term in terms)
    middle, half = np.zeros((len(terms), width)), np.zeros((n, len(terms), width))
    by_name: dict[str, tuple[Metric, list[int]]] = {}
    for place, term in enumerate(terms):
        parts = len(term.metric.parts)
        middle[place, :parts] = (term.first.parts + term.second.parts).mean(axis=0) / 2
        half[:, place, :parts] = (term.first.parts - term.second.parts) / (2 * n)
        by_name.setdefault(term.metric.name, (term.metric, []))[1].append(place)
    summed = np.stack([half[rows].sum(axis=0) for rows in terms[0].first.clusters])
    return middle, summed, list(by_name.values())
