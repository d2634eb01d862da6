"""The compressed caches of several cells, decoded together as one batch.

The rows of the batch keep caches of different length. Rows whose entries have the same shape in a layer
share one preallocated buffer, so that each step writes its new entries in place and runs one attention
call per distinct length, without padding the short rows to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kvmerge.kernels.attention import Read, cached_attention, weighted_attention
from kvmerge.method import Entries, pick
from kvmerge.proof import LayerProof
from kvmerge.rope import Rope
from kvmerge.softmax import Softmax

Hold = Callable[[Entries, Tensor, int], Entries]
"""A row's rule after each decode step: (entries, weights `(1, heads, n)`, step) -> entries."""


class Group(Protocol):
    """Rows of one layer that attend together."""

    rows: list[int]
    active: int
    """The first `active` of `rows` take part in the next step."""

    def retire(self, row: int) -> None:
        """Take a finished row out of the next steps."""
        ...

    def rewind(self, fed: int = 0) -> None:
        """Return every row to its state `fed` tokens after the prefill, no later than it is."""
        ...

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        softmax: Softmax,
        read: Read | None = None,
    ) -> Tensor:
        """Append the new entries of the active rows and attend; arguments as in `cached_attention`."""
        ...

    def nbytes(self) -> int:
        """Count the bytes of the keys and values stored for all rows, unused room left out."""
        ...

    def prefilled_states(self, row: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and logit biases of a row after prefill, batch 1; not copies."""
        ...


class RowGroup:
    """Rows of one layer whose caches have the same length."""

    def __init__(
        self,
        rows: Sequence[int],
        entries: Sequence[Entries],
        capacity: int,
        window: int | None = None,
    ) -> None:
        """Copy the entries of each row, batch 1 each, into a buffer with room for `capacity` more.

        Args:
            window: the last entries that a token sees, its own among them; None: all.
        """
        self.rows = list(rows)
        self.window = window
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

    def _grow(self, needed: int) -> None:
        """Make room for at least `needed` entries, and a quarter more than before."""
        more = max(needed, self.keys.shape[2] * 5 // 4) - self.keys.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias, (0, more))

    def rewind(self, fed: int = 0) -> None:
        """Return every row to its state `fed` tokens after the prefill, no later than it is."""
        self.active = len(self.rows)
        self.length = self.prefill_length + fed

    def nbytes(self) -> int:
        """Count the bytes of the keys and values stored for all rows, unused room left out."""
        return self.keys[:, :, : self.length].nbytes + self.values[:, :, : self.length].nbytes

    def prefilled_states(self, row: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and logit biases of a row after prefill, batch 1; not copies."""
        slot = self.rows.index(row)
        kept = slice(slot, slot + 1), slice(None), slice(self.prefill_length)
        return self.keys[kept], self.values[kept], None if self.bias is None else self.bias[kept]

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        softmax: Softmax,
        read: Read | None = None,
    ) -> Tensor:
        """Append the new entries of the active rows and attend; arguments as in `cached_attention`."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            self._grow(end)
        active = slice(0, self.active)
        self.keys[active, :, self.length : end] = keys
        self.values[active, :, self.length : end] = values
        self.length = end
        bias = None if self.bias is None else self.bias[active, :, :end]
        stored = self.keys[active, :, :end], self.values[active, :, :end]
        return cached_attention(queries, *stored, softmax, bias, self.window, read)


class SteppedRow:
    """One row that takes new tokens one at a time: its method decides again after each, or its
    positions are rolled.

    Its entries are replaced as a whole, so each step costs a copy: the price of acting while decoding.
    """

    def __init__(
        self,
        row: int,
        entries: Entries,
        prompt_length: int,
        hold: Hold | None,
        rolled: Rope | None = None,
    ) -> None:
        """Start from the entries after prefill, batch 1.

        Args:
            prompt_length: prompt tokens, from which true positions count.
            hold: the rule after each step; None only appends.
            rolled: attend as if the stored entries stood at positions 0, 1, 2, …; None keeps true ones.
        """
        self.prompt_length = prompt_length
        self.rolled = rolled
        self.rows = [row]
        self.active = 1
        self.prefilled = self.entries = entries
        self.hold = hold
        self.steps = 0

    def retire(self, row: int) -> None:
        """Take the row out of the next steps."""
        assert row in self.rows
        self.active = 0

    def rewind(self, fed: int = 0) -> None:
        """Return to the state `fed` tokens after the prefill; a row that decides again, only to 0."""
        assert self.hold is None or not fed
        self.active, self.steps = 1, fed
        first = torch.arange(self.prefilled.keys.shape[2] + fed, device=self.entries.keys.device)
        self.entries = (
            pick(self.entries, first.expand(*self.entries.keys.shape[:2], -1))
            if fed
            else self.prefilled
        )

    def nbytes(self) -> int:
        """Count the bytes of the keys and values stored."""
        return self.entries.keys.nbytes + self.entries.values.nbytes

    def prefilled_states(self, row: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and logit biases of the row after prefill, batch 1; not copies."""
        assert row in self.rows
        return self.prefilled.keys, self.prefilled.values, self.prefilled.bias

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        softmax: Softmax,
        read: Read | None = None,
    ) -> Tensor:
        """Take the new tokens one at a time: attend over all that is stored, then hold."""
        outputs = []
        for token in range(keys.shape[2]):
            now = slice(token, token + 1)
            position = self.prompt_length + self.steps
            stored = append_entry(self.entries, keys[:, :, now], values[:, :, now], position)
            query, seen = queries[:, :, now], stored.keys
            if self.rolled is not None:
                index = torch.arange(seen.shape[2], device=seen.device)
                seen = self.rolled.rotate(seen, index - stored.positions)
                query = self.rolled.rotate(query, index[-1:] - position)
            out, weights = weighted_attention(query, seen, stored.values, softmax, stored.bias, read)
            if self.hold is not None:
                stored = self.hold(stored, weights, self.steps)
            self.entries = stored
            self.steps += 1
            outputs.append(out)
        return torch.cat(outputs, dim=2)


