"""Does a smaller cache make decoding faster, and how near to what its bytes allow?"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from harness.batching import entry_bytes
from kvmerge.engine import Comparison, Decoder
from kvmerge.hook import hooked
from scripts.bench.measure import Bench, Report, weight_bytes

_FULL, _CELLS = "full@1", ("kvmerger@0.35", "h2o@0.35", "cam@0.35")


def decode(bench: Bench, length: int, steps: int = 16) -> Report:
    """Time decode steps of one row at a time, and of the seven rows of a comparison."""
    ids = bench.prompt(length)
    batches = {cell: [cell] for cell in (_FULL, *_CELLS)} | {"seven rows": list(bench.cells)}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    fed = torch.tensor([[1]], device=bench.model.device)
    with hooked(bench.model), torch.inference_mode():
        comparisons = {}
        for name, cells in batches.items():
            comparisons[name] = Comparison(bench.model, bench.rows(cells), "bench")
            comparisons[name].prefill(ids, steps)
        for attempt in range(bench.repeats + 1):
            for name, comparison in comparisons.items():
                comparison.session.rewind()
                decoder = Decoder([comparison])
                tokens = fed.expand(len(comparison.rows), 1)
                started = time.perf_counter()
                for step in range(steps):
                    decoder.feed(tokens, step).argmax(-1).tolist()
                if attempt:
                    seconds[name].append((time.perf_counter() - started) / steps)
    weights = weight_bytes(bench.plain)
    rows: list[dict[str, Any]] = []
    for name, values in seconds.items():
        kept = [stats.kv_bytes for stats in comparisons[name].stats]
        full = length * entry_bytes(bench.model)
        speedup = statistics.median(a / b for a, b in zip(seconds[_FULL], values, strict=True))
        bound = (weights + full) / (weights + sum(kept))
        rows.append(
            {
                "cache": name,
                "KV MiB": round(sum(kept) / 2**20, 1),
                "ms a step": round(1e3 * statistics.median(values), 1),
                "speed-up over full": round(speedup, 3),
                "bound by bytes": round(bound, 3),
                "share of the bound": round(speedup / bound, 2),
            }
        )
    return Report(
        f"decode_{length}",
        f"Decoding after {length:,} tokens",
        f"{steps} steps after one prompt. The bound is (weights + full cache) / (weights + caches), "
        f"the bytes that a step reads; weights: {weights / 2**20:,.0f} MiB.",
        rows,
        "never slower than the full cache; at 8,000 tokens at least 0.85 of the bound",
        {"seconds": seconds},
    )
