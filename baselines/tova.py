"""TOVA: keep the tokens that the last query attends to most (arXiv 2401.06104).

Follows `TOVACache.reduce` of the authors' repository (schwartz-lab-NLP/TOVA at 9c7d09b): the weights
are averaged over all query heads of a layer, so that all its KV heads keep the same tokens. No token is
safe, the newest included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvmerge.method import (
    Allowance,
    DecodeStep,
    Entries,
    Method,
    PrefillLayer,
    keep_all,
    pick,
    top_positions,
)
from kvmerge.scores import last_rows


@dataclass(frozen=True)
class TOVA(Method):
    """TOVA has no settings."""

    holds: ClassVar[bool] = True

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep what the last prompt token attends to."""
        weights = last_rows(layer.queries, layer.keys, 1, softmax=layer.softmax)[:, :, 0]
        return _trim(keep_all(layer), weights, allowance.n_keep)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Drop the entry that the new token attends to least, itself perhaps."""
        return _trim(entries, step.weights, step.allowance.n_keep)


def _trim(entries: Entries, weights: Tensor, n_keep: int) -> Entries:
    slots = keep(weights, n_keep).unsqueeze(1)
    return pick(entries, slots.expand(-1, entries.keys.shape[1], -1))


def keep(weights: Tensor, n_keep: int) -> Tensor:
    """Return which entries stay.

    Args:
        weights: `(batch, heads, n)` attention of one query in each query head.
        n_keep: entries to keep.

    Returns:
        `(batch, min(n, n_keep))` int64, ascending, the same for all heads. Ties go to the lower slot.
    """
    return top_positions(weights.mean(dim=1), n_keep)
