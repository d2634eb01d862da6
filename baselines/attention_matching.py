"""Attention matching: keys that were looked at, fitted to what attention gave (arXiv 2602.16284).

Follows `HighestAttentionKeysCompaction` and `OMPCompaction` of the authors' repository
(adamzweiger/compaction at 2e59cc8). Some keys stay. A bias on each makes their attention mass that of
the whole layer, and new values make the output that of the whole layer, for a sample of queries: here
the prompt's own, where the authors also let the model write about the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.least_squares import bounded_fit, least_squares, pursuit
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, select, top_positions
from kvmerge.softmax import Softmax

_CHOICES: dict[str, tuple[str, ...]] = {
    "key_choice": ("highest_attention", "omp"),
    "bias": ("nnls", "none"),
    "values": ("lstsq", "own"),
}
_BOUNDS = {"highest_attention": (math.exp(-3), math.exp(3)), "omp": (1e-12, math.exp(7))}
"""Least and largest factor on an entry's attention, by the choice of keys (the authors' settings)."""
_STEPS = {"highest_attention": 2, "omp": 0}
"""Gradient steps after the unbounded fit (the authors' settings)."""
_BLOCK = 256
"""Prompt tokens whose queries look at the whole prompt at once."""


@dataclass(frozen=True)
class AttentionMatching(Method):
    """Settings of attention matching."""

    key_choice: str = "highest_attention"
    """`highest_attention`: by the root mean square of the weights that a key receives; `omp`: one after
    the other, that which explains most of the attention mass still missing."""
    bias: str = "nnls"
    """`nnls` fits the attention mass; `none` leaves logits as they are."""
    values: str = "lstsq"
    """`lstsq` fits the output; `own` leaves each key its value."""
    rows: float = 2.0
    """Prompt tokens whose queries are matched, as a multiple of the budget; at most all."""
    at_once: int = 1
    """Keys that `omp` takes before it fits anew."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), allowed)
        if not 1 <= self.rows < math.inf:
            raise UserError(f"rows={self.rows} must be 1 or more: a fit needs a query for each entry.")
        if type(self.at_once) is not int or self.at_once < 1:
            raise UserError(f"at_once={self.at_once} must be a whole number of keys, 1 or more.")
        if self.key_choice != "omp" and self.at_once != 1:
            raise UserError(f"at_once={self.at_once} has no effect without key_choice=omp.")

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Choose the keys of each KV head, and fit their biases and values."""
        n_rows = min(layer.length, math.ceil(self.rows * allowance.n_keep))
        rows = torch.linspace(0, layer.length - 1, n_rows, device=layer.keys.device).round().long()
        queries = layer.queries[:, :, rows].float().unflatten(1, (layer.keys.shape[1], -1))
        fits = [
            self._fit(Sample.of(layer, queries, row, head), allowance.n_keep)
            for row in range(layer.keys.shape[0])
            for head in range(layer.keys.shape[1])
        ]
        positions, bias, values = (
            torch.stack(parts).unflatten(0, layer.keys.shape[:2]) for parts in zip(*fits, strict=True)
        )
        own = select(layer, positions)
        return Entries(
            own.keys,
            own.values if self.values == "own" else values.to(own.values.dtype),
            positions,
            bias=None if self.bias == "none" else bias,
        )

    def _fit(self, sample: Sample, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a KV head's positions and biases `(count,)`, and values `(count, head_dim)`."""
        bounds = _BOUNDS[self.key_choice]
        if self.key_choice == "omp":
            strength = sample.strength(sample.keys)
            positions = pursuit(strength, sample.mass, count, self.at_once, *bounds).sort().values
        else:
            positions = top_positions(sample.received, count)
        bias, values = torch.zeros(count, device=positions.device), sample.values[positions]
        if self.bias == "nnls":
            strength = sample.strength(sample.keys[positions])
            bias = bounded_fit(strength, sample.mass, _STEPS[self.key_choice], *bounds).log()
        if self.values == "lstsq":
            weights = sample.weights(sample.logits(sample.keys[positions]) + bias)
            values = least_squares(weights.flatten(0, 1), sample.output)
        return positions, bias, values


@dataclass(frozen=True)
class Sample:
    """Queries of one KV head's group, and what they see of the whole prompt, later tokens included."""

    queries: Tensor
    """`(G, n, head_dim)` float32."""
    keys: Tensor
    """`(T, head_dim)` float32."""
    values: Tensor
    """`(T, head_dim)` float32."""
    softmax: Softmax
    heads: slice
    """Which of the layer's query heads these are."""
    largest: Tensor
    """`(G, n, 1)` largest logit of each query."""
    mass: Tensor
    """`(G n,)` sum of `exp(logit - largest)` over the prompt."""
    received: Tensor
    """`(T,)` root mean square of the weights that each token receives."""
    output: Tensor
    """`(G n, head_dim)` output of attention."""

    @classmethod
    def of(cls, layer: PrefillLayer, queries: Tensor, row: int, head: int) -> Sample:
        """Let one KV head's queries, of `(batch, kv_heads, G, n, head_dim)`, look at its prompt."""
        keys, values = layer.keys[row, head].float(), layer.values[row, head].float()
        asked = queries[row, head]
        group, softmax = asked.shape[0], layer.softmax
        heads = slice(head * group, (head + 1) * group)
        squares = torch.zeros(keys.shape[0], device=keys.device)
        seen = []
        for block in asked.split(_BLOCK, dim=1):  # never the whole map
            logits = softmax.logits(block @ keys.T)
            largest = logits.amax(dim=-1, keepdim=True)
            weights = softmax.weights(logits, heads)
            squares += weights.square().sum(dim=(0, 1))
            seen.append((largest, (logits - largest).exp().sum(dim=-1), weights @ values))
        largest, mass, output = (torch.cat(parts, dim=1) for parts in zip(*seen, strict=True))
        received = (squares / (group * asked.shape[1])).sqrt()
        flat = (mass.flatten(), received, output.flatten(0, 1))
        return cls(asked, keys, values, softmax, heads, largest, *flat)

    def logits(self, keys: Tensor) -> Tensor:
        """Return the logits of keys `(m, head_dim)`: `(G, n, m)`."""
        return self.softmax.logits(self.queries @ keys.T)

    def strength(self, keys: Tensor) -> Tensor:
        """Return what keys `(m, head_dim)` add to the mass of each query: `(G n, m)`."""
        return (self.logits(keys) - self.largest).exp().flatten(0, 1)

    def weights(self, logits: Tensor) -> Tensor:
        """Return attention weights of logits `(G, n, m)`."""
        return self.softmax.weights(logits, self.heads)
