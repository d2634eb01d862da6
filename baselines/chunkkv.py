"""ChunkKV: keep whole chunks of the text, the same in every KV head (arXiv 2502.00299).

Follows `ChunkKVPress` of NVIDIA/kvpress 0.5.5 over its `SnapKVPress`: a token is scored by the
attention of the last tokens, a chunk by the mean of its tokens over all KV heads of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from baselines.snapkv import SnapKV
from kvmerge.errors import UserError
from kvmerge.method import Allowance, Entries, PrefillLayer, select, top_positions


@dataclass(frozen=True)
class ChunkKV(SnapKV):
    """Settings of ChunkKV; the defaults are those of kvpress."""

    window: int = 64
    """Last tokens, which observe the others and whose chunks come first; half the budget where it is
    not larger than this."""
    kernel: int = 5
    """Width of the pooling, an odd number of tokens."""
    pooling: str = "avg"
    """`avg` (kvpress) or `max`."""
    chunk: int = 20
    """Tokens of a chunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.chunk) is not int or self.chunk < 1:
            raise UserError(f"chunk={self.chunk} must be a whole number of tokens, 1 or more.")

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the best chunks, and of the chunk that the budget cuts the best tokens."""
        window = self.window_for(allowance.n_keep)
        pooled = self.pooled(layer, window) / window
        seen = pad(pooled, (0, window), value=float(pooled.max()) + 1 if pooled.numel() else 1.0)
        kept = keep_chunks(seen.sum(dim=1), allowance.n_keep, chunk=self.chunk)
        return select(layer, kept.unsqueeze(1).expand(-1, layer.keys.shape[1], -1))


def keep_chunks(scores: Tensor, n_keep: int, *, chunk: int) -> Tensor:
    """Return the positions of the best chunks, and of the best tokens of the first that does not fit.

    Args:
        scores: `(batch, T)`; a chunk counts by the mean of its tokens, the last may be shorter.
        n_keep: tokens to keep.
        chunk: tokens of a chunk.

    Returns:
        `(batch, n_keep)` int64, ascending. Ties go to the earlier chunk, and to the lower position.
    """
    length = scores.shape[-1]
    chunks = pad(scores, (0, -length % chunk), value=torch.nan).unflatten(-1, (-1, chunk))
    order = chunks.nanmean(dim=-1).sort(dim=-1, descending=True, stable=True).indices
    rank_of_chunk = order.argsort(dim=-1, stable=True).repeat_interleave(chunk, dim=-1)[..., :length]
    best_first = scores.sort(dim=-1, descending=True, stable=True).indices
    rank_of_token = best_first.argsort(dim=-1, stable=True)
    return top_positions(-(rank_of_chunk * length + rank_of_token), n_keep)
