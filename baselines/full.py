"""The full cache: every entry is kept. The reference for accuracy, memory and fidelity."""

from __future__ import annotations

from dataclasses import dataclass

from kvmerge.method import Allowance, Entries, Method, PrefillLayer, keep_all


@dataclass(frozen=True)
class Full(Method):
    """Keep everything, whatever the budget."""

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep every token."""
        return keep_all(layer)
