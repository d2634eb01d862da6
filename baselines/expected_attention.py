"""Expected attention: keep the tokens that queries to come are expected to look at (arXiv 2510.00636).

Follows `ExpectedAttentionPress` of NVIDIA/kvpress 0.5.5. The queries to come are taken to be normal,
with the mean and covariance that the prompt's have before their rotation, turned by the mean rotation
of the next positions. Then the expected `exp(q k)` of a key `k` has a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.top_scores import TopScores
from kvmerge.errors import UserError
from kvmerge.method import PrefillLayer
from kvmerge.rope import Rope
from kvmerge.softmax import Softmax


@dataclass(frozen=True)
class ExpectedAttention(TopScores):
    """Settings of expected attention; the defaults are those of kvpress."""

    future: int = 512
    """Positions after the prompt whose mean rotation counts."""
    sinks: int = 4
    """First tokens, which stay, and whose queries do not count."""
    covariance: bool = True
    """Whether the spread of the queries counts, not their mean alone."""
    value_norm: bool = True
    """Whether a token counts by the length of its value, too."""
    epsilon: float = 0.0
    """Added to the expected weight before it is multiplied by the length of the value."""

    needs_rope: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.future) is not int or self.future < 1:
            raise UserError(f"future={self.future} must be a whole number of positions, 1 or more.")
        if type(self.sinks) is not int or self.sinks < 0:
            raise UserError(f"sinks={self.sinks} must be a whole number of tokens, 0 or more.")
        if not 0 <= self.epsilon < float("inf"):
            raise UserError(f"epsilon={self.epsilon} must be 0 or more.")

    def token_scores(self, layer: PrefillLayer) -> Tensor:
        """Return the expected weight of each token, times the length of its value."""
        assert layer.rope is not None, "the session gives it to methods that set needs_rope = True"
        sinks = min(self.sinks, layer.length - 1)
        mean, spread = query_statistics(layer.queries, layer.rope, sinks=sinks, future=self.future)
        scores = expected_weights(
            mean, spread if self.covariance else None, layer.keys[:, :, sinks:], layer.softmax
        )
        if self.value_norm:
            scores = (scores + self.epsilon) * layer.values[:, :, sinks:].float().norm(dim=-1)
        safe = scores.new_full((*scores.shape[:2], sinks), torch.inf)
        return torch.cat([safe, scores], dim=-1)


def query_statistics(queries: Tensor, rope: Rope, *, sinks: int, future: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the queries that are to come.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        rope: the model's rotation.
        sinks: first queries, which do not count.
        future: positions after the prompt, over which the rotation is averaged.

    Returns:
        `(batch, heads, head_dim)` and `(batch, heads, head_dim, head_dim)` float32.
    """
    length = queries.shape[2]
    positions = torch.arange(sinks, length, device=queries.device)
    plain = rope.rotate(queries[:, :, sinks:].float(), -positions)
    mean = plain.mean(dim=2)
    centred = plain - mean.unsqueeze(2)
    spread = centred.transpose(2, 3) @ centred / centred.shape[2]
    ahead = torch.arange(length, length + future, device=queries.device)
    halfway = rope.rotate_by_mean(spread, ahead).transpose(2, 3)
    return rope.rotate_by_mean(mean, ahead), rope.rotate_by_mean(halfway, ahead)


def expected_weights(mean: Tensor, spread: Tensor | None, keys: Tensor, softmax: Softmax) -> Tensor:
    """Return the weight that each key can expect, a mean over the query heads of a group.

    `E exp(q k scale) = exp(mean k scale + scale^2 k' spread k / 2)`, normalised over the keys. A soft
    cap of the logits, which has no such form, is left out.

    Args:
        mean: `(batch, heads, head_dim)`.
        spread: `(batch, heads, head_dim, head_dim)`; None leaves it out.
        keys: `(batch, kv_heads, n, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        softmax: the layer's.

    Returns:
        `(batch, kv_heads, n)` float32.
    """
    exact = keys.float().unsqueeze(2)  # (batch, kv_heads, 1, n, head_dim)
    by_group = mean.unflatten(1, (keys.shape[1], -1)).unsqueeze(-1)
    logits = softmax.scale * (exact @ by_group).squeeze(-1)  # (batch, kv_heads, G, n)
    if spread is not None:
        turned = exact @ spread.unflatten(1, (keys.shape[1], -1))
        logits = logits + softmax.scale**2 / 2 * (turned * exact).sum(dim=-1)
    return softmax.weights(logits.unsqueeze(-2)).squeeze(-2).mean(dim=2)
