"""Where does one sample's time go?"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from kvmerge import session
from kvmerge.cache import LayerCache
from kvmerge.engine import Stop, run_sample
from scripts.bench.measure import Bench, Report

_ATTENTION, _COMPRESS, _CACHE = "attention with scores", "compressing", "attention over the caches"


def stages(bench: Bench, length: int = 3500, tokens: int = 64) -> Report:
    """Time the engine's own stages of one sample with seven cells; the rest is the model's."""
    ids, rows = bench.prompt(length), bench.rows(bench.cells)
    readings = []
    for _ in range(bench.repeats + 1):
        with _timed_stages() as inside:
            _, timing = run_sample(bench.model, ids, rows, Stop(tokens, frozenset()))
        readings.append(
            {
                f"prefill: {_ATTENTION}": inside[_ATTENTION],
                f"prefill: {_COMPRESS}": inside[_COMPRESS],
                "prefill: the rest of the model": timing.prefill
                - inside[_ATTENTION]
                - inside[_COMPRESS],
                f"decode: {_CACHE}": inside[_CACHE],
                "decode: the rest of the model": timing.decode - inside[_CACHE],
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


@contextlib.contextmanager
def _timed_stages() -> Iterator[dict[str, float]]:
    """Seconds inside the engine's stages while the block runs, by stage."""
    inside: dict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*arguments: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **more)
            finally:
                inside[stage] += time.perf_counter() - started

        return wrapper

    with contextlib.ExitStack() as patches:
        for stage, owner, name in (
            (_ATTENTION, session, "attention_and_scores"),
            (_COMPRESS, session.CacheSession, "_compress"),
            (_CACHE, LayerCache, "attend"),
        ):
            patches.enter_context(mock.patch.object(owner, name, timed(stage, getattr(owner, name))))
        yield inside
