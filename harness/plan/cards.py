"""Published figures of cards: what `plan.device=` knows of hardware that is not here.

They are limits that no run reaches; `harness.plan.published` says what share of them is assumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Card:
    """One card as its maker describes it."""

    name: str
    """The model in full."""
    tflops: Mapping[str, float]
    """Peak 10**12 operations a second of matrix products, by the dtype of the model."""
    bandwidth_gb_s: float
    """10**9 bytes a second between memory and processor."""
    memory_gb: float
    """10**9 bytes of memory."""
    source: str
    """Where the figures were read, and which of those that stand there."""

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return round(self.memory_gb * 1e9)


def _read() -> dict[str, Card]:
    content = json.loads((files("harness.plan") / "cards.json").read_text(encoding="utf-8"))
    return {short: Card(**figures) for short, figures in content.items()}


CARDS: Mapping[str, Card] = _read()
"""By the name that `plan.device` takes."""
