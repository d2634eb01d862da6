"""Seeded fuzzers: what a person or a disk can do to a file ends in one message or a right result."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

SEED = 20_261_126
EVERY = int(os.environ.get("KVMERGE_FUZZ", "5"))
"""One in so many trials is made, always the same ones: all take minutes."""
RAW = (
    *("null", "true", '"x"', '""', '"\\ud800"', '"\\u0000"', '"3"', "0", "-1", "7", "0.5", "-0.5"),
    *("1e999", "NaN", "-Infinity", "1e308", "9" * 400, "9" * 5000, str(2**63), "[]", "[1]", '["a"]'),
    *("[[0.5]]", "{}", '{"a": 1}', '{"a": {"b": []}}', '{"\\udfff": 1}'),
    *("[" * depth + "]" * depth for depth in (600, *range(900, 1_000, 10), 99_999)),
)
"""Values as they stand in JSON."""
BYTES = (b"\xff", b"\0", b"\n", b'"', b"}", b",", b"\xc3", b"\xe2\x80\xa8", b"\r")
MARK = "\x01raw\x01"
"""Stands in a value where something else is to stand in its JSON."""


def yields(trials: int, attempt: Callable[[random.Random], None]) -> str:
    """What went wrong in how many trials, each with a trial that shows it; empty if nothing did."""
    counts: Counter[str] = Counter()
    shown: dict[str, str] = {}
    made = range(0, trials, EVERY)
    for number in made:
        try:
            attempt(random.Random(f"{SEED}/{number}"))
        except Exception as error:
            kind = type(error).__name__
            counts[kind] += 1
            shown.setdefault(kind, f"trial {number}: {str(error)[:500]}")
    return "\n".join(
        f"{count} of {len(made)}: {kind}, {shown[kind]}" for kind, count in counts.most_common()
    )


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key of it."""
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def swapped(text: bytes, rng: random.Random) -> bytes:
    """A JSON object with another value somewhere, one value less, or one more."""
    row = json.loads(text)
    container, key = rng.choice(places(row))
    kind = rng.random()
    if kind < 0.15:
        del container[key]
    elif kind < 0.25:
        row["unheard_of"] = MARK
    else:
        container[key] = MARK
    return with_raw(row, rng.choice(RAW))


def with_raw(row: Any, raw: str) -> bytes:
    """A value as JSON, with `raw` in the place of `MARK`."""
    return json.dumps(row).replace(json.dumps(MARK), raw).encode()
