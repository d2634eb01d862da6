"""Ada-SnapKV: SnapKV whose KV heads divide the budget of a layer (arXiv 2407.11550).

Follows `AdaptiveSnapKVCluster` of the authors' repository (FFY0/AdaKV at efe4e2e) with grouped queries.
Heads whose attention is spread keep more, those that look at few tokens less. The authors' rounding
meets the mean only nearly; `exact` meets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.competition import whole, won
from baselines.snapkv import SnapKV
from kvmerge.errors import UserError
from kvmerge.method import Allowance, Entries, PrefillLayer, ragged


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """Settings of Ada-SnapKV; the defaults are those of the authors' LongBench runs."""

    floor: float = 0.2
    """Part of an equal share that every head has for certain; 1 is SnapKV."""
    exact: bool = True
    """Whether the mean over the heads of a layer is the budget; False keeps the authors' rounding."""

    allocates_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise UserError(f"floor={self.floor} must be between 0 and 1.")

    @property
    def meets_budget(self) -> bool:  # type: ignore[override]
        """The authors' rounding may miss it by an entry or two."""
        return self.exact

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the window, and of each head as many of the best tokens before it as it has won."""
        window = self.window_for(allowance.n_keep)
        pooled = self.pooled(layer, window)
        counts = head_counts(pooled, allowance.n_keep - window, floor=self.floor, exact=self.exact)
        most = int(counts.max())
        best = pooled.sort(dim=-1, descending=True, stable=True).indices[..., :most]
        last = torch.arange(layer.length - window, layer.length, device=best.device)
        tokens = torch.cat([last.expand(*best.shape[:2], -1), best], dim=-1)
        return ragged(layer, tokens, counts + window)


def head_counts(scores: Tensor, mean: int, *, floor: float, exact: bool) -> Tensor:
    """Divide the entries of a layer among its heads: they go to the best scores, whosoever they are.

    A head keeps `(1 - floor) won + floor mean` entries, where `won` are its tokens among the best of
    all heads. Ties go to the better rank within a head, then to the lower head.

    Args:
        scores: `(batch, kv_heads, n)`.
        mean: entries of a head on the mean, at most `n`.
        floor: part of it that is divided equally.
        exact: whether the counts add up to `mean` a head, the largest remainders rounded up (of equal
            ones the lower head's); else each is rounded by itself, with `floor mean` rounded down (the
            authors).

    Returns:
        `(batch, kv_heads)` int64, at most `n` each.
    """
    best = won(scores, mean)
    if not exact:
        return (best * (1 - floor) + int(mean * floor)).round().long()
    return whole(best.double() * (1 - floor) + mean * floor, scores.shape[1] * mean)
