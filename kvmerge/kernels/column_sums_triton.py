"""The column sums of `kvmerge.scores` as one GPU kernel.

The torch version reads and writes every block of logits in GPU memory several times. Here a program
keeps a block of columns in registers, reads the queries of all rows that see it, and writes one sum a
column: no logits in memory, and no atomic additions, so the result is the same on every run.

Triton is needed to import this module; `kvmerge.scores.column_sums` does so where it is installed.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
"""A block of keys must fit a multiprocessor's shared memory whole."""


def available(queries: Tensor) -> bool:
    """Return whether the kernel can take these queries `(batch, heads, T, head_dim)` where they are.

    The first call for a dtype, head size and GPU compiles the kernel for them; if that fails, which
    is logged, the kernel is not available.
    """
    head_dim = queries.shape[-1]
    return (
        queries.is_cuda
        and queries.dtype in DTYPES
        and head_dim <= MAX_HEAD_DIM
        and _runs(queries.device, queries.dtype, head_dim)
    )


def column_sums(
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Sum each column of the softmax attention map over its rows and over the heads of a group.

    Arguments and result are those of `kvmerge.scores.column_sums`, which checks the shapes, but `lse`
    must be given. Logits of half-precision states are accumulated in float32, those of float32 states
    computed without rounding to TF32.

    Args:
        queries: `(batch, heads, T, head_dim)` of a dtype in `DTYPES`, head_dim at most `MAX_HEAD_DIM`.
        keys: `(batch, kv_heads, T, head_dim)` of the same dtype.

    Returns:
        `(batch, kv_heads, T)` float32.
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads = keys.shape[1]
    device = queries.device
    queries, keys = (t if t.stride(-1) == 1 else t.contiguous() for t in (queries, keys))
    pads = torch.zeros(batch, dtype=torch.int32, device=device)
    if lengths is not None:
        pads = (length - lengths.to(device)).to(torch.int32)
    sums = torch.empty(batch, kv_heads, length, dtype=torch.float32, device=device)
    tiles = _tiles(queries.dtype, head_dim)
    # The heads vary fastest: the first columns, seen by the most rows, are worked on first.
    grid = (batch * kv_heads, triton.cdiv(length, tiles["COLUMNS"]))
    with torch.cuda.device_of(queries):  # a launch goes to the current GPU, not to that of its tensors
        _column_sums[grid](
            queries,
            keys,
            lse.float().contiguous(),
            pads,
            sums,
            *queries.stride()[:3],
            *keys.stride()[:3],
            length,
            kv_heads,
            head_dim**-0.5 if scale is None else scale,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            CAUSAL=causal,
            **tiles,
        )
    return sums


@triton.jit
def _column_sums(
    queries: tl.tensor,
    keys: tl.tensor,
    lse: tl.tensor,
    pads: tl.tensor,
    sums: tl.tensor,
    query_batch: tl.int64,
    query_head: tl.int64,
    query_row: tl.int64,
    key_batch: tl.int64,
    key_head: tl.int64,
    key_row: tl.int64,
    length: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    """Sum one block of columns of one KV head, over the rows of all query heads of its group.

    Strides are 64 bits wide: the offsets of a long prompt do not fit 32.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, kv_head = head // kv_heads, head % kv_heads
    pad = tl.load(pads + batch)
    begin = tl.program_id(1) * COLUMNS
    columns = begin + tl.arange(0, COLUMNS)
    features = tl.arange(0, FEATURES)
    key_tile = tl.load(
        keys + batch * key_batch + kv_head * key_head + columns[:, None] * key_row + features[None, :],
        mask=(columns < length)[:, None] & (features < HEAD_DIM)[None, :],
        other=0.0,
    )
    # A causal row adds only to columns up to its own, so a padded one only to padded columns.
    first = begin if CAUSAL else pad
    totals = tl.zeros([COLUMNS], dtype=tl.float32)
    for member in range(GROUP):
        query_head_index = kv_head * GROUP + member
        of_head = queries + batch * query_batch + query_head_index * query_head
        lse_of_head = lse + (batch * kv_heads * GROUP + query_head_index) * length
        for row in range(first, length, ROWS):
            rows = row + tl.arange(0, ROWS)
            inside = rows < length
            query_tile = tl.load(
                of_head + rows[None, :] * query_row + features[:, None],
                mask=inside[None, :] & (features < HEAD_DIM)[:, None],
                other=0.0,
            )
            shift = tl.load(lse_of_head + rows, mask=inside, other=0.0)
            # Columns by rows, so that summing over rows needs no exchange between warps.
            logits = tl.dot(key_tile, query_tile, input_precision="ieee") * scale
            seen = inside[None, :]
            if CAUSAL:
                seen = seen & (rows[None, :] >= columns[:, None])
            totals += tl.sum(tl.where(seen, tl.exp(logits - shift[None, :]), 0.0), axis=1)
    tl.store(
        sums + head * length + columns, tl.where(columns >= pad, totals, 0.0), mask=columns < length
    )


def _tiles(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Return block sizes and warps for 99 KiB of shared memory, the least of the GPUs since Ampere."""
    features = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:  # no tensor cores: large blocks would spill registers
        columns, rows = 32, 32
    elif features > 128:
        columns, rows = 64, 32
    else:
        columns, rows = 128, 64
    return {"COLUMNS": columns, "ROWS": rows, "FEATURES": features, "num_warps": 4, "num_stages": 2}


@functools.cache
def _runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernel compiles for these states and runs, tried on one token."""
    states = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    try:
        column_sums(states, states, torch.zeros(1, 1, 1, device=device)).cpu()
    except Exception as error:  # a compiler that is missing, a GPU that is too small, …
        logger.warning("attention scores are summed in torch: the Triton kernel fails here (%s)", error)
        return False
    return True
