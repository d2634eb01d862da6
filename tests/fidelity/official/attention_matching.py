"""Attention matching: both key choices of the authors, with given queries, for two KV heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import normal

REPOSITORY, REVISION = "adamzweiger/compaction", "2e59cc8"
FOLDER = "compaction/algorithms"
HEADS, KV_HEADS, LENGTH, HEAD_DIM, KEPT = 4, 2, 48, 8, 12


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return (
        2 * normal(1, HEADS, LENGTH, HEAD_DIM, seed=0),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=1),
        normal(1, KV_HEADS, LENGTH, HEAD_DIM, seed=2),
    )


def record(checkout: Path) -> dict[str, Any]:
    """Positions, biases and values, in ascending order of position."""
    base = _extract.definitions(
        checkout / FOLDER / "base.py", ["CompactionAlgorithm"], ABC=object, abstractmethod=lambda f: f
    ).CompactionAlgorithm
    path = checkout / FOLDER
    highest = _extract.definitions(
        path / "highest_attention_keys.py",
        ["HighestAttentionKeysCompaction"],
        CompactionAlgorithm=base,
    ).HighestAttentionKeysCompaction
    omp = _extract.definitions(
        path / "omp.py", ["OMPCompaction"], CompactionAlgorithm=base
    ).OMPCompaction
    bounds = {"nnls_lower_bound": math.exp(-3), "nnls_upper_bound": math.exp(3)}
    ways = {
        "highest_attention": highest(nnls_iters=2, score_method="rms", **bounds),
        "omp": omp(nnls_upper_bound=math.exp(7)),
        "omp_4": omp(nnls_upper_bound=math.exp(7), k_choice=4),
    }
    queries, keys, values = states()
    grouped = queries[0].unflatten(0, (KV_HEADS, -1)).flatten(1, 2)
    found: dict[str, Any] = {}
    for name, way in ways.items():
        found[name] = []
        for head in range(KV_HEADS):
            # their power iteration starts at random; here at equal numbers
            with mock.patch.object(torch, "randn", lambda n, **_: torch.ones(n)):
                _, bias, fitted, chosen = way.compute_compacted_cache(
                    keys[0, head], values[0, head], grouped[head], KEPT
                )
            order = torch.tensor(chosen).argsort()
            positions = torch.tensor(chosen)[order]
            found[name].append({"positions": positions, "bias": bias[order], "values": fitted[order]})
    return {"source": f"{FOLDER}: HighestAttentionKeysCompaction, OMPCompaction", **found}
