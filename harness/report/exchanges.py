"""Whether chance could part two cells so far: what differences random exchanges of marks make.

A sign-flip permutation test. Contrasts over the same samples share their exchanges, so that one draw
and one product of matrices serve them all; what an exchange gives is counted as it is made, not kept.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from benchmarks.metric import Array, Metric
from harness.report.bootstrap import Samples, Scored, generator_of
from harness.threads import in_threads

EXCHANGES = 9_999
"""Random exchanges of a family of up to 200 contrasts; all 2^n where those are fewer."""
MOST_EXCHANGES = 49_999
"""Beyond `EXCHANGES` a family gets 50 a contrast, as Holm's first step divides by their number."""

_BATCH, _HELD = 500, 1 << 20
"""Exchanges, and signs of them, held at once: bounds memory; the draw does not depend on it."""
_TIE = 0.5e-10
"""Statistics no further apart tie: equal differences must, however they were summed."""


_Key: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""The tasks and samples of a contrast: those that are over the same ones have the same exchanges."""


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


def exchanges_of(contrasts: int) -> int:
    """Return how many random exchanges a family of contrasts gets."""
    return min(max(EXCHANGES, 50 * contrasts - 1), MOST_EXCHANGES)


def exchanged(lines: Sequence[Sequence[Term]], exchanges: int | None = None) -> list[float]:
    """Return the two-sided p-value of each contrast; NaN where a task has fewer than two contexts.

    Args:
        lines: of each contrast, the tasks that it is the mean over.
        exchanges: random exchanges of each; None: `exchanges_of` the family.
    """
    exchanges = exchanges or exchanges_of(len(lines))
    together: dict[_Key, list[int]] = defaultdict(list)
    for place, terms in enumerate(lines):
        if all(len(term.first.clusters) > 1 for term in terms):
            together[tuple(term.key for term in terms)].append(place)
    p_values = [math.nan] * len(lines)

    def tested(key: _Key, places: Sequence[int]) -> Array:
        return _exchange_test(key, [lines[place] for place in places], exchanges)

    tests = in_threads(tested, together, together.values())
    for places, found in zip(together.values(), tests, strict=True):
        for place, p in zip(places, found.tolist(), strict=True):
            p_values[place] = p
    return p_values


def _exchange_test(key: _Key, lines: Sequence[Sequence[Term]], exchanges: int) -> Array:
    """Exchange the marks of two cells within contexts, in contrasts that are over the same samples.

    A statistic as far out as the observed one, or within `_TIE` of it, counts, and so does the observed
    one itself, unless it is among all that there are: as in `scipy.stats.permutation_test`, whose
    p-values these are. That holds every statistic of every exchange at once, which are gigabytes for
    many cells.
    """
    statistic = _statistic(lines)
    generator = generator_of(name for task, ids in key for name in (task, *ids))
    contexts = sum(len(term.first.clusters) for term in lines[0])
    observed = statistic(np.ones((1, contexts)))
    tolerance = np.maximum(_TIE, np.abs(100 * np.finfo(np.float64).eps * observed))
    highest, lowest = observed + tolerance, observed - tolerance
    drawn = as_low = as_high = 0 if 2**contexts <= exchanges else 1
    for signs in _signs(contexts, exchanges, generator):
        found = statistic(signs)
        drawn += len(signs)
        as_low = as_low + np.count_nonzero(found <= highest, axis=1)
        as_high = as_high + np.count_nonzero(found >= lowest, axis=1)
    return np.minimum(2 * np.minimum(as_low / drawn, as_high / drawn), 1.0)


def _signs(contexts: int, exchanges: int, generator: np.random.Generator) -> Iterator[Array]:
    """Yield 1 or -1 for every context, a row an exchange: all that there are, where those are fewer."""
    if 2**contexts <= exchanges:
        numbers = np.arange(2**contexts)[:, None] >> np.arange(contexts)
        yield 1 - 2 * (numbers & 1).astype(np.float64)
        return
    count = min(_BATCH, max(1, _HELD // contexts), exchanges)
    for start in range(0, exchanges, count):
        # The last bit of 32 is what numpy's `permuted` would put a pair in order by.
        bits = generator.integers(0, 2**32, size=(count, contexts), dtype=np.uint32) & 1
        signs = bits[: exchanges - start].astype(np.float64)
        signs *= 2
        signs -= 1
        yield signs


_Statistic: TypeAlias = Callable[[Array], Array]
"""From signs, `(exchanges, contexts)`, to the differences of scores that they make, `(contrasts,
exchanges)`: a contrast's lie side by side, as they are counted."""


