"""How a layer turns products of queries and keys into attention weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """The softmax of one layer: a plain one has a scale and nothing else."""

    scale: float
    """Factor on the products of queries and keys."""
    softcap: float | None = None
    """Logits stay within plus and minus this (Gemma-2): `softcap * tanh(logits / softcap)`."""
    sinks: Tensor | None = None
    """`(heads,)` logit of a column without a value, beside each row's own (gpt-oss); its weight is
    lost."""

    @property
    def is_plain(self) -> bool:
        """Whether kernels that know nothing but a scale compute it."""
        return self.softcap is None and self.sinks is None

    def logits(self, products: Tensor) -> Tensor:
        """Return the logits of products of queries and keys, of any shape."""
        return self.capped(products * self.scale)

    def capped(self, logits: Tensor) -> Tensor:
        """Return scaled logits within the cap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def weights(self, logits: Tensor, heads: slice = slice(None)) -> Tensor:
        """Return the weights of masked logits.

        Args:
            logits: `(…, heads, rows, columns)`, or with the heads of each group apart,
                `(…, kv_heads, group, rows, columns)`.
            heads: which of the layer's query heads these are.
        """
        if self.sinks is None:
            return logits.softmax(dim=-1)
        return self.beside_sinks(*normalised(logits), heads)

    def beside_sinks(self, weights: Tensor, totals: Tensor, heads: slice = slice(None)) -> Tensor:
        """Return what the sinks leave of weights that sum to 1, as they are where there are none.

        Args:
            weights: as `normalised` returns them, of logits as in `weights`.
            totals: alike.
            heads: which of the layer's query heads these are.
        """
        if self.sinks is None:
            return weights
        sinks = self.sinks[heads].to(weights)
        if sinks.shape[0] != weights.shape[-3]:
            sinks = sinks.unflatten(0, (-1, weights.shape[-3]))
        return weights * torch.sigmoid(totals - sinks[..., None, None])


def normalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of logits `(…, columns)`, and the log-sum-exp of each row, `(…, 1)`."""
    weights = logits.softmax(dim=-1)
    # the largest weight is exp(largest logit - total): no second pass of exponentials
    return weights, logits.amax(dim=-1, keepdim=True) - weights.amax(dim=-1, keepdim=True).log()


def plain(head_dim: int) -> Softmax:
    """Return the softmax of most models: a scale of `1 / sqrt(head_dim)`."""
    return Softmax(head_dim**-0.5)
