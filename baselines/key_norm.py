"""Key norm: keep the tokens whose keys are shortest (arXiv 2406.11430).

Follows `KnormPress` of NVIDIA/kvpress 0.5.5. Short keys tend to be those that receive attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from baselines.top_scores import TopScores
from kvmerge.method import PrefillLayer


@dataclass(frozen=True)
class KeyNorm(TopScores):
    """Key-norm eviction has no settings."""

    def token_scores(self, layer: PrefillLayer) -> Tensor:
        """Return the negative length of each key."""
        return -layer.keys.float().norm(dim=-1)
