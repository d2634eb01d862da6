"""ZSMerge: the faded scores of a prompt, and what `cache_init` makes of it, with grouped queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import normal

REPOSITORY, REVISION = "SusCom-Lab/ZSMerge", "4bab127"
SOURCE = "mergekv/mergekv.py"
HEADS, KV_HEADS, LENGTH, HEAD_DIM, BUDGET = 4, 2, 70, 8, 0.4
SETTINGS: tuple[tuple[float, float, float], ...] = ((0.4, 1, 0.98), (0.1, 5, 0.9), (0.3, 0.25, 1.0))
"""Tail, dense and shrink factor of each run."""


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return (
        2 * normal(1, HEADS, LENGTH, HEAD_DIM, seed=0),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=1),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=2),
    )


def record(checkout: Path) -> dict[str, Any]:
    """Scores, averaged entries with their weights, and positions of the others."""
    official = _extract.definitions(
        checkout / SOURCE,
        [
            "cache_args_parse",
            "cache_init",
            "de_repeat_kv",
            "repeat_kv",
            "score_scaled_dot_product_attention",
            "topk_split",
        ],
    )
    queries, keys, values = states()
    group = HEADS // KV_HEADS
    runs = []
    for tail, dense, shrink in SETTINGS:
        given = {
            "cache_budget": BUDGET,
            "cache_tail": tail,
            "cache_dense": dense,
            "shrink_factor": shrink,
        }
        official.cache_args_parse(given, LENGTH)
        _, by_head = official.score_scaled_dot_product_attention(
            queries,
            official.repeat_kv(keys, group),
            official.repeat_kv(values, group),
            scale_factor=1,
            shrink_factor=shrink,
        )
        scores = official.de_repeat_kv(by_head, group)
        new_keys, new_values, weights, _ = official.cache_init(keys, values, scores=scores, **given)
        n_dense = given["cache_dense"]
        positions = _extract.positions_in(new_keys[:, :, n_dense:], keys)
        assert positions == _extract.positions_in(new_values[:, :, n_dense:], values)
        runs.append(
            {
                "scores": scores[0],
                "sizes": weights[0, :, :n_dense],
                "keys": new_keys[0, :, :n_dense],
                "values": new_values[0, :, :n_dense],
                "positions": positions,
            }
        )
    return {"source": f"{SOURCE}: score_scaled_dot_product_attention, cache_init", "runs": runs}
