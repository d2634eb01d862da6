"""The compressed caches of several cells, decoded together as one batch.

The rows of the batch keep caches of different length. Rows whose entries have the same shape in a layer
share one preallocated buffer, so that each step writes its new entries in place and runs one attention
call per distinct length, without padding the short rows to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvmerge.attention import cached_attention
from kvmerge.method import Entries


class RowGroup:
    """Rows of one layer whose caches have the same length."""

    def __init__(self, rows: Sequence[int], entries: Sequence[Entries], capacity: int) -> None:
        """Copy the entries of each row, batch 1 each, into a buffer with room for `capacity` more."""
        self.rows = list(rows)
        first = entries[0]
        _, kv_heads, self.prefill_length, head_dim = first.keys.shape
        self.length = self.prefill_length
        shape = (len(rows), kv_heads, self.length + capacity, head_dim)
        self.keys = first.keys.new_empty(shape)
        self.values = first.values.new_empty(shape)
        self.bias: Tensor | None = None
        if any(entry.bias is not None for entry in entries):
            # new tokens get no bias
            self.bias = torch.zeros(shape[:3], dtype=torch.float32, device=first.keys.device)
        for slot, entry in enumerate(entries):
            self.keys[slot, :, : self.length] = entry.keys[0]
            self.values[slot, :, : self.length] = entry.values[0]
            if entry.bias is not None and self.bias is not None:
                self.bias[slot, :, : self.length] = entry.bias[0]
        self.active = len(self.rows)

    def retire(self, row: int) -> None:
        """Take a finished row out of the next steps: it swaps its slot with the last active one."""
        slot, last = self.rows.index(row), self.active - 1
        if slot != last:
            for buffer in (self.keys, self.values, self.bias):
                if buffer is not None:
                    buffer[[slot, last], :, : self.length] = buffer[[last, slot], :, : self.length]
            self.rows[slot], self.rows[last] = self.rows[last], self.rows[slot]
        self.active = last

    def rewind(self) -> None:
        """Return every row to its state after prefill."""
        self.active = len(self.rows)
        self.length = self.prefill_length

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Append the new entries of the active rows and attend; shapes as in `cached_attention`."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise RuntimeError(f"cache buffer of {self.keys.shape[2]} entries is full")
        active = slice(0, self.active)
        self.keys[active, :, self.length : end] = keys
        self.values[active, :, self.length : end] = values
        self.length = end
        bias = None if self.bias is None else self.bias[active, :, :end]
        return cached_attention(
            queries, self.keys[active, :, :end], self.values[active, :, :end], scale, bias
        )


class LayerCache:
    """One layer of all rows."""

    def __init__(self, entries: Sequence[Entries], capacity: int) -> None:
        """Group the rows by length; `entries[row]` has batch 1."""
        by_length: dict[int, list[int]] = {}
        for row, entry in enumerate(entries):
            by_length.setdefault(entry.keys.shape[2], []).append(row)
        self.groups = [
            RowGroup(rows, [entries[row] for row in rows], capacity) for rows in by_length.values()
        ]

    def retire(self, row: int) -> None:
        """Take a finished row out of the next steps."""
        for group in self.groups:
            if row in group.rows:
                group.retire(row)

    def rewind(self) -> None:
        """Return every row to its state after prefill."""
        for group in self.groups:
            group.rewind()

    def attend(
        self, order: Sequence[int], queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend for the active rows, given in batch order `order`."""
        slot_of = {row: slot for slot, row in enumerate(order)}
        out = torch.empty_like(queries)
        for group in self.groups:
            slots = [slot_of[row] for row in group.rows[: group.active]]
            if slots:
                out[slots] = group.attend(queries[slots], keys[slots], values[slots], scale)
        return out
