"""What a machine needs for each part of a run: the questions, which every source of figures answers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvmerge.cells import Cell


class Batch(NamedTuple):
    """What takes part in a forward pass after the prefill; a row that ends halfway is half a row."""

    rows: float
    groups: float
    """Attention calls in a layer: rows of a sample whose caches are of one length share one."""
    entries: float
    """Entries per KV head and layer of all rows together."""

    def grown(self, tokens: float) -> Batch:
        """Return it as it is on the average of so many steps; each adds an entry a row, then reads."""
        return self._replace(entries=self.entries + self.rows * (tokens + 1) / 2)


class Speed(Protocol):
    """A machine with a model, in seconds."""

    @property
    def loading(self) -> float:
        """From the start of a run to its first prefill."""
        ...

    def prefill(self, tokens: int) -> float:
        """Return the time of a prompt's pass through all layers."""
        ...

    def compress(self, cell: Cell, tokens: int) -> float:
        """Return the time of a cell's method with all layers of a prompt."""
        ...

    def store(self, entries: float) -> float:
        """Return the time of putting away what rows keep, entries per KV head and layer together."""
        ...

    def step(self, batch: Batch) -> float:
        """Return the time of one decode step."""
        ...

    def replay(self, batch: Batch, width: float) -> float:
        """Return the time of feeding `width` given tokens to each row at once."""
        ...
