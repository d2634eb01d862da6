"""Pivots only: the control that says what merging is worth beside selection.

KVMerger's merging sets are formed, and of each the pivot is kept as it is and the rest dropped
(docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvmerge import merging
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, keep_all, pick


@dataclass(frozen=True)
class PivotOnly(Method):
    """Settings of the pivot control, which mean what they mean in KVMerger."""

    recent: float | None = None
    """Fraction of the prompt kept as recent tokens; None follows KVMerger."""
    top: float | None = None
    """Fraction of the prompt kept as top tokens by score; None follows KVMerger."""

    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._merger()

    def _merger(self) -> KVMerger:
        """Return KVMerger with its default sets. Raise `UserError` for settings that it refuses."""
        return KVMerger(recent=self.recent, top=self.top)

    def check(self, layer_idx: int, length: int, allowance: Allowance) -> None:
        """Refuse what KVMerger refuses."""
        self._merger().check(layer_idx, length, allowance)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the pivot of each merging set."""
        scores = layer.column_scores()
        entries = replace(keep_all(layer), scores=scores)
        set_ids = self._merger().sets(entries, layer.length, layer.layer_idx, allowance)
        return pick(entries, merging.pivot_tokens(set_ids, scores))