def _statistic(lines: Sequence[Sequence[Term]]) -> _Statistic:
    """Return what an exchange makes of contrasts that are over the same samples, up to rounding."""
    by_kind: dict[Callable[[Sequence[Sequence[Term]]], _Statistic], list[int]] = defaultdict(list)
    for place, terms in enumerate(lines):
        by_kind[_linear if all(term.metric.is_linear for term in terms) else _curved].append(place)
    parts = [(places, of([lines[place] for place in places])) for of, places in by_kind.items()]

    def statistic(signs: Array) -> Array:
        if len(parts) == 1:
            return parts[0][1](signs)
        found = np.empty((len(lines), len(signs)))
        for places, of_some in parts:
            found[places] = of_some(signs)
        return found

    return statistic


def _linear(lines: Sequence[Sequence[Term]]) -> _Statistic:
    """Return the statistic where all scores are linear: signs are summed once a cell, not a contrast.

    There score(mean m + mean s d) - score(mean m - mean s d) is the difference of what the signs make
    of two cells' own scores, summed over all tasks at once.
    """
    cells: dict[tuple[tuple[str, bytes], ...], int] = {}
    columns: list[Array] = []

    def cell_of(terms: Sequence[Term], samples: Sequence[Samples]) -> int:
        pairs = zip(terms, samples, strict=True)
        key = tuple((term.metric.name, of.parts.tobytes()) for term, of in pairs)
        place = cells.setdefault(key, len(columns))
        if place == len(columns):
            columns.append(
                np.concatenate(
                    [
                        term.metric.score(term.first.by_context(of.parts / len(of.ids)))
                        for term, of in zip(terms, samples, strict=True)
                    ]
                )
            )
        return place

    first = [cell_of(terms, [term.first for term in terms]) for terms in lines]
    second = [cell_of(terms, [term.second for term in terms]) for terms in lines]
    moves = np.stack(columns) / len(lines[0])

    def statistic(signs: Array) -> Array:
        moved = moves @ signs.T
        return np.asarray(moved[first] - moved[second])

    return statistic


@dataclass(frozen=True)
class _Block:
    """Some contrasts on one task, by what their cells have there."""

    moves: Array
    """What the samples of each context add to half a cell's means, `(contexts, cells * parts)`."""
    cells: int
    groups: Sequence[tuple[Metric, list[int], list[int], list[int]]]
    """Contrasts that one metric scores: it, their places, and which cells are their A and B."""


def _block(terms: Sequence[Term]) -> _Block:
    """Return one task's contrasts. A metric with fewer parts than another leaves the last ones 0."""
    n, width = len(terms[0].first.ids), max(len(term.metric.parts) for term in terms)
    cells: dict[bytes, int] = {}
    columns: list[Array] = []

    def cell_of(samples: Samples) -> int:
        parts = np.pad(samples.parts, ((0, 0), (0, width - samples.parts.shape[1])))
        place = cells.setdefault(parts.tobytes(), len(columns))
        if place == len(columns):
            columns.append(parts / (2 * n))
        return place

    groups: dict[str, tuple[Metric, list[int], list[int], list[int]]] = {}
    for place, term in enumerate(terms):
        _, *lists = groups.setdefault(term.metric.name, (term.metric, [], [], []))
        for of, value in zip(lists, (place, cell_of(term.first), cell_of(term.second)), strict=True):
            of.append(value)
    moves = terms[0].first.by_context(np.concatenate(columns, axis=1))
    return _Block(moves, len(columns), list(groups.values()))


def _curved(lines: Sequence[Sequence[Term]]) -> _Statistic:
    """Return the statistic for any metrics.

    With half the sum m and half the difference d of a pair's parts, signs s make it
    score(mean m + mean s d) - score(mean m - mean s d). All pairs of a context have one sign.
    """
    blocks = [_block(terms) for terms in zip(*lines, strict=True)]

    def statistic(signs: Array) -> Array:
        total = np.zeros((len(lines), len(signs)))
        start = 0
        for block in blocks:
            signs_here = signs[:, start : start + len(block.moves)]
            start += len(block.moves)
            moved = (signs_here @ block.moves).reshape(len(signs), block.cells, -1)
            means = block.moves.sum(axis=0).reshape(block.cells, -1)
            for metric, places, first, second in block.groups:
                used = slice(len(metric.parts))
                middle = means[first, used] + means[second, used]
                shift = moved[:, first, used] - moved[:, second, used]
                apart = metric.score(middle + shift) - metric.score(middle - shift)
                total[places] += apart.T / len(blocks)
        return total

    return statistic
