"""How much attention each key received: column sums of the causal attention map, without the map.

H2O, CaM and KVMerger rank cache entries by the attention mass a key collects over all prompt rows.
The map itself has T x T entries a head; its column sums need only the log-sum-exp of each row, which
the attention kernel has already computed: `s_j = sum_i exp(q_i k_j * scale - lse_i)`. On a GPU with
Triton the sums are one kernel of their own (`kvmerge.kernels.column_sums_triton`); elsewhere, blocks
in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from kvmerge.softmax import Softmax, plain

Visible = Callable[[Tensor, Tensor], Tensor]
"""Which columns rows may see: `(rows, 1)` and `(columns,)` indices -> `(rows, columns)` bool."""

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
    softmax: Softmax | None = None,
) -> Tensor:
    """Sum each column of the softmax attention map over its rows and over the heads of a group.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        lse: `(batch, heads, T)`, natural log of the sum of exp(logits) of each row, its sink among
            them, as attention kernels return it; None computes it here.
        causal: whether row `i` sees only columns `<= i`.
        scale: factor on the logits; None means `1 / sqrt(head_dim)`.
        lengths: `(batch,)` real tokens of left-padded rows; padded columns get 0.
        softmax: the layer's, with a scale of its own; None means a plain one.

    Returns:
        `(batch, kv_heads, T)` float32 (docs/methods.md). Without padding each KV head sums to `G * T`.

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
    if softmax is None:
        softmax = plain(head_dim) if scale is None else Softmax(scale)
    if lse is not None and sums_by_triton(queries, softmax):
        from kvmerge.kernels import column_sums_triton  # CPU builds of torch come without Triton

        return column_sums_triton.column_sums(
            queries, keys, lse, causal=causal, scale=softmax.scale, lengths=lengths
        )
    sums = torch.zeros(batch, kv_heads, length, dtype=torch.float32, device=queries.device)
    for row in range(batch):
        start = 0 if lengths is None else length - int(lengths[row])
        row_lse = None if lse is None else lse[row, :, start:]
        sums[row, :, start:] = _row_column_sums(
            queries[row, :, start:], keys[row, :, start:], row_lse, causal, softmax
        )
    return sums


def sums_by_triton(queries: Tensor, softmax: Softmax) -> bool:
    """Return whether `column_sums` has a kernel of its own for queries whose log-sum-exp is known."""
    if not (softmax.is_plain and queries.is_cuda and find_spec("triton") is not None):
        return False
    from kvmerge.kernels import column_sums_triton  # as above

    return column_sums_triton.available(queries)


def last_rows(queries: Tensor, keys: Tensor, rows: int, *, softmax: Softmax | None = None) -> Tensor:
    """Return the last rows of the causal softmax attention map.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        rows: how many rows.
        softmax: the layer's; None means a plain one.

    Returns:
        `(batch, heads, rows, T)` float32.
    """
    length = keys.shape[2]
    return attention_rows(queries, keys, length - rows, length, softmax=softmax)


def attention_rows(
    queries: Tensor,
    keys: Tensor,
    begin: int,
    end: int,
    *,
    softmax: Softmax | None = None,
    visible: Visible | None = None,
) -> Tensor:
    """Return some rows of the causal softmax attention map, of all columns before `end`.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        begin: first row.
        end: the row after the last.
        softmax: the layer's; None means a plain one.
        visible: which of the columns up to its own a row may see; None means all.

    Returns:
        `(batch, heads, end - begin, end)` float32.
    """
    softmax = softmax or plain(keys.shape[3])
    logits = row_logits(queries, keys, begin, end, softmax)
    if visible is not None:
        columns = torch.arange(end, device=keys.device)
        logits.masked_fill_(~visible(columns[begin:, None], columns), float("-inf"))
    return softmax.weights(logits).flatten(1, 2)


def row_logits(queries: Tensor, keys: Tensor, begin: int, end: int, softmax: Softmax) -> Tensor:
    """Return the logits of some rows of the causal attention map, of all columns before `end`.

    Arguments as of `attention_rows`.

    Returns:
        `(batch, kv_heads, G, end - begin, end)` float32, -inf where a row does not see a column.
    """
    logits = products(queries[:, :, begin:end], keys[:, :, :end], softmax)
    size = end - begin
    future = torch.ones(size, size, dtype=torch.bool, device=keys.device).triu_(1)
    # every row sees the columns before `begin`: masking costs as much as the product
    logits[..., begin:].masked_fill_(future, float("-inf"))
    return logits


