"""LagKV: keep the tokens that stand out from the partition that follows theirs (arXiv 2504.04704).

Follows `LagKVPress` of NVIDIA/kvpress 0.5.5. The text after the sinks is cut into partitions of `lag`
tokens. Keys and values of one are scaled, channel by channel, by the least and largest of the next; a
token counts by how unevenly its channels then lie. Tokens compete within their partition, so that each
keeps about the same share. Sinks, the last whole partition and what follows it stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.top_scores import TopScores
from kvmerge.errors import UserError
from kvmerge.method import PrefillLayer


@dataclass(frozen=True)
class LagKV(TopScores):
    """Settings of LagKV; the defaults are those of kvpress."""

    sinks: int = 4
    """First tokens, which stay."""
    lag: int = 128
    """Tokens of a partition."""

    def __post_init__(self) -> None:
        if type(self.sinks) is not int or self.sinks < 0:
            raise UserError(f"sinks={self.sinks} must be a whole number of tokens, 0 or more.")
        if type(self.lag) is not int or self.lag < 2:
            raise UserError(f"lag={self.lag} must be a whole number of tokens, 2 or more.")

    def token_scores(self, layer: PrefillLayer) -> Tensor:
        """Return each token's rank in its partition; those that stay are above all ranks.

        Of a budget that does not hold all that stays, the sinks come first, then the most recent.
        """
        length, kv_heads = layer.length, layer.keys.shape[1]
        partitions = max(0, (length - self.sinks) // self.lag - 1)
        end = self.sinks + partitions * self.lag
        ranked = torch.arange(length, device=layer.keys.device, dtype=torch.float32) + 1
        ranked[: self.sinks] = torch.inf
        ranked = ranked.repeat(layer.keys.shape[0], kv_heads, 1)
        if partitions:
            parts = slice(self.sinks, end + self.lag)
            merit = unevenness(layer.keys[:, :, parts], self.lag)
            merit = merit + unevenness(layer.values[:, :, parts], self.lag)
            ranks = merit.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
            ranked[..., self.sinks : end] = ranks.flatten(2) / self.lag  # below 1
        return ranked


def unevenness(states: Tensor, lag: int) -> Tensor:
    """Return how unevenly the channels of each token lie within the range that the next partition has.

    Args:
        states: `(batch, kv_heads, n * lag, head_dim)` keys or values of whole partitions.
        lag: tokens of a partition.

    Returns:
        `(batch, kv_heads, n - 1, lag)` float32, the softmax over a partition's tokens of the standard
        deviation over channels; of all partitions but the last. A channel without spread counts as 0.
    """
    parts = states.float().unflatten(2, (-1, lag))
    own, following = parts[:, :, :-1], parts[:, :, 1:]
    least, most = following.amin(dim=-2, keepdim=True), following.amax(dim=-2, keepdim=True)
    spread = most - least
    scaled = torch.where(spread > 0, (own - least) / spread, 0.0)
    return scaled.std(dim=-1).softmax(dim=-1)
