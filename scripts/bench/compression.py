"""What does compressing itself cost, beside the prefill that it follows?"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from kvmerge.hook import forward, hooked
from kvmerge.session import COMPRESSION, session_for
from scripts.bench.measure import Bench, Report, Stopwatch

_CELLS = (
    "kvmerger@0.5",
    "kvmerger@0.35",
    "kvmerger:linkage=complete@0.35",
    "kvmerger:linkage=adjacent@0.35",
    "h2o@0.35",
    "cam@0.35",
    "snapkv@0.35",
    "d2o@0.35",
    "ada_snapkv@0.35",
    "key_norm@0.35",
    "keydiff@0.35",
    "lagkv@0.35",
    "chunkkv@0.35",
    "expected_attention@0.35",
    "replay@0.35",
    "look_m@0.35",
    "keepkv@0.35",
    "zsmerge@0.35",
    "adjacent_merge_ours@0.35",
    "attention_matching@0.35",
    "fold:keep=snapkv@0.35",
    "fold:keep=snapkv,route=cosine@0.35",
    "fold:keep=snapkv,route=attention@0.35",
    "fold:keep=snapkv,fold=drop,refit=values@0.35",
    "fold:keep=snapkv,fold=drop,refit=bias@0.35",
)


def compression(bench: Bench, length: int = 4096) -> Report:
    """Measure the share of a prefill's time that each method spends in `compress`, all layers."""
    ids = bench.prompt(length)
    rows: list[dict[str, Any]] = []
    raw: dict[str, list[list[float]]] = {}
    for cell in _CELLS:
        readings = [_shares(bench, ids, cell) for _ in range(bench.repeats + 1)][1:]
        inside, whole = (statistics.median(column) for column in zip(*readings, strict=True))
        share = statistics.median(a / b for a, b in readings)
        raw[cell] = [list(reading) for reading in readings]
        rows.append(
            {
                "cell": cell,
                "compress s": round(inside, 3),
                "prefill s": round(whole, 3),
                "share of the prefill %": round(100 * share, 1),
            }
        )
    return Report(
        "compression",
        f"Compressing {length:,} tokens, all layers",
        "Time inside the method, against the whole prefill that it is part of (scores included).",
        rows,
        "KVMerger under 5%",
        {"seconds": raw},
    )


@torch.inference_mode()
def _shares(bench: Bench, ids: torch.Tensor, cell: str) -> tuple[float, float]:
    """Return the seconds inside the method, and of the whole prefill."""
    watch = Stopwatch()
    with hooked(bench.model):
        session = session_for(bench.model, bench.rows([cell]), ["bench"], stages=watch)
        session.begin([ids.shape[1]], 1)
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        started = time.perf_counter()
        forward(bench.model, session, ids, positions, logits_to_keep=1)
        return watch.seconds[COMPRESSION], time.perf_counter() - started
