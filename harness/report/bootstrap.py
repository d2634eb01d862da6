"""Task scores as functions of per-sample numbers, and their bootstrap.

Every score here is a function of plain means over samples ("parts"), so that one resampling serves
them all. The draw depends only on the task and its sample ids: two cells that hold the same samples
are resampled alike, which makes differences between cells paired.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.metric import Array, Metric
from harness.records import Record

RESAMPLES = 10_000
SEED = 42
_CHUNK = 500  # resamples held at once: bounds memory on large tasks; the draw does not depend on it


@dataclass(frozen=True)
class Samples:
    """The numbers of one task and cell: `parts[i]` belongs to `ids[i]`, averaged over seeds."""

    ids: tuple[str, ...]
    """Sorted, so that the order in which samples finished has no effect."""
    parts: Array
    """(samples, parts)"""

    def only(self, ids: Iterable[str]) -> Samples:
        """Keep the samples with these ids."""
        wanted = set(ids)
        rows = [row for row, name in enumerate(self.ids) if name in wanted]
        return Samples(tuple(self.ids[row] for row in rows), self.parts[rows])


def gather(records: Iterable[Record], metric: Metric) -> Samples:
    """Collect a metric's parts from records, averaged over the seeds of each sample.

    Raises `ValueError` naming the sample and key where a part is missing, not a finite number, or
    beyond 0 to 1 where scores are shares.
    """
    by_id: dict[str, list[list[float]]] = defaultdict(list)
    for record in records:
        values = []
        for part in metric.parts:
            value = record.score if part == "score" else record.extra.get(part)
            if not isinstance(value, int | float) or not np.isfinite(value):
                raise ValueError(f"sample {record.id!r} has no finite {part!r}, but {value!r}")
            if metric.averaged and not -1e-6 <= value <= 1 + 1e-6:
                raise ValueError(f"sample {record.id!r} has {part!r} = {value}, not 0 to 1")
            values.append(float(value))
        by_id[record.id].append(values)
    ids = tuple(sorted(by_id))
    parts = np.array([np.mean(by_id[name], axis=0) for name in ids], dtype=np.float64)
    return Samples(ids, parts.reshape(len(ids), len(metric.parts)))


def resampled_scores(task: str, samples: Samples, metric: Metric, resamples: int = RESAMPLES) -> Array:
    """Return the scores of bootstrap samples, drawn with replacement over samples.

    The draw is seeded by the task's name and the ids, never by the cell. Empty for n < 2.
    """
    if len(samples.ids) < 2:
        return np.empty(0)
    return metric.score(resampled_means(task, samples.ids, samples.parts, resamples=resamples))


def resampled_means(
    task: str,
    ids: Sequence[str],
    values: Array,
    mean: Callable[..., Array] = np.mean,
    resamples: int = RESAMPLES,
) -> Array:
    """Return the means of bootstrap samples, `(resamples, parts)`.

    Args:
        task: seeds the draw, together with the ids.
        ids: of the samples, two or more.
        values: `(samples, parts)`.
        mean: how the values of a resample are averaged along an axis.
        resamples: how many there are.
    """
    n = len(ids)
    key = "\n".join((task, *ids)).encode()
    digest = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
    generator = np.random.default_rng([SEED, digest])
    chunks = []
    for start in range(0, resamples, _CHUNK):
        rows = generator.integers(0, n, size=(min(_CHUNK, resamples - start), n))
        chunks.append(mean(values[rows], axis=1))
    return np.concatenate(chunks)


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
        if not self.replicates.size:
            return np.nan, np.nan
        low, high = np.percentile(self.replicates, [50 - level / 2, 50 + level / 2])
        return float(low), float(high)

    def sure_interval(self, level: float, n: int) -> tuple[float, float]:
        """Return the interval of a score of 0 to 100 over `n` samples that errs with this level.

        Percentiles of the replicates. Where all samples score alike these say nothing, so the ends are
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
    if not samples.ids:
        return Scored(np.nan, np.empty(0))
    value = float(metric.score(samples.parts.mean(axis=0)))
    return Scored(value, resampled_scores(task, samples, metric, resamples))


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
