"""Ada-SnapKV: `AdaptiveSnapKVCluster.update_kv` with grouped queries, floors and poolings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import normal

REPOSITORY, REVISION = "FFY0/AdaKV", "efe4e2e"
SOURCE = "adaptive_snapkv/monkeypatch/snapkv_utils.py"
HEADS, KV_HEADS, LENGTH, HEAD_DIM = 8, 4, 96, 16
WINDOW, CAPACITY, KERNEL = 8, 29, 5
SETTINGS = ((0.2, "avg"), (0.5, "avg"), (0.0, "avg"), (0.2, "max"))
"""Floor and pooling of each run."""


def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; heads attend more or less evenly."""
    sharpness = torch.linspace(0.5, 4, HEADS).view(1, HEADS, 1, 1)
    return (
        sharpness * normal(1, HEADS, LENGTH, HEAD_DIM, seed=0),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=1),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=2),
    )


def record(checkout: Path) -> dict[str, Any]:
    """The scores that heads compete by, and the positions that each keeps."""
    official = _extract.definitions(checkout / SOURCE, ["AdaptiveSnapKVCluster", "repeat_kv"])
    queries, keys, values = states()
    runs = []
    for floor, pooling in SETTINGS:
        cluster = official.AdaptiveSnapKVCluster(
            window_size=WINDOW,
            kernel_size=KERNEL,
            pooling=f"{pooling}pool",
            base_capacity=CAPACITY,
            floor_alpha=floor,
            skip=0,
            layer_idx=0,
            num_hidden_layers=1,
            gqa_support=True,
            num_key_value_groups=HEADS // KV_HEADS,
            gqa_func="mean",
        )
        repeated = official.repeat_kv(keys, HEADS // KV_HEADS)
        scores = cluster.calcul_attn_sore(repeated, queries)[0]
        flat_keys, flat_values = cluster.update_kv(keys, queries, values)
        counts = cluster.head_lens.tolist()
        positions = []
        for head, (kept, held) in enumerate(
            zip(flat_keys.split(counts), flat_values.split(counts), strict=True)
        ):
            [found] = _extract.positions_in(kept[None, None], keys[:, head : head + 1])
            assert [found] == _extract.positions_in(held[None, None], values[:, head : head + 1])
            positions.append(found)
        runs.append({"floor": floor, "pooling": pooling, "scores": scores, "positions": positions})
    return {"source": f"{SOURCE}: AdaptiveSnapKVCluster.update_kv", "runs": runs}
