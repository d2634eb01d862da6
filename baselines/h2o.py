"""H2O: keep the heavy hitters of attention and the recent tokens (arXiv 2306.14048).

Follows `h2o_hf/utils_real_drop` of the authors' repository (FMInference/H2O at ac75c2a): scores are
attention column sums over all prompt rows, the last tokens are always kept, and the best of the others
fill the budget. Differences, documented in docs/methods.md: sums stay in float32, and query heads that
share a KV head are summed, where the authors' code supports no grouped queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from baselines.heavy_hitters import HeavyHitters, keep
from kvmerge.method import Allowance, DecodeStep, Entries, PrefillLayer, keep_all, pick

__all__ = ["H2O", "keep"]


@dataclass(frozen=True)
class H2O(HeavyHitters):
    """Settings of H2O, which it shares with the mask simulations."""

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the heavy hitters and the recent tokens of one layer."""
        entries = replace(keep_all(layer), scores=self.prompt_scores(layer))
        return self._evict(entries, allowance, layer.length)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Add the step's attention to the scores, then evict the entry that fits least."""
        entries = replace(entries, scores=self.updated_scores(entries, step))
        return self._evict(entries, step.allowance, step.prompt_length)

    def _evict(self, entries: Entries, allowance: Allowance, length: int) -> Entries:
        assert entries.scores is not None
        heavy, recent = self.counts(allowance, length)
        return pick(entries, keep(entries.scores, heavy=heavy, recent=recent))
