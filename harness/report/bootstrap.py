"""Task scores as functions of per-sample numbers, and their bootstrap.

Every score here is a function of plain means over samples ("parts"), so that one resampling serves
them all. The draw depends only on the task and its sample ids: two cells that hold the same samples
are resampled alike, which makes differences between cells paired. Samples of one context are not
independent, so that contexts are drawn, each with all its samples (a cluster bootstrap).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array

from benchmarks.metric import Array, Metric
from harness.columnar import Records
from harness.records import Record

RESAMPLES = 10_000
SEED = 42
_HELD = 1 << 18  # draws multiplied at once: bounds memory; what is drawn does not depend on it


@dataclass(frozen=True)
class Samples:
    """The numbers of one task and cell: `parts[i]` belongs to `ids[i]`, averaged over seeds."""

    ids: tuple[str, ...]
    """Sorted, so that the order in which samples finished has no effect."""
    parts: Array
    """(samples, parts)"""
    contexts: tuple[str, ...] = ()
    """What each stands on; () where each has a context of its own."""

    @property
    def clusters(self) -> list[list[int]]:
        """The rows of each context, in the order of their first ones: what is independent."""
        return _clusters(self.contexts or self.ids)

    def by_context(self, values: Array) -> Array:
        """Return sums over the samples of each context, `(contexts, ...)`, of `(samples, ...)`."""
        clusters = self.clusters
        if len(clusters) == len(self.ids):
            return values
        return np.stack([values[rows].sum(axis=0) for rows in clusters])

    def only(self, ids: Iterable[str]) -> Samples:
        """Keep the samples with these ids."""
        if ids == self.ids:
            return self
        wanted = set(ids)
        if wanted.issuperset(self.ids):
            return self
        rows = [row for row, name in enumerate(self.ids) if name in wanted]
        names, contexts = (
            tuple(of[row] for row in rows) if of else () for of in (self.ids, self.contexts)
        )
        return Samples(names, self.parts[rows], contexts)


@lru_cache(maxsize=1024)
def _clusters(contexts: tuple[str, ...]) -> list[list[int]]:
    """Return the rows of each context: of all cells that hold the same samples they are the same."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, context in enumerate(contexts):
        rows[context].append(row)
    return list(rows.values())


def gather(
    records: Iterable[Record], metric: Metric, contexts: Mapping[str, str] | None = None
) -> Samples:
    """Collect a metric's parts from records, averaged over the seeds of each sample.

    Args:
        records: of one task and cell.
        metric: what the task is scored by.
        contexts: of each sample by its id; None: each has its own.

    Raises `ValueError` naming the sample and key where a part is missing, not a finite number, or
    beyond 0 to 1 where scores are shares.
    """
    of = Records.of(records)
    columns = [of.numbers(part) for part in metric.parts]
    for part, values in zip(metric.parts, columns, strict=True):
        _check_part(part, values, of, metric)
    return by_sample(of, columns, contexts)


def _check_part(part: str, values: Array, records: Records, metric: Metric) -> None:
    wrong = ~np.isfinite(values)
    if metric.averaged:
        wrong |= ~((values >= -1e-6) & (values <= 1 + 1e-6))
    if wrong.any():
        sample, value = (records.values(name)[int(wrong.argmax())] for name in ("id", part))
        if value is None or not np.isfinite(value):
            raise ValueError(f"sample {sample!r} has no finite {part!r}, but {value!r}")
        raise ValueError(f"sample {sample!r} has {part!r} = {value}, not 0 to 1")


def by_sample(
    records: Records, columns: Sequence[Array], contexts: Mapping[str, str] | None = None
) -> Samples:
    """Average some numbers of each record, `(records,)` each, over the seeds of each sample."""
    names, places = records.samples()
    order = sorted(range(len(names)), key=names.__getitem__)
    seeds = np.bincount(places, minlength=len(names))
    sums = [np.bincount(places, column, len(names)) for column in columns]
    means = np.stack(sums, axis=1) / seeds[:, None] if sums else np.empty((len(names), 0))
    ids = tuple(names[place] for place in order)
    return Samples(ids, means[order], tuple(contexts[name] for name in ids) if contexts else ())


def resampled_means(task: str, samples: Samples, resamples: int = RESAMPLES) -> Array:
    """Return the means of bootstrap samples, `(resamples, parts)`, whatever is not a number left out.

    As many contexts are drawn as there are, with replacement, and the mean is over all their samples.

    Args:
        task: seeds the draw, together with the ids; never the cell.
        samples: of two or more contexts.
        resamples: how many there are.
    """
    known = ~np.isnan(samples.parts)
    if known.all():
        known = known[:, :1]
    sums = samples.by_context(np.where(known, samples.parts, 0.0))
    counts = samples.by_context(known).astype(np.float64)
    drawn = _drawn(task, samples.ids, len(counts), resamples)
    if (counts == counts[0]).all():
        return np.concatenate([taken @ sums for taken in drawn]) / (len(counts) * counts[0])
    return np.concatenate([(taken @ sums) / (taken @ counts) for taken in drawn])


