"""H2O: keep the heavy hitters of attention and the recent tokens (arXiv 2306.14048).

Follows `h2o_hf/utils_real_drop` of the authors' repository (FMInference/H2O at ac75c2a): scores are
attention column sums over all prompt rows, the last tokens are always kept, and the best of the others
fill the budget. Differences, documented in docs/methods.md: sums stay in float32, and query heads that
share a KV head are summed, where the authors' code supports no grouped queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge.budget import count
from kvmerge.errors import unknown
from kvmerge.kvmerger import recent_share
from kvmerge.method import (
    Allowance,
    DecodeStep,
    Entries,
    Method,
    PrefillLayer,
    pick,
    select,
    top_positions,
)

SPLITS = ("even", "kvmerger")


@dataclass(frozen=True)
class H2O(Method):
    """Settings of H2O."""

    split: str = "even"
    """How the budget is divided: `even` halves (the authors' scripts), or `kvmerger`: as many recent
    tokens as KVMerger keeps."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the heavy hitters and the recent tokens of one layer."""
        heavy, recent = self.counts(allowance, layer.length)
        return select(layer, keep(layer.column_scores(), heavy=heavy, recent=recent))

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Add the step's attention to the scores, then evict the entry that fits least."""
        assert entries.scores is not None
        scores = entries.scores + step.mass(entries.scores.shape[1])
        heavy, recent = self.counts(step.allowance, step.prompt_length)
        return pick(replace(entries, scores=scores), keep(scores, heavy=heavy, recent=recent))

    def counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Heavy hitters and recent tokens kept of a prompt of `length` tokens."""
        share = allowance.budget / 2
        if self.split == "kvmerger":
            share = recent_share(allowance.budget)
        recent = min(count(share, length), allowance.n_keep)
        return allowance.n_keep - recent, recent


def keep(scores: Tensor, *, heavy: int, recent: int) -> Tensor:
    """Positions that H2O keeps: the `heavy` best before the last `recent`, and those.

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
