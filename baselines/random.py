"""Random eviction: the control that any selection must beat (docs/methods.md).

The last tokens are kept as KVMerger keeps its recent ones; the rest of the budget is drawn uniformly
without replacement, anew for each KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvmerge.budget import at_least_one, recent_share
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, select, top_positions


@dataclass(frozen=True)
class Random(Method):
    """Settings of random eviction."""

    recent: float | None = None
    """Fraction of the prompt always kept at its end; None: KVMerger's share at this budget."""

    stochastic: ClassVar[bool] = True

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the recent tokens and a uniform draw of the others."""
        share = recent_share(allowance.budget) if self.recent is None else self.recent
        n_recent = min(at_least_one(share, layer.length), allowance.n_keep)
        batch, kv_heads, length, _ = layer.keys.shape
        draw = torch.rand(batch, kv_heads, length, generator=allowance.generator)
        draw[..., length - n_recent :] = 2.0  # above every draw
        return select(layer, top_positions(draw, allowance.n_keep).to(layer.keys.device))