def logit_blocks(
    queries: Tensor, keys: Tensor, begin: int, softmax: Softmax
) -> Iterator[tuple[int, Tensor]]:
    """Yield the logits of the rows from `begin` on, in blocks as `attention_blocks` does.

    Yields:
        the first row of the block; its logits, as `row_logits` gives them.
    """
    for first, end in _row_blocks(queries, begin):
        yield first, row_logits(queries, keys, first, end, softmax)


def products(queries: Tensor, keys: Tensor, softmax: Softmax) -> Tensor:
    """Return the logits of some queries and keys, all of them visible.

    Args:
        queries: `(batch, heads, rows, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, n, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        softmax: the layer's.

    Returns:
        `(batch, kv_heads, G, rows, n)` float32.
    """
    # scaled before the product, and one product for the heads of a group: fewer passes over the logits
    grouped = (queries.float() * softmax.scale).unflatten(1, (keys.shape[1], -1))
    logits = grouped.flatten(2, 3) @ keys.float().transpose(2, 3)
    return softmax.capped(logits).unflatten(2, grouped.shape[2:4])


def attention_blocks(
    queries: Tensor,
    keys: Tensor,
    *,
    begin: int = 0,
    softmax: Softmax | None = None,
    visible: Visible | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the attention map from row `begin` on, in blocks of rows, so that it never exists whole.

    Yields:
        the first row of the block; its rows, as `attention_rows` gives them.
    """
    for first, end in _row_blocks(queries, begin):
        yield first, attention_rows(queries, keys, first, end, softmax=softmax, visible=visible)


def head_column_sums(
    queries: Tensor,
    keys: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    softmax: Softmax | None = None,
) -> Tensor:
    """Sum columns as `column_sums` does, but of each query head, and rounded if wanted.

    Args:
        queries: `(batch, heads, T, head_dim)`, after RoPE.
        keys: `(batch, kv_heads, T, head_dim)`, after RoPE.
        dtype: weights are rounded to it before the sum, and the sums after it.
        softmax: the layer's; None means a plain one.

    Returns:
        `(batch, heads, T)` float32.
    """
    batch, heads, length, _ = queries.shape
    sums = torch.zeros(batch, heads, length, dtype=torch.float32, device=queries.device)
    for _, weights in attention_blocks(queries, keys, softmax=softmax):
        sums[..., : weights.shape[-1]] += weights.to(dtype).float().sum(dim=2)
    return sums.to(dtype).float()


def _block_rows(heads: int, length: int) -> int:
    """Return how many rows of the map that are worked on at once."""
    return max(16, min(256, _BLOCK_ELEMENTS // (heads * max(length, 1))))


def _row_blocks(queries: Tensor, begin: int = 0) -> Iterator[tuple[int, int]]:
    """Yield what rows are worked on at once, from `begin` on: the first, and the one after the last.

    Args:
        queries: `(..., heads, T, head_dim)`.
        begin: first row of all.
    """
    heads, length = queries.shape[-3:-1]
    block = _block_rows(heads, length)
    for first in range(begin, length, block):
        yield first, min(first + block, length)


def _row_column_sums(
    queries: Tensor, keys: Tensor, lse: Tensor | None, causal: bool, softmax: Softmax
) -> Tensor:
    """Sum the columns of one sequence: queries `(heads, T, D)`, keys `(kv_heads, T, D)`."""
    heads, length, head_dim = queries.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    # Logits in float32 even for half-precision states: rounded ones change what is selected.
    exact = torch.promote_types(queries.dtype, torch.float32)
    # One matmul serves all query heads of a group: their rows are stacked.
    grouped = queries.to(exact).unflatten(0, (kv_heads, group))
    keys_t = keys.to(exact).transpose(1, 2)  # (kv_heads, D, T)
    sums = torch.zeros(kv_heads, length, dtype=torch.float32, device=queries.device)
    for begin, end in _row_blocks(queries):
        rows = end - begin
        visible = end if causal else length
        tile = grouped[:, :, begin:end].reshape(kv_heads, group * rows, head_dim)
        logits = softmax.capped(torch.bmm(tile * softmax.scale, keys_t[:, :, :visible]))
        by_head = logits.view(kv_heads, group, rows, visible)
        if causal:
            future = torch.ones(rows, rows, dtype=torch.bool, device=queries.device).triu_(1)
            by_head[..., begin:end].masked_fill_(future, float("-inf"))
        if lse is None:
            weights = softmax.weights(by_head).view(logits.shape)
        else:
            shift = lse.unflatten(0, (kv_heads, group))[:, :, begin:end].reshape(kv_heads, -1, 1)
            weights = logits.sub_(shift).exp_()
        sums[:, :visible] += weights.sum(dim=1)
    return sums
