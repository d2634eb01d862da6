"""What methods that keep heavy hitters share: the split of a budget, the scores, and who is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge.budget import count
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, top_positions
from kvmerge.scores import head_column_sums

SCORE_DTYPES = ("float32", "model")


@dataclass(frozen=True)
class HeavyHitters(Method):
    """Settings of every H2O method."""

    heavy: int | None = None
    """A fixed number of heavy hitters instead of half; the rest of the budget is recent."""
    recent: int | None = None
    """A fixed number of recent tokens instead of half; the rest of the budget is heavy."""
    score_dtype: str = "float32"
    """`model` rounds the weights to the model's dtype, and the sums after each step (the authors)."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.score_dtype not in SCORE_DTYPES:
            raise unknown("score_dtype", self.score_dtype, SCORE_DTYPES)
        for name in ("heavy", "recent"):
            fixed = getattr(self, name)
            if fixed is not None and fixed < 0:
                raise UserError(f"{name}={fixed} is negative; give a count, or null for half.")

    def counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Return the heavy hitters and recent tokens kept of a prompt of `length` tokens.

        Raises:
            UserError: if the fixed counts do not fit the budget.
        """
        n_keep = allowance.n_keep
        if self.heavy is not None and self.recent is not None:
            both = self.heavy + self.recent
            if min(both, length) != n_keep:
                raise UserError(
                    f"heavy={self.heavy} and recent={self.recent} make {both} entries, but the budget "
                    f"is {n_keep} of {length} prompt tokens; set it to {both}, or one of them to null."
                )
            return self.heavy, self.recent
        fixed = self.recent if self.heavy is None else self.heavy
        if fixed is None:
            return even_counts(allowance, length)
        if fixed > n_keep and n_keep < length:
            name = "recent" if self.heavy is None else "heavy"
            raise UserError(
                f"{name}={fixed} is more than the budget of {n_keep} of {length} prompt tokens; "
                f"raise the budget or lower {name}."
            )
        fixed = min(fixed, n_keep)
        return (n_keep - fixed, fixed) if self.heavy is None else (fixed, n_keep - fixed)

    def check(self, layer_idx: int, length: int, allowance: Allowance) -> None:
        """Refuse fixed counts that do not fit the budget, as `counts` does."""
        self.counts(allowance, length)

    def prompt_scores(self, layer: PrefillLayer) -> Tensor:
        """Return the attention mass of the prompt's tokens: `(batch, kv_heads, T)` float32."""
        scores = layer.column_scores()
        if self.score_dtype == "float32":
            return scores
        dtype = layer.keys.dtype
        sums = head_column_sums(layer.queries, layer.keys, dtype=dtype, softmax=layer.softmax)
        return self.joined(sums, layer.keys)

    def updated_scores(self, entries: Entries, step: DecodeStep) -> Tensor:
        """Return the scores of the stored entries after the attention of one more token."""
        assert entries.scores is not None
        weights = step.weights
        if self.score_dtype == "model":
            weights = weights.to(entries.keys.dtype).float()
        scores = entries.scores + self.joined(weights, entries.keys)
        return scores.to(entries.keys.dtype).float() if self.score_dtype == "model" else scores

    def joined(self, by_head: Tensor, keys: Tensor) -> Tensor:
        """Sum the query heads of each KV head: `(batch, heads, …)` to `(batch, kv_heads, …)`."""
        joined = by_head.unflatten(1, (keys.shape[1], -1)).sum(dim=2)
        return joined.to(keys.dtype).float() if self.score_dtype == "model" else joined


def even_counts(allowance: Allowance, length: int) -> tuple[int, int]:
    """Return heavy hitters and recent tokens: half of the budget is recent, the rest heavy.

    Args:
        allowance: what may be kept.
        length: tokens of the prompt.
    """
    recent = min(count(allowance.budget / 2, length), allowance.n_keep)
    return allowance.n_keep - recent, recent


def keep(scores: Tensor, *, heavy: int, recent: int) -> Tensor:
    """Return the positions that H2O keeps: the `heavy` best before the last `recent`, and those.

    Args:
        scores: `(batch, kv_heads, T)` attention column sums.
        heavy: heavy hitters to keep.
        recent: recent tokens to keep.

    Returns:
        `(batch, kv_heads, min(T, heavy + recent))` int64, ascending. Ties go to the lower position.
    """
    length = scores.shape[-1]
    recent = min(recent, length)
    heavy = min(heavy, length - recent)
    hitters = top_positions(scores[..., : length - recent], heavy)
    last = torch.arange(length - recent, length, device=scores.device)
    return torch.cat([hitters, last.expand(*scores.shape[:-1], recent)], dim=-1)