def append_entry(entries: Entries, key: Tensor, value: Tensor, position: int) -> Entries:
    """Add one token's key and value `(batch, kv_heads, 1, head_dim)`, of size 1 and without mass."""

    def extended(extra: Tensor | None, fill: float) -> Tensor | None:
        return None if extra is None else torch.nn.functional.pad(extra, (0, 1), value=fill)

    bias = extended(entries.bias, 0.0)
    if bias is not None and entries.next_bias is not None:
        bias[..., -1] = entries.next_bias
    return Entries(
        torch.cat([entries.keys, key], dim=2),
        torch.cat([entries.values, value], dim=2),
        torch.nn.functional.pad(entries.positions, (0, 1), value=position),
        extended(entries.sizes, 1),
        bias,
        extended(entries.scores, 0.0),
        entries.state,
    )


class LayerCache:
    """One layer of all rows."""

    def __init__(
        self,
        entries: Sequence[Entries],
        capacity: int,
        stepped: Mapping[int, SteppedRow] | None = None,
        window: int | None = None,
        proof: LayerProof | None = None,
    ) -> None:
        """Group the rows by length; `entries[row]` has batch 1.

        Args:
            capacity: new tokens that each row has room for before its buffer must grow.
            stepped: rows that do not simply append, by their index.
            window: the last entries that a token sees in this layer; None: all.
            proof: counts what attention reads.
        """
        self.proof = proof
        self.groups: list[Group] = list((stepped or {}).values())
        by_length: dict[int, list[int]] = {}
        for row, entry in enumerate(entries):
            if row not in (stepped or {}):
                by_length.setdefault(entry.keys.shape[2], []).append(row)
        for rows in by_length.values():
            self.groups.append(RowGroup(rows, [entries[row] for row in rows], capacity, window))

    def retire(self, row: int) -> None:
        """Take a finished row out of the next steps."""
        for group in self.groups:
            if row in group.rows:
                group.retire(row)

    def rewind(self, fed: int = 0) -> None:
        """Return every row to its state `fed` tokens after the prefill, no later than it is."""
        for group in self.groups:
            group.rewind(fed)

    def nbytes(self) -> int:
        """Count the bytes of the keys and values stored for all rows, unused room left out."""
        return sum(group.nbytes() for group in self.groups)

    def prefilled_states(self, row: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and logit biases of a row after prefill, batch 1; not copies."""
        return next(group for group in self.groups if row in group.rows).prefilled_states(row)

    def attend(
        self, order: Sequence[int], queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax
    ) -> Tensor:
        """Attend for the active rows, given in batch order `order`."""
        slot_of = {row: slot for slot, row in enumerate(order)}
        out = torch.empty_like(queries)
        for group in self.groups:
            rows = group.rows[: group.active]
            if rows:
                slots = [slot_of[row] for row in rows]
                read = None if self.proof is None else partial(self.proof.read, rows)
                out[slots] = group.attend(queries[slots], keys[slots], values[slots], softmax, read)
        return out
