"""PyramidKV and grouped SnapKV: the clusters of KVCache-Factory, with and without grouped queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.fidelity.official import _extract, snapkv

REPOSITORY, REVISION = "Zefan-Cai/KVCache-Factory", "c97f9d7"
SOURCE = "pyramidkv/pyramidkv_utils.py"
DEFINITIONS = (
    "PyramidKVCluster",
    "SnapKVCluster",
    "_debug_print",
    "_gqa_groups",
    "_grouped_window_attn_cache",
    "_reduce_group_scores",
    "_select_topk_kv",
    "repeat_kv",
)
LAYERS, BETA = 6, 4
SETTINGS = {
    "window_size": snapkv.WINDOW,
    "max_capacity_prompt": snapkv.CAPACITY,
    "kernel_size": snapkv.KERNEL,
    "pooling": "avgpool",
}
SCHEDULES = [
    # (mean entries, prompt, layers, window, beta)
    (512, 3500, 32, 8, 20),
    (1750, 3500, 32, 8, 20),
    (1225, 3500, 40, 8, 20),
    (300, 520, 32, 8, 20),
    (300, 584, 32, 8, 20),
    (300, 620, 32, 8, 20),
    (64, 200, 30, 32, 14),
    (9, 40, 5, 8, 20),
]


def record(checkout: Path) -> dict[str, Any]:
    """Run the counts of several schedules, and what is kept under one of them."""
    official = _extract.definitions(checkout / SOURCE, DEFINITIONS, _KVCACHE_FACTORY_DEBUG=False)

    def pyramid(layer_idx: int) -> Any:
        return official.PyramidKVCluster(LAYERS, layer_idx=layer_idx, beta=BETA, **SETTINGS)

    def count(n_keep: int, length: int, layers: int, window: int, beta: int, layer_idx: int) -> int:
        cluster = official.PyramidKVCluster(
            layers, window, n_keep, pooling="maxpool", beta=beta, layer_idx=layer_idx
        )
        empty = torch.zeros(1, 1, length, 1)
        return cluster.update_kv(empty, empty, empty, None, 1)[0].shape[2]

    return {
        "source": f"{SOURCE}: PyramidKVCluster.update_kv, SnapKVCluster.update_kv",
        "counts": [
            [count(*schedule, layer_idx) for layer_idx in range(schedule[2])] for schedule in SCHEDULES
        ],
        **{
            f"pyramidkv_{kv_heads}_kv_heads": [
                snapkv.kept_and_scores(pyramid(layer_idx), kv_heads)["positions"]
                for layer_idx in range(LAYERS)
            ]
            for kv_heads in (4, 2)
        },
        "snapkv_2_kv_heads": snapkv.kept_and_scores(official.SnapKVCluster(**SETTINGS), 2),
    }
