"""Whole rows of states by their slots: several times faster than element by element."""

from __future__ import annotations

import torch
from torch import Tensor


def take(states: Tensor, slots: Tensor) -> Tensor:
    """Return those of the states `(batch, kv_heads, n, d)` at `slots` `(batch, kv_heads, k)`."""
    found = states.flatten(0, 2).index_select(0, _flat(slots, states.shape[2]))
    return found.view(*slots.shape, states.shape[3])


def add(states: Tensor, slots: Tensor, given: Tensor) -> Tensor:
    """Return states `(batch, kv_heads, k, d)` with rows `(batch, kv_heads, n, d)` added at their slots.

    Args:
        states: what is added to; not changed.
        slots: `(batch, kv_heads, n)`; a slot that is named twice gets both rows.
        given: the rows.
    """
    index = _flat(slots, states.shape[2])
    return states.flatten(0, 2).index_add(0, index, given.flatten(0, 2)).view_as(states)


def _flat(slots: Tensor, length: int) -> Tensor:
    """Return slots `(batch, kv_heads, n)` of heads of a length as slots of all heads together."""
    heads = slots.flatten(0, 1)
    return (heads + torch.arange(len(heads), device=slots.device)[:, None] * length).flatten()
