"""KeepKV: `KV_update` after a prompt, in float32, with its threshold and without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import normal

REPOSITORY, REVISION = "kkvcache/KeepKV", "a25a2b5"
SOURCE = "utils_hh/modify_llama_oursk.py"
HEADS, LENGTH, HEAD_DIM, HEAVY, RECENT = 3, 60, 8, 12, 12
SINKS, DISTANCE_WEIGHT = 3, 1.2
SETTINGS = ((0.8, 1.0), (-1.0, 1.0), (0.6, 500.0))
"""Threshold, and epsilon in units of the smallest normal float16, of each run."""


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; keys resemble each other."""
    return (
        2 * normal(1, HEADS, LENGTH, HEAD_DIM, seed=0),
        normal(1, HEADS, LENGTH, HEAD_DIM, seed=1) + normal(1, HEADS, 1, HEAD_DIM, seed=3),
        normal(1, HEADS, LENGTH, HEAD_DIM, seed=2),
    )


def record(checkout: Path) -> dict[str, Any]:
    """Merged keys and values, and how many tokens each entry stands for."""
    official = _extract.definitions(
        checkout / SOURCE, ["LlamaAttention_heavy_hitter_our_sketch"], LlamaConfig=object
    )
    queries, keys, values = states()
    logits = queries @ keys.transpose(2, 3) / HEAD_DIM**0.5
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    strength = logits.masked_fill(future, -torch.inf).exp()
    runs = []
    for threshold, epsilon in SETTINGS:
        module = SimpleNamespace(
            num_heads=HEADS,
            heavy_budget=HEAVY,
            recent_budget=RECENT,
            cache_budget=HEAVY + RECENT,
            sink_len=SINKS,
            distance_weight=DISTANCE_WEIGHT,
            similarity_threshold=threshold,
            epsilon=torch.finfo(torch.float16).tiny * epsilon,
            previous_recent_scores=None,
            cluster_cnt=None,
        )
        update = official.LlamaAttention_heavy_hitter_our_sketch.KV_update
        # they round similarities and what they store to float16; here all is float32
        with mock.patch.object(torch.Tensor, "half", torch.Tensor.float):
            new_keys, new_values = update(module, (keys, values), strength.clone())
        runs.append({"sizes": module.cluster_cnt.int(), "keys": new_keys[0], "values": new_values[0]})
    return {"source": f"{SOURCE}: KV_update", "runs": runs}
