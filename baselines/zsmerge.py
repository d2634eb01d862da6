"""ZSMerge: recent tokens, those that attention likes, and the rest averaged (arXiv 2503.10714).

Follows `cache_init` of the authors' repository (SusCom-Lab/ZSMerge at 4bab127) with the settings of its
script. Attention counts the less the longer ago it was paid. The tokens that are neither recent nor
liked become a few means of equal parts of the text; how many tokens one stands for raises its logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.meanpool_chunks import chunk_sets
from kvmerge import merging
from kvmerge.errors import UserError
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, top_positions
from kvmerge.scores import attention_blocks
from kvmerge.softmax import Softmax

_LEAST = 2.0**-24
"""Weight of a row's attention below which it is left out, beside 1 for the last row's."""


@dataclass(frozen=True)
class ZSMerge(Method):
    """Settings of ZSMerge; the defaults are those of the authors' script."""

    tail: float = 0.4
    """Recent entries, a fraction of the budget, at least 2."""
    dense: float = 1
    """Averaged entries: a number of them, or below 1 a fraction of what the tail leaves."""
    shrink: float = 0.98
    """What one row of attention counts beside the row after it."""
    scale: float = 0.6
    """Factor on the log of an entry's size, which is added to its logit."""

    def __post_init__(self) -> None:
        if not 0 <= self.tail < 1:
            raise UserError(f"tail={self.tail} must be a fraction of the budget, 0 or more, below 1.")
        if not 0 < self.dense < math.inf or (self.dense >= 1 and self.dense != int(self.dense)):
            raise UserError(f"dense={self.dense} must be a number of entries, or a fraction below 1.")
        if not 0 < self.shrink <= 1:
            raise UserError(f"shrink={self.shrink} must be above 0, and 1 at most.")
        if not 0 <= self.scale < math.inf:
            raise UserError(f"scale={self.scale} must be 0 or more.")

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the recent and the liked tokens, and average the others."""
        n_tail, n_dense = self.counts(allowance.n_keep)
        scores = faded_sums(layer.queries, layer.keys, self.shrink, softmax=layer.softmax)
        protected = torch.zeros_like(scores, dtype=torch.bool)
        protected[..., layer.length - n_tail :] = True
        liked = top_positions(scores[..., : layer.length - n_tail], allowance.n_keep - n_tail - n_dense)
        set_ids = chunk_sets(protected.scatter_(-1, liked, True), allowance.n_keep)
        sizes = merging.sum_over_sets(set_ids, torch.ones_like(set_ids))
        weights = 1 / sizes.float().gather(-1, set_ids)
        return Entries(
            merging.weighted_sum(layer.keys, set_ids, weights),
            merging.weighted_sum(layer.values, set_ids, weights),
            merging.pivot_tokens(set_ids, scores, "first"),
            sizes,
            self.scale * sizes.float().log(),
        )

    def counts(self, n_keep: int) -> tuple[int, int]:
        """Return the recent and the averaged entries of a budget; the last to give way is one mean."""
        n_tail = min(max(2, int(self.tail * n_keep)), n_keep - 1)
        share = self.dense if self.dense >= 1 else self.dense * (n_keep - n_tail)
        return n_tail, min(max(1, int(share)), n_keep - n_tail)


def faded_sums(
    queries: Tensor, keys: Tensor, shrink: float, *, softmax: Softmax | None = None
) -> Tensor:
    """Sum the columns of the attention map, each row worth `shrink` times the row after it.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE.
        shrink: above 0, 1 at most. Rows that are worth less than 2^-24 of the last are left out.
        softmax: the layer's; None means a plain one.

    Returns:
        `(batch, kv_heads, T)` float32, the sum over the query heads of each group.
    """
    batch, heads, length, _ = queries.shape
    rows = length if shrink == 1 else min(length, math.ceil(math.log(_LEAST, shrink)))
    kv_heads = keys.shape[1]
    sums = torch.zeros(batch, kv_heads, length, device=queries.device)
    for first, weights in attention_blocks(queries, keys, begin=length - rows, softmax=softmax):
        age = length - 1 - torch.arange(first, first + weights.shape[2], device=queries.device)
        # one row times the rows of a group: sums over rows and heads in one product
        worth = torch.tensor(shrink, device=queries.device).pow(age).repeat(heads // kv_heads)
        of_group = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3)
        sums[..., : weights.shape[-1]] += (worth.expand(batch, kv_heads, 1, -1) @ of_group).squeeze(2)
    return sums
