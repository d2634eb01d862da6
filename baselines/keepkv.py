"""KeepKV: merge by attention, so that what an entry receives is kept (arXiv 2504.09936).

Follows the Llama path of the authors' repository (kkvcache/KeepKV at a25a2b5, `utils_hh`). Recent
tokens estimate how strongly each token will be attended to, without normalising. An evicted token is
merged into the kept one of the nearest key, weighted by these estimates, if it is near enough; how many
tokens an entry stands for multiplies its attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.heavy_hitters import even_counts
from baselines.nearest import nearest, others
from kvmerge import rows
from kvmerge.errors import UserError
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, top_positions
from kvmerge.scores import logit_blocks
from kvmerge.softmax import normalised

_SMALLEST = 1e-30
"""Least estimate, so that an entry that nobody attended to still has a mean."""


@dataclass(frozen=True)
class KeepKV(Method):
    """Settings of KeepKV; the defaults are those of the authors' command line."""

    threshold: float = 0.8
    """Least cosine of an evicted key with the nearest kept one, for the token to be merged there."""
    distance_weight: float = 1.2
    """What the last recent token's attention counts in choosing, beside 1 for the first's."""
    sinks: int = 4
    """First tokens, which stay; of the half that is not recent."""
    epsilon: float = 1.0
    """Added to every estimate, in units of the smallest normal float16."""

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise UserError(f"threshold={self.threshold} must be a cosine, between -1 and 1.")
        if not 0 < self.distance_weight < math.inf:
            raise UserError(f"distance_weight={self.distance_weight} must be above 0.")
        if type(self.sinks) is not int or self.sinks < 0:
            raise UserError(f"sinks={self.sinks} must be a whole number of tokens, 0 or more.")
        if not 0 <= self.epsilon < math.inf:
            raise UserError(f"epsilon={self.epsilon} must be 0 or more.")

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep sinks, heavy hitters of the recent tokens, and those; merge the others into them."""
        recent = max(1, even_counts(allowance, layer.length)[1])
        heavy = allowance.n_keep - recent
        strength, weighted, shift = recent_strength(layer, recent, self.distance_weight)
        weighted[..., : min(self.sinks, heavy)] = torch.inf
        hitters = top_positions(weighted[..., : layer.length - recent], heavy)
        last = torch.arange(layer.length - recent, layer.length, device=hitters.device)
        kept = torch.cat([hitters, last.expand(*hitters.shape[:2], -1)], dim=-1)
        epsilon = self.epsilon * torch.finfo(torch.float16).tiny * (-shift).exp()
        weights = (strength + epsilon.unsqueeze(-1)).clamp_min(_SMALLEST)
        return merge_by_weight(layer, kept, weights, self.threshold)


def recent_strength(
    layer: PrefillLayer, recent: int, distance_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how strongly recent tokens attend to each token, without the softmax's normalisation.

    The strength is the mean of `exp(logit - shift)` over those of the last `recent` rows that see the
    token, and over the query heads of a group.

    Args:
        layer: a finished layer.
        recent: last rows, 1 or more.
        distance_weight: what the last of them counts in the second sum, beside 1 for the first.

    Returns:
        strength `(batch, kv_heads, T)` float32; the weighted sum over the rows, alike; and the shift
        `(batch, kv_heads)`, the largest of the logits.
    """
    batch, kv_heads, length, _ = layer.keys.shape
    sums = torch.zeros(batch, kv_heads, 2, length, device=layer.keys.device)
    shift = torch.full((batch, kv_heads), -torch.inf, device=layer.keys.device)
    growth = torch.linspace(1.0, distance_weight, recent, device=layer.keys.device)
    begin = length - recent
    for first, logits in logit_blocks(layer.queries, layer.keys, begin, layer.softmax):
        weights, totals = normalised(logits)
        largest = torch.maximum(shift, logits.amax(dim=(2, 3, 4)))
        # a softmax is faster than exponentials alone: exp(logit - shift) = weight * exp(total - shift)
        share = (totals.squeeze(-1) - largest[..., None, None]).exp() / totals.shape[2]
        weighted = share * growth[first - begin :][: share.shape[3]]
        by_row = torch.stack([share, weighted], dim=2).flatten(3, 4)
        sums *= (shift - largest).exp()[..., None, None]
        sums[..., : logits.shape[-1]] += by_row @ weights.flatten(2, 3)
        shift = largest
    strength, weighted = sums.unbind(dim=2)
    visible = (length - torch.arange(length, device=sums.device)).clamp_max(recent)
    return strength / visible, weighted, shift


def merge_by_weight(layer: PrefillLayer, kept: Tensor, weights: Tensor, threshold: float) -> Entries:
    """Merge the other tokens into the kept ones whose keys are nearest, where they are near enough.

    A kept entry becomes the mean of its members by weight; the log of their number is added to its
    logit. Tokens that are not near enough are dropped.

    Args:
        layer: a finished layer.
        kept: `(batch, kv_heads, k)` int64 positions, ascending.
        weights: `(batch, kv_heads, T)` float32, above 0.
        threshold: least cosine.
    """
    keys, values = layer.keys.float(), layer.values.float()
    gone = others(kept, layer.length)
    similarity, entry = nearest(rows.take(keys, gone), rows.take(keys, kept))
    merges = similarity >= threshold
    own, given = weights.gather(-1, kept), weights.gather(-1, gone) * merges
    total = own.scatter_add(-1, entry, given).unsqueeze(-1)

    def mean(states: Tensor) -> Tensor:
        start = rows.take(states, kept) * own.unsqueeze(-1)
        added = rows.take(states, gone) * given.unsqueeze(-1)
        return rows.add(start, entry, added) / total

    sizes = torch.ones_like(kept).scatter_add_(-1, entry, merges.long())
    return Entries(
        mean(keys).to(layer.keys.dtype),
        mean(values).to(layer.values.dtype),
        kept,
        sizes,
        sizes.float().log(),
    )
