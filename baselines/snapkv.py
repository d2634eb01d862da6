"""SnapKV: keep what the last prompt tokens attend to, and those tokens (arXiv 2404.14469).

Follows `SnapKVCluster` of the authors' repository (FasterDecoding/SnapKV at e216ddc), with the settings
of its LongBench runs. Where query heads share a KV head their weights are averaged before pooling (the
`kv_head` mode of Zefan-Cai/KVCache-Factory); the authors repeat the cache for each query head instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvmerge.budget import half
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, select, top_positions
from kvmerge.scores import last_rows
from kvmerge.softmax import Softmax

POOLINGS = ("max", "avg")


@dataclass(frozen=True)
class SnapKV(Method):
    """Settings of SnapKV; the defaults are those of the authors' LongBench runs."""

    window: int = 32
    """Last tokens, which observe the others and are always kept; half the budget where it is not
    larger than this."""
    kernel: int = 7
    """Width of the pooling, an odd number of tokens."""
    pooling: str = "max"
    """`max` (the authors' LongBench runs) or `avg` (the default of their class)."""

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise UserError(f"window={self.window} must be a whole number of tokens, 1 or more.")
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"kernel={self.kernel} must be an odd number of tokens.")
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the window, and the best tokens before it."""
        window = self.window_for(allowance.n_keep)
        pooled = self.pooled(layer, window)
        return select(layer, keep(pooled, allowance.n_keep - window, window=window))

    def pooled(self, layer: PrefillLayer, window: int) -> Tensor:
        """Return how much the last `window` tokens attend to those before: see `pooled_scores`."""
        return pooled_scores(
            layer.queries,
            layer.keys,
            window=window,
            kernel=self.kernel,
            pooling=self.pooling,
            softmax=layer.softmax,
        )

    def window_for(self, n_keep: int) -> int:
        """Return the window under a budget of `n_keep` entries."""
        return self.window if self.window < n_keep else half(n_keep)


def pooled_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    window: int,
    kernel: int,
    pooling: str,
    softmax: Softmax | None = None,
) -> Tensor:
    """Return how much the last tokens attend to each token before them, smoothed over its neighbours.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE.
        window: last tokens, whose attention counts.
        kernel: width of the pooling, odd.
        pooling: `max` or `avg`; the average counts zeros beyond the ends.
        softmax: the layer's; None means a plain one.

    Returns:
        `(batch, kv_heads, T - window)` float32, the mean over the query heads of each group.
    """
    rows = last_rows(queries, keys, window, softmax=softmax)
    sums = rows[..., : keys.shape[2] - window].sum(dim=2)
    return pool(sums.unflatten(1, (keys.shape[1], -1)).mean(dim=2), kernel, pooling)


def pool(scores: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pool `(batch, kv_heads, n)` over `kernel` neighbours; the length stays."""
    if scores.shape[-1] == 0:
        return scores
    if pooling == "max":
        return max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def keep(pooled: Tensor, n_past: int, *, window: int) -> Tensor:
    """Return the positions of the best `n_past` tokens before the window, and of the window.

    Args:
        pooled: `(batch, kv_heads, T - window)`.
        n_past: tokens kept before the window.
        window: last tokens, all kept.

    Returns:
        `(batch, kv_heads, n_past + window)` int64, ascending. Ties, which `max` pooling makes many of,
        go to the lower position.
    """
    length = pooled.shape[-1] + window
    last = torch.arange(length - window, length, device=pooled.device)
    return torch.cat([top_positions(pooled, n_past), last.expand(*pooled.shape[:2], -1)], dim=-1)
