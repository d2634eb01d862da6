"""TOVA: `TOVACache.reduce` after a prompt and 32 decode steps, with grouped queries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import PROMPT, STEPS, normal

REPOSITORY, REVISION = "schwartz-lab-NLP/TOVA", "9c7d09b"
SOURCE = "src/tova_cache.py"
HEADS, KV_HEADS, HEAD_DIM, KEPT = 4, 2, 8, 14


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the prompt and the decode steps."""
    length = PROMPT + STEPS
    return (
        2 * normal(1, HEADS, length, HEAD_DIM, seed=0),
        normal(1, KV_HEADS, length, HEAD_DIM, seed=1),
        normal(1, KV_HEADS, length, HEAD_DIM, seed=2),
    )


def record(checkout: Path) -> dict[str, Any]:
    """Positions kept after the prompt and after each step; the first list is the prompt's."""
    # the parent only stores the two lists, as DynamicCache did in transformers 4.36
    official = _extract.definitions(checkout / SOURCE, ["TOVACache"], DynamicCache=object)
    cache = official.TOVACache(KEPT)
    queries, keys, values = states()
    cache.key_cache, cache.value_cache = [keys[:, :, :PROMPT]], [values[:, :, :PROMPT]]
    repeated = keys[:, :, :PROMPT].repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = queries[:, :, :PROMPT] @ repeated.transpose(2, 3) / math.sqrt(HEAD_DIM)
    future = torch.ones(PROMPT, PROMPT, dtype=torch.bool).triu(1)
    cache.reduce(0, logits.masked_fill(future, -torch.inf).softmax(dim=-1))
    kept = [_extract.positions_in(cache.key_cache[0], keys)]
    for step in range(PROMPT, PROMPT + STEPS):
        now = slice(step, step + 1)
        cache.key_cache[0] = torch.cat([cache.key_cache[0], keys[:, :, now]], dim=2)
        cache.value_cache[0] = torch.cat([cache.value_cache[0], values[:, :, now]], dim=2)
        cache.reduce(0, _extract.softmax_row(queries[:, :, now], cache.key_cache[0]))
        kept.append(_extract.positions_in(cache.key_cache[0], keys))
    assert kept[-1] == _extract.positions_in(cache.value_cache[0], values)
    assert all(one == other for one, other in kept), "all KV heads keep the same tokens"
    return {"source": f"{SOURCE}: TOVACache.reduce", "positions": [heads[0] for heads in kept]}
