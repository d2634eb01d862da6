"""Where does one sample's time go?"""

from __future__ import annotations

import statistics

from kvmerge.engine import Stop, run_sample
from kvmerge.session import ATTENTION, CACHE, COMPRESSION
from scripts.bench.measure import Bench, Report, Stopwatch


def stages(bench: Bench, length: int = 3500, tokens: int = 64) -> Report:
    """Time the engine's own stages of one sample with seven cells; the rest is the model's."""
    ids, rows = bench.prompt(length), bench.rows(bench.cells)
    readings = []
    for _ in range(bench.repeats + 1):
        watch = Stopwatch()
        _, timing = run_sample(bench.model, ids, rows, Stop(tokens, frozenset()), stages=watch)
        inside = watch.seconds
        readings.append(
            {
                "prefill: attention with scores": inside[ATTENTION],
                "prefill: compressing": inside[COMPRESSION],
                "prefill: the rest of the model": timing.prefill
                - inside[ATTENTION]
                - inside[COMPRESSION],
                "decode: attention over the caches": inside[CACHE],
                "decode: the rest of the model": timing.decode - inside[CACHE],
            }
        )
    counted = readings[1:]
    medians = {stage: statistics.median(reading[stage] for reading in counted) for stage in counted[0]}
    total = sum(medians.values())
    return Report(
        "profile",
        "Where one sample's time goes",
        f"Seven cells, a prompt of {length:,} tokens, {tokens} answer tokens, fidelity off. The "
        "rest of the model is linear layers, norms and rotations.",
        [
            {"stage": stage, "s": round(value, 2), "share %": round(100 * value / total, 1)}
            for stage, value in medians.items()
        ],
        raw={"seconds": counted},
    )
