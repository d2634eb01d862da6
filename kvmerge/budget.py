"""What a budget means, and the only place that rounds one (docs/methods.md).

A budget is what *remains* of the cache: a fraction of the prompt tokens, or a number of entries
per KV head and layer. Shares, halves and counts of at least one are here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvmerge.errors import UserError

_ALLOWED = (
    "A budget is a fraction in (0, 1] of the prompt tokens, e.g. 0.35 (1 keeps everything), "
    "or a whole number of entries per KV head of 2 or more, e.g. 1024."
)


def count(fraction: float, length: int) -> int:
    """Return the whole entries in `fraction` of `length` tokens.

    It is the floor, safe from 0.29 * 100 = 28.99…
    """
    return math.floor(fraction * length + 1e-6)


def at_least_one(fraction: float, length: int) -> int:
    """Return `count` of what may not be empty."""
    return max(1, count(fraction, length))


def half(entries: int) -> int:
    """Return half of some entries, at least 1."""
    return max(1, entries // 2)


def recent_share(budget: float) -> float:
    """Return KVMerger's recent tokens as a fraction of the prompt.

    .17 at a budget of 50% and .08 at 35% are the paper's; between and beyond them a line (*ours*).
    """
    return max(0.02, 0.08 + 0.09 * (budget - 0.35) / 0.15)


def top_share(budget: float) -> float:
    """Return KVMerger's top tokens as a fraction of the prompt.

    .12 at a budget of 50% and .02 at 35% are the paper's; between and beyond them a line (*ours*).
    """
    return max(0.0, 0.02 + 0.10 * (budget - 0.35) / 0.15)


@dataclass(frozen=True)
class Budget:
    """Hold a validated budget; `Budget.parse` builds it."""

    value: float | int

    @classmethod
    def parse(cls, given: object) -> Budget:
        """Read a number, or a text such as `0.35` or `1024`.

        Raises:
            UserError: for all else.
        """
        number: object = given
        if isinstance(given, str):
            try:
                number = int(given)
            except ValueError:
                try:
                    number = float(given)
                except ValueError:
                    raise UserError(f"budget={given!r} is not a number. {_ALLOWED}") from None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UserError(f"budget={given!r} is not a number. {_ALLOWED}")
        if 0 < number <= 1:  # False for NaN
            return cls(float(number))
        if isinstance(number, int) and 2 <= number < 2**31:
            return cls(number)
        raise UserError(f"budget={given} is out of range. {_ALLOWED}")

    def entries(self, length: int) -> int:
        """Return the entries kept per KV head and layer of a prompt of `length` tokens, at least 1."""
        if isinstance(self.value, int):
            return min(length, self.value)
        return at_least_one(self.value, length)

    def fraction(self, length: int) -> float:
        """Return the budget as a fraction of a prompt of `length` tokens."""
        return self.entries(length) / length if isinstance(self.value, int) else self.value

    def __str__(self) -> str:
        return f"{self.value:g}"
