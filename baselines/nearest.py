"""Which kept entry an evicted one is nearest to, by any feature; what folds evicted entries asks it."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 512
"""Evicted entries compared with the kept ones at once."""


def take(states: Tensor, slots: Tensor) -> Tensor:
    """Return the states `(batch, kv_heads, n, d)` at `slots` `(batch, kv_heads, k)`."""
    return states.gather(2, slots.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


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
    unit, target = (each / each.norm(dim=-1, keepdim=True).clamp_min(1e-8) for each in (evicted, kept))
    blocks = [(block @ target.transpose(2, 3)).max(dim=-1) for block in unit.split(_BLOCK, dim=2)]
    similarity = torch.cat([best.values for best in blocks], dim=-1)
    return similarity, torch.cat([best.indices for best in blocks], dim=-1)


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
