"""What the H2O methods share: how the budget is divided, and how attention becomes scores."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge.budget import count, recent_share
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer
from kvmerge.scores import head_column_sums

SPLITS = ("even", "kvmerger")
SCORE_DTYPES = ("float32", "model")
REDUCTIONS = ("sum", "mean", "max")


@dataclass(frozen=True)
class HeavyHitters(Method):
    """Settings of every H2O method."""

    split: str = "even"
    """How the budget is divided: `even` halves (the authors' scripts), or `kvmerger`: as many recent
    tokens as KVMerger keeps."""
    heavy: int | None = None
    """A fixed number of heavy hitters instead of a share; the rest of the budget is recent."""
    recent: int | None = None
    """A fixed number of recent tokens instead of a share; the rest of the budget is heavy."""
    score_dtype: str = "float32"
    """`model` rounds the weights to the model's dtype, and the sums after each step (the authors)."""
    score_window: str = "all"
    """`last:w` sums only the last `w` rows of the prompt."""
    gqa_reduce: str = "sum"
    """How the query heads of a group are joined into the score of their KV head."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("split", SPLITS), ("score_dtype", SCORE_DTYPES), ("gqa_reduce", REDUCTIONS)
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.score_window != "all" and not re.fullmatch(r"last:[1-9]\d*", self.score_window):
            raise UserError(
                f"score_window={self.score_window!r} is neither 'all' nor 'last:w', e.g. 'last:32'."
            )
        for name in ("heavy", "recent"):
            fixed = getattr(self, name)
            if fixed is not None and fixed < 0:
                raise UserError(f"{name}={fixed} is negative; give a count, or null for a share.")

    @property
    def window(self) -> int | None:
        """Rows of the prompt that are summed; None means all."""
        return None if self.score_window == "all" else int(self.score_window.partition(":")[2])

    def counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Heavy hitters and recent tokens kept of a prompt of `length` tokens.

        Raises `UserError` if the fixed counts do not fit the budget.
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
            share = recent_share(allowance.budget) if self.split == "kvmerger" else allowance.budget / 2
            fixed = min(count(share, length), n_keep)
        elif fixed > n_keep and n_keep < length:
            name = "recent" if self.heavy is None else "heavy"
            raise UserError(
                f"{name}={fixed} is more than the budget of {n_keep} of {length} prompt tokens; "
                f"raise the budget or lower {name}."
            )
        fixed = min(fixed, n_keep)
        return (n_keep - fixed, fixed) if self.heavy is None else (fixed, n_keep - fixed)

    def prompt_scores(self, layer: PrefillLayer) -> Tensor:
        """`(batch, kv_heads, T)` float32 attention mass of the prompt's tokens."""
        scores = layer.column_scores()
        if self.window is None and self.score_dtype == "float32" and self.gqa_reduce != "max":
            group = layer.queries.shape[1] // layer.keys.shape[1]
            return scores / group if self.gqa_reduce == "mean" else scores
        dtype = layer.keys.dtype if self.score_dtype == "model" else torch.float32
        sums = head_column_sums(
            layer.queries, layer.keys, window=self.window, dtype=dtype, scale=layer.scale
        )
        return self.joined(sums, layer.keys)

    def updated_scores(self, entries: Entries, step: DecodeStep) -> Tensor:
        """The scores of the stored entries after the attention of one more token.

        Under `gqa_reduce=max` the largest weight of each step is added (*ours*).
        """
        assert entries.scores is not None
        weights = step.weights
        if self.score_dtype == "model":
            weights = weights.to(entries.keys.dtype).float()
        scores = entries.scores + self.joined(weights, entries.keys)
        return scores.to(entries.keys.dtype).float() if self.score_dtype == "model" else scores

    def joined(self, by_head: Tensor, keys: Tensor) -> Tensor:
        """Join the query heads of each KV head: `(batch, heads, …)` to `(batch, kv_heads, …)`."""
        grouped = by_head.unflatten(1, (keys.shape[1], -1))
        if self.gqa_reduce == "max":
            joined = grouped.amax(dim=2)
        else:
            joined = grouped.sum(dim=2) if self.gqa_reduce == "sum" else grouped.mean(dim=2)
        return joined.to(keys.dtype).float() if self.score_dtype == "model" else joined
