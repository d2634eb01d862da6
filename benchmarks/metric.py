"""Metrics: how a task's score comes from what its samples were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """How a task score comes from its samples' numbers."""

    parts: tuple[str, ...]
    """Keys of a record line, averaged over seeds and then samples."""
    score: Callable[[Array], Array]
    """From means of the parts, `(..., parts)`, to scores as published, `(...)`."""
    higher_is_better: bool = True
    averaged: bool = True
    """Whether the score is one of 0 to 100 that has a place in an average over tasks."""


def _percent(means: Array) -> Array:
    return 100 * means[..., 0]


def _geometric_mean(means: Array) -> Array:
    return 100 * np.cbrt(np.prod(means, axis=-1))


def _perplexity(means: Array) -> Array:
    # Both means are over the same samples, so their ratio is the ratio of the sums.
    return np.exp(means[..., 0] / means[..., 1])


def _nothing(means: Array) -> Array:
    return np.full(means.shape[:-1], np.nan)


_MEAN = Metric(("score",), _percent)
_SPECIAL = {
    "rouge_gm": Metric(("rouge1", "rouge2", "rougel"), _geometric_mean),
    "perplexity": Metric(("nll", "tokens"), _perplexity, higher_is_better=False, averaged=False),
    "unscored": Metric((), _nothing, averaged=False),
}


def find_metric(name: str) -> Metric:
    """Give the rule for a metric's name: the mean score in percent, but for the special ones."""
    return _SPECIAL.get(name, _MEAN)
