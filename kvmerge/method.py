"""The interface of a cache method: what it is handed, and what it returns.

A method never sees the model or the tokenizer. It is handed one finished prefill layer and says
what stays in the cache. It keeps no state: what it must remember lives in what it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefillLayer:
    """One layer as the prefill leaves it. `T` prompt tokens, head `h` uses KV head `h // G`."""

    queries: Tensor
    """`(batch, heads, T, head_dim)`, after RoPE."""
    keys: Tensor
    """`(batch, kv_heads, T, head_dim)`, after RoPE."""
    values: Tensor
    """`(batch, kv_heads, T, head_dim)`."""
    scores: Tensor | None
    """`(batch, kv_heads, T)` float32 attention column sums; None for methods that need none."""
    layer_idx: int
    num_layers: int
    scale: float
    """Factor on the attention logits."""

    @property
    def length(self) -> int:
        """Prompt tokens `T`."""
        return self.keys.shape[2]

    def column_scores(self) -> Tensor:
        """The scores, for methods that declared `needs_scores`."""
        assert self.scores is not None, "a method that reads scores must set needs_scores = True"
        return self.scores


@dataclass(frozen=True)
class Allowance:
    """How much one method may keep of one layer."""

    n_keep: int
    """Entries per KV head, at least 1 and below the prompt length."""
    budget: float
    """The same as a fraction of the prompt, as requested."""
    generator: torch.Generator | None = None
    """Seeded by (seed, sample, layer); None where nothing may be random."""


@dataclass(frozen=True)
class Entries:
    """What stays of one layer, `n` entries per KV head, ascending by position."""

    keys: Tensor
    """`(batch, kv_heads, n, head_dim)`, in the cache's dtype."""
    values: Tensor
    """`(batch, kv_heads, n, head_dim)`, in the cache's dtype."""
    positions: Tensor
    """`(batch, kv_heads, n)` int64: the prompt position an entry answers to (a merged one: its
    pivot's)."""
    sizes: Tensor | None = None
    """`(batch, kv_heads, n)` int64 tokens merged into each entry; None means all 1."""
    bias: Tensor | None = None
    """`(batch, kv_heads, n)` float32 added to the attention logits of each entry; None means 0."""


class Method(ABC):
    """A cache method: subclass as a frozen dataclass whose fields are its settings."""

    needs_scores: ClassVar[bool] = False
    """Whether `compress` reads the attention column sums."""
    stochastic: ClassVar[bool] = False
    """Whether the result depends on the seed; such methods are run once a seed."""

    @abstractmethod
    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep `allowance.n_keep` entries of a finished layer.

        Not called where the budget holds the whole prompt: everything is kept then.
        Raises `UserError` if the prompt is too short for what the method protects.
        """


def select(layer: PrefillLayer, positions: Tensor) -> Entries:
    """Keep whole tokens: `positions` `(batch, kv_heads, n)` int64, ascending."""
    index = positions.unsqueeze(-1).expand(-1, -1, -1, layer.keys.shape[-1])
    return Entries(layer.keys.gather(2, index), layer.values.gather(2, index), positions)


def keep_all(layer: PrefillLayer) -> Entries:
    """Keep every token of a layer."""
    batch, kv_heads, length, _ = layer.keys.shape
    positions = torch.arange(length, device=layer.keys.device).expand(batch, kv_heads, length)
    return Entries(layer.keys, layer.values, positions)


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest scores along the last axis, ascending; ties: lower first.

    `torch.topk` leaves the order of ties open, so this is a stable sort (methods.md 0.5).
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
