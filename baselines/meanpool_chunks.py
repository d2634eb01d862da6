"""Mean pooling of chunks: the control that says what KVMerger's merging sets are worth.

KVMerger's recent and top tokens stay; the others, in order, are cut into chunks of equal length, and
each chunk becomes its mean. Nothing depends on the similarity of keys (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, keep_all


@dataclass(frozen=True)
class MeanpoolChunks(Method):
    """Settings of the chunk control, which mean what they mean in KVMerger."""

    value_scale: str = "none"
    """`none` stores mean values, `size` multiplies them by the chunk's size."""
    attn_bias: str = "none"
    """`log_size` adds log(size) to each entry's attention logit."""
    recent: float | None = None
    """Fraction of the prompt kept as recent tokens; None follows KVMerger."""
    top: float | None = None
    """Fraction of the prompt kept as top tokens by score; None follows KVMerger."""

    needs_scores: ClassVar[bool] = True
    pivot: ClassVar[str] = "first"
    """Which member an entry answers for: ids follow the first members, so these ascend."""

    def __post_init__(self) -> None:
        self._merger()

    def _merger(self) -> KVMerger:
        """Return KVMerger with equal weights. Raise `UserError` for settings that it refuses."""
        return KVMerger(
            sigma="inf",
            value_scale=self.value_scale,
            attn_bias=self.attn_bias,
            recent=self.recent,
            top=self.top,
        )

    def check(self, layer_idx: int, length: int, allowance: Allowance) -> None:
        """Refuse what KVMerger refuses."""
        self._merger().check(layer_idx, length, allowance)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Cut the unprotected tokens into chunks, and average each."""
        entries = replace(keep_all(layer), scores=layer.column_scores())
        set_ids = self.sets(entries, layer.length, layer.layer_idx, allowance)
        return self._merger().merged(entries, set_ids, self.pivot)

    def sets(self, entries: Entries, length: int, layer_idx: int, allowance: Allowance) -> Tensor:
        """Return the chunks that leave the allowance: `(batch, kv_heads, n)` ids.

        Arguments as of `KVMerger.sets`.
        """
        assert entries.scores is not None
        protected = self._merger().protected(entries.scores, length, allowance)
        return chunk_sets(protected, allowance.n_keep)


def chunk_sets(protected: Tensor, n_keep: int) -> Tensor:
    """Assign set ids to protected tokens and chunks of the others, in the order of first members.

    Chunks differ in size by at most one token, the larger ones first; they may span protected tokens.

    Args:
        protected: `(batch, kv_heads, T)` bool, as many in each head, fewer than `n_keep`.
        n_keep: entries per KV head, at most `T`.

    Returns:
        `(batch, kv_heads, T)` int64 set ids, 0 to `n_keep - 1`.
    """
    n_protected = int(protected[0, 0].sum())
    n_free, n_chunks = protected.shape[-1] - n_protected, n_keep - n_protected
    size, n_larger = divmod(n_free, n_chunks)
    chunks = torch.arange(n_chunks, device=protected.device)
    first_rank = chunks * size + chunks.clamp_max(n_larger)
    ranks = torch.arange(n_free, device=protected.device)
    chunk_of_rank = torch.searchsorted(first_rank, ranks, right=True) - 1
    free = (~protected).nonzero()[:, -1].view(*protected.shape[:2], n_free)
    leader = free[..., first_rank[chunk_of_rank]]  # the first member of each free token's chunk
    tokens = torch.arange(protected.shape[-1], device=free.device).expand_as(protected)
    leader = tokens.scatter(-1, free, leader)
    ids = (leader == tokens).cumsum(-1) - 1
    return ids.gather(-1, leader)
