"""KVSlimmer: one call of its cache after a chunk, with its estimate of importance and with another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvmerge.rope import Rope
from tests.fidelity.official import _extract
from tests.fidelity.official._extract import SlicedCache
from tests.fidelity.official._inputs import normal

REPOSITORY, REVISION = "lianjunl13-sudo/KVSlimmer", "eca7a68"
CACHE, MERGE, ESTIMATE = "kvslimmer/cache.py", "kvslimmer/merge.py", "pred.py"
HEADS, KV_HEADS, LENGTH, HEAD_DIM, SINKS, WINDOW = 4, 2, 150, 8, 6, 10
MERGED = (1, 6, 12)
"""Pairs that are merged in each run: few, since of pairs that overlap their cache loses tokens."""


def rope() -> Rope:
    """Angles of the rotation."""
    return Rope(10000.0 ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys before RoPE, and values."""
    return (
        2 * normal(1, HEADS, LENGTH, HEAD_DIM, seed=26),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=1),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=2),
    )


def turned(before: Tensor) -> Tensor:
    """States after RoPE."""
    return rope().rotate(before, torch.arange(LENGTH))


def observed() -> Tensor:
    """What the window's rows attend to before it: `(1, HEADS, WINDOW, LENGTH - WINDOW)`."""
    queries, keys, _ = states()
    keys = turned(keys).repeat_interleave(HEADS // KV_HEADS, dim=1)
    logits = turned(queries)[:, :, LENGTH - WINDOW :] @ keys.transpose(2, 3) / HEAD_DIM**0.5
    future = torch.ones(WINDOW, LENGTH, dtype=torch.bool).triu(LENGTH - WINDOW + 1)
    return logits.masked_fill(future, -torch.inf).softmax(dim=-1)[..., : LENGTH - WINDOW]


def other_importance() -> Tensor:
    """An importance that does not follow from the attention: `(1, KV_HEADS, LENGTH - WINDOW)`."""
    return observed().sum(dim=2).unflatten(1, (KV_HEADS, -1)).mean(dim=2) * (
        1 + normal(1, KV_HEADS, LENGTH - WINDOW, seed=3).abs()
    )


def record(checkout: Path) -> dict[str, Any]:
    """Importance, the sizes of all entries, the same in all KV heads, and what the merged ones hold."""
    merge = _extract.definitions(checkout / MERGE, ["optimal_merge_k_from_alpha_d"])
    official = _extract.definitions(
        checkout / CACHE,
        ["KVSlimmerCache"],
        StartRecentKVCache=SlicedCache,
        repeat_kv_3d=lambda states, times: states.repeat_interleave(times, dim=1),
        optimal_merge_k_from_alpha_d=merge.optimal_merge_k_from_alpha_d,
    )
    proxy = _extract.definitions(checkout / ESTIMATE, ["build_hessian_proxy_from_ratio"])
    _, keys, values = (state[:, :, : LENGTH - WINDOW] for state in states())
    ones = torch.ones(keys.shape[:3])
    [(own, _)] = proxy.build_hessian_proxy_from_ratio(
        [(keys, values, ones)], [observed()], SINKS, HEADS // KV_HEADS
    )
    other = other_importance().unsqueeze(-1).expand_as(keys)
    runs = []
    for merged in MERGED:
        for importance in (own, other):
            cache = official.KVSlimmerCache(SINKS, LENGTH - WINDOW - merged)
            past = [tuple(state.clone() for state in (keys, values, ones))]
            [stored], _ = cache(past, [observed()], [(importance.clone(), None)])
            assert stored[2][0, 0].sum() == LENGTH - WINDOW, "pairs overlap, tokens are lost"
            new_keys, new_values, sizes = (state[0] for state in stored)
            two = sizes[0] == 2
            runs.append(
                {
                    "sizes": sizes.int()[0],
                    "keys": new_keys[:, two],
                    "values": new_values[:, two],
                }
            )
    return {
        "source": f"{CACHE}: KVSlimmerCache.__call__; {ESTIMATE}: build_hessian_proxy_from_ratio",
        "importance": own[0, :, SINKS:, 0],
        "runs": runs,
    }
