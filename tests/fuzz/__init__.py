"""Seeded fuzzers: what a person or a disk can do to a file ends in one message or a right result."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

SEED = 20_261_126


def yields(trials: int, attempt: Callable[[random.Random], None]) -> str:
    """What went wrong in how many trials, each with a trial that shows it; empty if nothing did."""
    counts: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for number in range(trials):
        try:
            attempt(random.Random(f"{SEED}/{number}"))
        except Exception as error:
            kind = type(error).__name__
            counts[kind] += 1
            shown.setdefault(kind, f"trial {number}: {str(error)[:2000]}")
    return "\n".join(
        f"{count} of {trials}: {kind}, {shown[kind]}" for kind, count in counts.most_common()
    )
