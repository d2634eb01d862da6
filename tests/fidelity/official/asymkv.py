"""AsymKV: which pairs one call of its cache merges, where some entries stand for several tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import normal

REPOSITORY, REVISION = "the-scale-lab/Asymkv", "6e844dc"
SOURCE = "asymkv/method/asymkv.py"
HEADS, KV_HEADS, LENGTH, MERGED = 4, 2, 120, (1, 4, 8)
"""Entries, and the pairs that are merged in each run: few enough that none overlap."""


def attention() -> Tensor:
    """What three rows pay for one token of each entry: `(1, HEADS, 3, LENGTH)`."""
    return (2 * normal(1, HEADS, 3, LENGTH, seed=9)).softmax(dim=-1)


def sizes() -> Tensor:
    """Tokens of each entry, the same in all KV heads: `(1, KV_HEADS, LENGTH)`, 1 to 4."""
    drawn = torch.randint(1, 5, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return drawn.float().expand(1, KV_HEADS, LENGTH)


def record(checkout: Path) -> dict[str, Any]:
    """The first entries of the pairs."""
    official = _extract.definitions(
        checkout / SOURCE,
        ["AsymKVCache", "repeat_kv"],
        StartRecentKVCache=_extract.SlicedCache,
    )
    numbered = torch.arange(float(LENGTH)).expand(1, KV_HEADS, LENGTH).unsqueeze(-1)
    runs = []
    for merged in MERGED:
        cache = official.AsymKVCache(0, LENGTH - merged)
        past = [(numbered.clone(), numbered.clone(), sizes().clone())]
        [(keys, _, _)], _ = cache(past, [attention()], HEADS // KV_HEADS)
        # without gradients a merged entry is the mean of two, and lies half way between their numbers
        halfway = keys[0, 0, :, 0]
        pairs = halfway[halfway % 1 > 0].floor().int()
        assert len(pairs) == merged, "pairs overlap"
        runs.append(pairs)
    return {"source": f"{SOURCE}: AsymKVCache.__call__", "pairs": runs}
