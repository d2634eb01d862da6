"""How much attention each key received: column sums of the causal attention map, without the map.

H2O, CaM and KVMerger rank cache entries by the attention mass a key collects over all prompt rows.
The map itself has T x T entries a head; its column sums need only the log-sum-exp of each row, which
the attention kernel has already computed: `s_j = sum_i exp(q_i k_j * scale - lse_i)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**21
"""Logits alive at once: small enough for the last-level cache, large enough for one good matmul."""


def column_sums(
    queries: Tensor,
    keys: Tensor,
    lse: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Sum each column of the softmax attention map over its rows and over the heads of a group.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        lse: `(batch, heads, T)`, natural log of the sum of exp(scaled logits) of each row, as
            attention kernels return it; None computes it here.
        causal: whether row `i` sees only columns `<= i`.
        scale: factor on the logits; None means `1 / sqrt(head_dim)`.
        lengths: `(batch,)` real tokens of left-padded rows; padded columns get 0.

    Returns:
        `(batch, kv_heads, T)` float32 (methods.md 0.2). Without padding each KV head sums to `G * T`.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads = keys.shape[1]
    if keys.shape != (batch, kv_heads, length, head_dim) or heads % kv_heads:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} do not fit: batch, tokens "
            "and head_dim must agree, and query heads must be a multiple of KV heads."
        )
    if lse is not None and lse.shape != (batch, heads, length):
        raise ValueError(f"lse has shape {tuple(lse.shape)}, not {(batch, heads, length)}.")
    scale = head_dim**-0.5 if scale is None else scale
    sums = torch.zeros(batch, kv_heads, length, dtype=torch.float32, device=queries.device)
    for row in range(batch):
        start = 0 if lengths is None else length - int(lengths[row])
        row_lse = None if lse is None else lse[row, :, start:]
        sums[row, :, start:] = _row_column_sums(
            queries[row, :, start:], keys[row, :, start:], row_lse, causal, scale
        )
    return sums


def _row_column_sums(
    queries: Tensor, keys: Tensor, lse: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Column sums of one sequence: queries `(heads, T, D)`, keys `(kv_heads, T, D)`."""
    heads, length, head_dim = queries.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    # One matmul serves all query heads of a group: their rows are stacked.
    grouped = (queries.float() if lse is None else queries).unflatten(0, (kv_heads, group))
    keys_t = (keys.float() if lse is None else keys).transpose(1, 2)  # (kv_heads, D, T)
    sums = torch.zeros(kv_heads, length, dtype=torch.float32, device=queries.device)
    block = max(16, min(256, _BLOCK_ELEMENTS // (heads * max(length, 1))))
    for begin in range(0, length, block):
        end = min(begin + block, length)
        rows = end - begin
        visible = end if causal else length
        tile = grouped[:, :, begin:end].reshape(kv_heads, group * rows, head_dim) * scale
        logits = torch.bmm(tile, keys_t[:, :, :visible]).float()
        by_head = logits.view(kv_heads, group, rows, visible)
        if causal:
            future = torch.ones(rows, rows, dtype=torch.bool, device=queries.device).triu_(1)
            by_head[..., begin:end].masked_fill_(future, float("-inf"))
        if lse is None:
            weights = torch.softmax(logits, dim=-1)
        else:
            shift = lse.unflatten(0, (kv_heads, group))[:, :, begin:end].reshape(kv_heads, -1, 1)
            weights = logits.sub_(shift).exp_()
        sums[:, :visible] += weights.sum(dim=1)
    return sums
