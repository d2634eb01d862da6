"""SnapKV: `SnapKVCluster.update_kv`, its pooled scores and the tokens it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import normal

REPOSITORY, REVISION = "FasterDecoding/SnapKV", "e216ddc"
SOURCE = "snapkv/monkeypatch/snapkv_utils.py"
HEADS, LENGTH, HEAD_DIM = 4, 96, 16
WINDOW, CAPACITY, KERNEL = 8, 30, 5


def states(kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the queries are long, so that attention is uneven."""
    return (
        3 * normal(1, HEADS, LENGTH, HEAD_DIM, seed=0),
        normal(1, kv_heads, LENGTH, HEAD_DIM, seed=1),
        normal(1, kv_heads, LENGTH, HEAD_DIM, seed=2),
    )


def kept_and_scores(cluster: Any, kv_heads: int = HEADS) -> dict[str, Any]:
    """Run `update_kv`: positions kept, and the pooled scores that it ranked."""
    queries, keys, values = states(kv_heads)
    ranked: list[Tensor] = []
    topk = torch.Tensor.topk

    def spy(scores: Tensor, *arguments: Any, **named: Any) -> Any:
        ranked.append(scores.clone())
        return topk(scores, *arguments, **named)

    with mock.patch.object(torch.Tensor, "topk", spy):
        new_keys, new_values = cluster.update_kv(keys, queries, values, None, 1)
    positions = _extract.positions_in(new_keys, keys)
    assert positions == _extract.positions_in(new_values, values)
    return {"positions": positions, "pooled": ranked[0][0]}


def record(checkout: Path) -> dict[str, Any]:
    """Run both poolings."""
    official = _extract.definitions(checkout / SOURCE, ["SnapKVCluster"])
    settings = {"window_size": WINDOW, "max_capacity_prompt": CAPACITY, "kernel_size": KERNEL}
    return {
        "source": f"{SOURCE}: SnapKVCluster.update_kv",
        **{
            pooling: kept_and_scores(official.SnapKVCluster(**settings, pooling=f"{pooling}pool"))
            for pooling in ("max", "avg")
        },
    }
