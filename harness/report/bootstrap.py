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
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

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
    contexts: tuple[str, ...] = ()
    """What each stands on; () where each has a context of its own."""

    @cached_property
    def clusters(self) -> list[list[int]]:
        """The rows of each context, in the order of their first ones: what is independent."""
        rows: dict[str, list[int]] = defaultdict(list)
        for row, context in enumerate(self.contexts or self.ids):
            rows[context].append(row)
        return list(rows.values())

    def only(self, ids: Iterable[str]) -> Samples:
        """Keep the samples with these ids."""
        wanted = set(ids)
        rows = [row for row, name in enumerate(self.ids) if name in wanted]
        names, contexts = (
            tuple(of[row] for row in rows) if of else () for of in (self.ids, self.contexts)
        )
        return Samples(names, self.parts[rows], contexts)


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
    shared = tuple(contexts[name] for name in ids) if contexts else ()
    return Samples(ids, parts.reshape(len(ids), len(metric.parts)), shared)


def resampled_scores(task: str, samples: Samples, metric: Metric, resamples: int = RESAMPLES) -> Array:
    """Return the scores of bootstrap samples, `(resamples,)`; empty for fewer than two contexts."""
    if len(samples.clusters) < 2:
        return np.empty(0)
    return metric.score(resampled_means(task, samples, resamples))


def resampled_means(task: str, samples: Samples, resamples: int = RESAMPLES) -> Array:
    """Return the means of bootstrap samples, `(resamples, parts)`, whatever is not a number left out.

    As many contexts are drawn as there are, with replacement, and the mean is over all their samples.

    Args:
        task: seeds the draw, together with the ids; never the cell.
        samples: of two or more contexts.
        resamples: how many there are.
    """
    key = "\n".join((task, *samples.ids)).encode()
    digest = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
    generator = np.random.default_rng([SEED, digest])
    members, values = _members(samples)
    mean = np.nanmean if np.isnan(values).any() else np.mean
    chunks = []
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        drawn = generator.integers(0, len(members), size=(count, len(members)))
        chunks.append(mean(values[members[drawn].reshape(count, -1)], axis=1))
    return np.concatenate(chunks)


def _members(samples: Samples) -> tuple[NDArray[np.intp], Array]:
    """Return the rows of each context, `(contexts, most samples of one)`, and the values they are of.

    A context with fewer samples than another ends in the row after the last, which is NaN.
    """
    most = max(map(len, samples.clusters))
    fill = len(samples.ids)
    members = np.array([rows + [fill] * (most - len(rows)) for rows in samples.clusters])
    if not (members == fill).any():
        return members, samples.parts
    return members, np.append(samples.parts, np.full_like(samples.parts[:1], np.nan), axis=0)


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