def generator_of(names: Iterable[str]) -> np.random.Generator:
    """Return what a test or an interval draws with: the same for the same tasks and samples."""
    digest = hashlib.sha256("\n".join(names).encode()).digest()
    return np.random.default_rng([SEED, int.from_bytes(digest[:8], "big")])


@lru_cache(maxsize=1)
def _drawn(task: str, ids: tuple[str, ...], contexts: int, resamples: int) -> list[csr_array]:
    """Return how often resamples take each context, `(some resamples, contexts)` each.

    A row has a 1 for every draw, so that a product with it adds what was drawn, one after the other.
    The last draw is kept: it is the same for all cells of a task, which follow each other.
    """
    generator = generator_of((task, *ids))
    most = min(resamples, max(1, _HELD // contexts))
    ones, ends = np.ones(most * contexts), np.arange(most + 1, dtype=np.int32) * contexts
    taken = []
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        # As 64 bits would: numpy draws numbers below 2^32 from 32 bits either way.
        drawn = generator.integers(0, contexts, size=count * contexts, dtype=np.uint32).view(np.int32)
        taken.append(csr_array((ones[: drawn.size], drawn, ends[: count + 1]), (count, contexts)))
    return taken


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% percentile interval; an unknown bound is NaN."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """A score and its bootstrap replicates (empty where there is no interval)."""

    value: float
    replicates: Array

    def estimate(self) -> Estimate:
        """Return the score with its 95% interval."""
        return Estimate(self.value, *self.interval(95))

    def interval(self, level: float) -> tuple[float, float]:
        """Return the percentile interval of a level in percent; NaN where there is none."""
        (found,) = self.intervals(level)
        return found

    def intervals(self, *levels: float) -> list[tuple[float, float]]:
        """Return the intervals of some levels, as `interval` does."""
        if not self.replicates.size:
            return [(np.nan, np.nan)] * len(levels)
        ends = [50 + side * level / 2 for level in levels for side in (-1, 1)]
        found = np.percentile(self.replicates, ends).tolist()
        return list(zip(found[::2], found[1::2], strict=True))

    def sure_interval(self, level: float, n: int) -> tuple[float, float]:
        """Return the interval of a score of 0 to 100 over `n` contexts that errs with this level.

        Percentiles of the replicates. Where all contexts score alike these say nothing, so the ends are
        those of the exact binomial interval (Clopper and Pearson) for `n` equal outcomes.
        """
        if np.ptp(self.replicates) > 0:
            return self.interval(100 - 100 * level)
        reach = 100 * (1 - (level / 2) ** (1 / n))
        return max(0.0, self.value - reach), min(100.0, self.value + reach)

    def minus(self, other: Scored) -> Scored:
        """Return the difference; paired if both come from the same task and sample ids."""
        paired = self.replicates.size and other.replicates.size
        replicates = self.replicates - other.replicates if paired else np.empty(0)
        return Scored(self.value - other.value, replicates)


def score_task(task: str, samples: Samples, metric: Metric, resamples: int = RESAMPLES) -> Scored:
    """Score one task and cell with its replicates; NaN without samples."""
    return score_cells(task, {"": samples}, metric, resamples)[""]


def score_cells(
    task: str, cells: Mapping[str, Samples], metric: Metric, resamples: int = RESAMPLES
) -> dict[str, Scored]:
    """Score one task of every cell as `score_task` does; those of the same samples in one go."""
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for cell, samples in cells.items():
        alike[samples.ids].append(cell)
    found = {
        cell: scored
        for together in alike.values()
        for cell, scored in zip(
            together, _scored(task, [cells[cell] for cell in together], metric, resamples), strict=True
        )
    }
    return {cell: found[cell] for cell in cells}


def _scored(task: str, cells: Sequence[Samples], metric: Metric, resamples: int) -> list[Scored]:
    """Score cells that hold the same samples; no replicates where there are fewer than two contexts."""
    first = cells[0]
    if not first.ids:
        return [Scored(np.nan, np.empty(0))] * len(cells)
    values = [float(metric.score(samples.parts.mean(axis=0))) for samples in cells]
    if len(first.clusters) < 2:
        return [Scored(value, np.empty(0)) for value in values]
    beside = np.hstack([samples.parts for samples in cells])
    means = resampled_means(task, replace(first, parts=beside), resamples)
    by_cell = means.reshape(resamples, len(cells), -1)
    return [Scored(value, metric.score(by_cell[:, at])) for at, value in enumerate(values)]


def average(scores: Sequence[Scored]) -> Scored:
    """Return the plain mean of scores that were resampled independently, e.g. a benchmark's tasks.

    The mean of the replicates is no interval where one task has none, so it is then left empty.
    """
    value = float(np.mean([score.value for score in scores]))
    if any(not score.replicates.size for score in scores):
        return Scored(value, np.empty(0))
    return Scored(value, np.mean([score.replicates for score in scores], axis=0))


def aggregate(
    name: str, scores: Mapping[str, Scored], over: Mapping[str, Sequence[str]]
) -> Scored | None:
    """Average averages: `over` names the members of each aggregate, which may be aggregates.

    None where a member has no score.
    """
    if name in scores:
        return scores[name]
    members = [aggregate(member, scores, over) for member in over.get(name, ())]
    known = [member for member in members if member is not None]
    return average(known) if known and len(known) == len(members) else None
