"""KeyDiff: keep the tokens whose keys resemble the mean key least (arXiv 2504.15364).

Follows `KeyDiffPress` of NVIDIA/kvpress 0.5.5. The paper evicts block by block as it reads the prompt;
here, as there, the whole prompt is compressed once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from baselines.top_scores import TopScores
from kvmerge.merging import cosine
from kvmerge.method import PrefillLayer


@dataclass(frozen=True)
class KeyDiff(TopScores):
    """KeyDiff has no settings."""

    def token_scores(self, layer: PrefillLayer) -> Tensor:
        """Return how far each key points away from the mean direction of its head's keys."""
        return distinctness(layer.keys)


def distinctness(keys: Tensor) -> Tensor:
    """Return the negative cosine of each key with the mean of the head's keys, each of length 1.

    Args:
        keys: `(batch, kv_heads, T, head_dim)`.

    Returns:
        `(batch, kv_heads, T)` float32.
    """
    exact = keys.float()
    anchor = normalize(exact, dim=-1).mean(dim=2, keepdim=True)
    return -cosine(exact, anchor)
