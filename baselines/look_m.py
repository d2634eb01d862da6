"""LOOK-M's pivot merging on text: each evicted token is averaged into its nearest (arXiv 2406.18139).

Follows `PivotKVCache_LayerWise` of the authors' repository (SUSTechBruce/LOOK-M at ecf0f51). Their
other half, which keeps text and evicts image tokens, has nothing to evict from a text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from baselines.d2o import SINKS
from baselines.heavy_hitters import even_counts, keep
from baselines.nearest import nearest, others
from kvmerge import rows
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all, pick


@dataclass(frozen=True)
class LookM(Method):
    """LOOK-M's pivot merging has no settings."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Evict as H2O does, the first tokens spared, and merge what is evicted."""
        entries = replace(keep_all(layer), scores=layer.column_scores())
        return self._evict(entries, allowance, layer.length)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Add the step's attention to the scores, then evict and merge again."""
        assert entries.scores is not None
        scores = entries.scores + step.mass(entries.scores.shape[1])
        return self._evict(replace(entries, scores=scores), step.allowance, step.prompt_length)

    def _evict(self, entries: Entries, allowance: Allowance, length: int) -> Entries:
        assert entries.scores is not None
        if entries.scores.shape[-1] <= allowance.n_keep:
            return entries
        heavy, recent = even_counts(allowance, length)
        forced = entries.scores.clone()
        forced[..., :SINKS] = torch.inf
        slots = keep(forced, heavy=heavy, recent=recent)
        keys, values = pivot_merge(entries.keys, entries.values, slots)
        return replace(pick(entries, slots), keys=keys, values=values)


def pivot_merge(keys: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Merge every evicted entry into the kept one whose key is nearest by cosine.

    An evicted entry is first averaged with the kept one, its pivot; the pivot then becomes the mean of
    itself and of these averages.

    Args:
        keys: `(batch, kv_heads, n, head_dim)`.
        values: `(batch, kv_heads, n, head_dim)`.
        kept: `(batch, kv_heads, k)` int64 slots, ascending.

    Returns:
        keys and values, `(batch, kv_heads, k, head_dim)` in their input dtype.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    evicted = others(kept, keys.shape[2])
    _, pivot = nearest(rows.take(keys.to(exact), evicted), rows.take(keys.to(exact), kept))
    given = torch.zeros_like(kept, dtype=exact)
    given = given.scatter_add_(-1, pivot, torch.ones_like(pivot, dtype=exact)).unsqueeze(-1)

    def merged(states: Tensor) -> Tensor:
        own, rest = (rows.take(states.to(exact), slots) for slots in (kept, evicted))
        total = own * (1 + given / 2)
        return (rows.add(total, pivot, rest / 2) / (1 + given)).to(states.dtype)

    return merged(keys), merged(values)
