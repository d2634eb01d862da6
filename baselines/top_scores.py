"""What methods share that score each token of a finished layer and keep the best."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kvmerge.method import Allowance, Entries, Method, PrefillLayer, select, top_positions


@dataclass(frozen=True)
class TopScores(Method):
    """A method that is a score: each KV head keeps the tokens that have most."""

    @abstractmethod
    def token_scores(self, layer: PrefillLayer) -> Tensor:
        """Return what each token is worth: `(batch, kv_heads, T)` float32, larger stays."""

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the best tokens; ties go to the lower position."""
        return select(layer, top_positions(self.token_scores(layer), allowance.n_keep))
