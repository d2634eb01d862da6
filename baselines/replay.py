"""Replay: keep what the prompt's own queries find when they are asked again after its end.

Ours. A prompt's queries are turned to positions after it, as if the text were read once more, and look
at all of its keys, their own and later ones among them. A token is worth the most that any of these
queries gives it: what is found for certain once stays, however seldom it is asked for. These marks are
weights, 0 to 1 in every head, so that all heads of all layers compete for the budget, each sure of a
floor. Near it stand KVzip (arXiv 2505.23416), which has the model repeat the prompt, and Compactor
(arXiv 2507.08143), which looks without a causal mask too; here the prompt is read once, and turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.competition import whole, won
from kvmerge.errors import UserError
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, ragged
from kvmerge.rope import Rope
from kvmerge.scores import products
from kvmerge.softmax import Softmax

_BLOCK = 128
"""Queries that look at the whole prompt at once."""
_SAFE = 2.0
"""A mark above every weight."""


@dataclass(frozen=True)
class Replay(Method):
    """Settings of replay."""

    rows: int | None = None
    """Queries that are asked again, spread evenly over the prompt; None: all."""
    ahead: int = 1
    """Positions after the prompt's end to which they are turned."""
    floor: float = 0.05
    """Part of an equal share that every head of a layer has for certain; 1: all heads keep the same."""
    layer_floor: float = 0.05
    """The same of every layer."""
    sinks: int = 4
    """First tokens, which stay."""
    window: int = 8
    """Last tokens, which stay."""

    allocates: ClassVar[bool] = True
    allocates_heads: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rows is not None and (type(self.rows) is not int or self.rows < 1):
            raise UserError(f"rows={self.rows} must be a whole number of queries, 1 or more, or null.")
        for name in ("ahead", "sinks", "window"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be a whole number, 0 or more.")
        for name in ("floor", "layer_floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be between 0 and 1.")

    def allocate(self, layers: Sequence[PrefillLayer], allowance: Allowance) -> list[int]:
        """Return the mean entries per KV head for each layer: its heads compete with all others."""
        marks = torch.stack([self._marks(layer).flatten() for layer in layers])
        kv_heads = layers[0].keys.shape[1]
        entries = won(marks.unsqueeze(0), allowance.n_keep * kv_heads) / kv_heads
        return _divided(entries, allowance.n_keep, self.layer_floor)[0].tolist()

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the best of every head, as many as it has won."""
        marks, n_keep = self._marks(layer), allowance.n_keep
        counts = _divided(won(marks, n_keep), n_keep, self.floor)
        best = marks.sort(dim=-1, descending=True, stable=True).indices[..., : int(counts.max())]
        return ragged(layer, best, counts)

    def _marks(self, layer: PrefillLayer) -> Tensor:
        """Return what each token is worth: `(batch, kv_heads, T)`, computed once for all budgets."""

        def answer() -> Tensor:
            assert layer.rope is not None, "the session gives it to methods that set needs_rope = True"
            marks = asked_again(
                layer.queries, layer.keys, layer.rope, layer.softmax, self.rows, self.ahead
            )
            marks[..., : self.sinks] = _SAFE
            marks[..., max(0, layer.length - self.window) :] = _SAFE
            return marks

        return layer.once(("replay", self.rows, self.ahead, self.sinks, self.window), answer)


def _divided(entries: Tensor, mean: int, floor: float) -> Tensor:
    """Return what each competitor keeps, `(1, competitors)`, at least one entry.

    Args:
        entries: what each has won, `(1, competitors)`.
        mean: what they keep on the mean.
        floor: part of it that is divided equally.
    """
    sure = max(floor, 1 / mean)
    return whole(entries.double() * (1 - sure) + mean * sure, mean * entries.shape[1])


def asked_again(
    queries: Tensor, keys: Tensor, rope: Rope, softmax: Softmax, rows: int | None, ahead: int
) -> Tensor:
    """Return the largest weight that each key receives from queries asked again after the prompt.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        rope: the model's rotation.
        softmax: the layer's.
        rows: queries, spread evenly over the prompt; None: all.
        ahead: positions after the prompt's end to which they are turned.

    Returns:
        `(batch, kv_heads, T)` float32, from 0 to 1, the largest over queries and the heads of a group.
    """
    length = keys.shape[2]
    count = length if rows is None else min(rows, length)
    asked = torch.linspace(0, length - 1, count, device=keys.device).round().long()
    largest = torch.zeros(keys.shape[:3], device=keys.device)
    for places in asked.split(_BLOCK):
        turned = rope.rotate(queries[:, :, places].float(), length + ahead - places)
        weights = softmax.weights(products(turned, keys, softmax))
        torch.maximum(largest, weights.flatten(2, 3).amax(dim=2), out=largest)
    return largest
