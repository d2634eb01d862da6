"""LOOK-M's pivot merging: `PivotKVCache_LayerWise` after a prompt and 32 decode steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import PROMPT, STEPS, normal

REPOSITORY, REVISION = "SUSTechBruce/LOOK-M", "ecf0f51"
SOURCE = "LLaVA-mix_merge_v1/llava/model/kv_token_merge/modify_llama.py"
HEADS, HEAD_DIM, RATIO = 3, 128, 0.2
"""The authors' code takes heads of 128 alone. Heavy hitters and recent tokens are a fifth each."""


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the prompt and the decode steps; keys resemble each other."""
    length = PROMPT + STEPS
    return (
        normal(1, HEADS, length, HEAD_DIM, seed=0),
        normal(1, HEADS, length, HEAD_DIM, seed=1) + normal(1, HEADS, 1, HEAD_DIM, seed=3),
        normal(1, HEADS, length, HEAD_DIM, seed=2),
    )


def probe() -> Tensor:
    """A direction that states are projected on, so that few numbers show a change of any."""
    return normal(HEAD_DIM, seed=99) / HEAD_DIM**0.5


def record(checkout: Path) -> dict[str, Any]:
    """What is stored after the prompt and after each step, projected."""
    official = _extract.definitions(checkout / SOURCE, ["PivotKVCache_LayerWise"])
    cache = official.PivotKVCache_LayerWise(hh_ratio=RATIO, recent_ratio=RATIO)
    queries, keys, values = states()
    now = slice(0, PROMPT)
    logits = queries[:, :, now] @ keys[:, :, now].transpose(2, 3) / HEAD_DIM**0.5
    future = torch.ones(PROMPT, PROMPT, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(future, -torch.inf).softmax(dim=-1)
    past = cache((keys[:, :, now], values[:, :, now]), weights)
    stored = [past]
    for step in range(PROMPT, PROMPT + STEPS):
        now = slice(step, step + 1)
        grown = [torch.cat([past[i], (keys, values)[i][:, :, now]], dim=2) for i in range(2)]
        past = cache(tuple(grown), _extract.softmax_row(queries[:, :, now], grown[0]))
        stored.append(past)
    return {
        "source": f"{SOURCE}: PivotKVCache_LayerWise",
        "keys": [past[0][0] @ probe() for past in stored],
        "values": [past[1][0] @ probe() for past in stored],
    }
