"""H2O: keep the heavy hitters of attention and the recent tokens (arXiv 2306.14048).

Follows `h2o_hf/utils_real_drop` of the authors' repository (FMInference/H2O at ac75c2a): scores are
attention column sums over all prompt rows, the last tokens are always kept, and the best of the others
fill the budget. Differences, documented in docs/methods.md: sums stay in float32, and query heads that
share a KV head are summed, where the authors' code supports no grouped queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines.heavy_hitters import HeavyHitters
from kvmerge.errors import unknown
from kvmerge.method import (
    Allowance,
    DecodeStep,
    Entries,
    PrefillLayer,
    keep_all,
    pick,
    top_positions,
)

SCORE_NORMS = ("sum", "mean_visible")


@dataclass(frozen=True)
class H2O(HeavyHitters):
    """Settings of H2O; those it shares with the mask simulations are in `HeavyHitters`."""

    score_norm: str = "sum"
    """`mean_visible` ranks by the mean over the rows that could see a token, not by the sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_norm not in SCORE_NORMS:
            raise unknown("score_norm", self.score_norm, SCORE_NORMS)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the heavy hitters and the recent tokens of one layer."""
        entries = replace(keep_all(layer), scores=self.prompt_scores(layer))
        return self._evict(entries, allowance, layer.length, new_rows=0)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Add the step's attention to the scores, then evict the entry that fits least."""
        entries = replace(entries, scores=self.updated_scores(entries, step))
        return self._evict(entries, step.allowance, step.prompt_length, new_rows=step.step + 1)

    def _evict(self, entries: Entries, allowance: Allowance, length: int, new_rows: int) -> Entries:
        assert entries.scores is not None
        ranked = entries.scores
        if self.score_norm == "mean_visible":
            rows = (length - entries.positions).clamp(min=0, max=self.window)
            rows += (length + new_rows - entries.positions).clamp(max=new_rows)
            ranked = ranked / rows
        heavy, recent = self.counts(allowance, length)
        return pick(entries, keep(ranked, heavy=heavy, recent=recent))


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
