"""Which kept entry an evicted one is nearest to, by any feature; what folds evicted entries asks it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmerge.kernels import tiled
from kvmerge.rows import take

_BLOCK = 128
"""Evicted entries compared with the kept ones at once: what they give stays in the cache."""
_CHUNK = 64
"""Kept entries of which the nearest is found first (`_largest`)."""
_NO_NORM = 1e-8
"""Least norm, so that a zero feature has a cosine."""


def others(kept: Tensor, stored: int) -> Tensor:
    """Return the slots that are not kept, ascending: `(batch, kv_heads, stored - k)`."""
    gone = torch.ones((*kept.shape[:2], stored), dtype=torch.bool, device=kept.device)
    gone.scatter_(-1, kept, False)
    return gone.nonzero()[:, -1].view(*kept.shape[:2], -1)


def nearest(evicted: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine with the nearest kept feature, and its slot; a zero one has cosine 0 with all.

    Args:
        evicted: `(batch, kv_heads, m, d)`.
        kept: `(batch, kv_heads, k, d)`.

    Returns:
        `(batch, kv_heads, m)` each.
    """
    multiply = tiled.faster_transposed(evicted)
    count = kept.shape[2]
    # the last one stands for itself and for what its chunk lacks
    columns = torch.arange(count + -count % _CHUNK, device=kept.device).clamp_max(count - 1)
    unit = kept / kept.norm(dim=-1, keepdim=True).clamp_min(_NO_NORM)
    by_head = zip(evicted.flatten(0, 1), unit[:, :, columns].flatten(0, 1), strict=True)
    found = [
        _largest(multiply(block, targets))
        for asked, targets in by_head
        for block in asked.split(_BLOCK)
    ]
    products, slots = (torch.cat(parts).view(evicted.shape[:3]) for parts in zip(*found, strict=True))
    return products / evicted.norm(dim=-1).clamp_min(_NO_NORM), columns[slots]


def _largest(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of each row `(m, n)` and its column, of equal ones the lower: `(m,)` each.

    First the largest of each chunk of columns, which is a fast reduction, as that with an index is not.
    """
    chunks = products.unflatten(-1, (-1, _CHUNK))
    largest, chunk = chunks.amax(dim=-1).max(dim=-1)
    own = chunks[torch.arange(len(chunk), device=chunk.device), chunk]
    return largest, chunk * _CHUNK + own.argmax(dim=-1)


def slots_of_nearest(features: Tensor, kept: Tensor) -> Tensor:
    """Return the slot that each token belongs to: its own where it is kept, else the nearest one's.

    Args:
        features: `(batch, kv_heads, T, d)`.
        kept: `(batch, kv_heads, k)` int64 positions, ascending.

    Returns:
        `(batch, kv_heads, T)` int64.
    """
    gone = others(kept, features.shape[2])
    _, closest = nearest(take(features, gone), take(features, kept))
    own = torch.arange(kept.shape[-1], device=kept.device).expand_as(kept)
    slots = torch.empty(features.shape[:3], dtype=torch.int64, device=kept.device)
    return slots.scatter_(-1, gone, closest).scatter_(-1, kept, own)


def nearest_in_text(positions: Tensor, length: int) -> Tensor:
    """Return the slot of the kept token that is nearest in the text; of two, the earlier.

    Args:
        positions: `(batch, kv_heads, k)` int64, ascending.
        length: tokens of the prompt.

    Returns:
        `(batch, kv_heads, length)` int64.
    """
    tokens = torch.arange(length, device=positions.device).expand(*positions.shape[:2], length)
    after = torch.searchsorted(positions, tokens.contiguous()).clamp_max(positions.shape[-1] - 1)
    before = (after - 1).clamp_min(0)
    gap_after, gap_before = ((positions.gather(-1, slot) - tokens).abs() for slot in (after, before))
    return torch.where(gap_before <= gap_after, before, after)
