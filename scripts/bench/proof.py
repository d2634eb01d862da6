"""What does it cost to prove, at every step, that compression reached attention?"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch

from kvmerge.engine import Comparison, Decoder
from kvmerge.hook import hooked
from kvmerge.proof import LayerProof, Proof
from scripts.bench.measure import Bench, Report


def proof(bench: Bench, length: int = 1000, steps: int = 16) -> Report:
    """Time the prefill and the decode steps of the seven rows of a comparison, proven and not."""
    ids = bench.prompt(length)
    fed = torch.tensor([[1]] * len(bench.cells), device=bench.model.device)
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "proven": contextlib.nullcontext,
        "not": unproven,
    }
    seconds: dict[str, dict[str, list[float]]] = {
        part: {way: [] for way in ways} for part in ("prefill", f"{steps} steps")
    }
    with hooked(bench.model), torch.inference_mode():
        for attempt in range(bench.repeats + 1):
            # who comes second finds other memory and clocks than who was first
            for way, entered in list(ways.items())[:: 1 if attempt % 2 else -1]:
                comparison = Comparison(bench.model, bench.rows(bench.cells), "bench")
                with entered():
                    started = time.process_time()
                    comparison.prefill(ids, steps).argmax(-1).tolist()
                    prefilled = time.process_time()
                    decoder = Decoder([comparison])
                    for step in range(steps):
                        decoder.feed(fed, step).argmax(-1).tolist()
                    decoded = time.process_time()
                del comparison, decoder  # before the next ones are made
                if attempt:
                    for part, spent in zip(
                        seconds, (prefilled - started, decoded - prefilled), strict=True
                    ):
                        seconds[part][way].append(spent)
    rows = []
    for part, by_way in seconds.items():
        ratios = [a / b for a, b in zip(by_way["proven"], by_way["not"], strict=True)]
        rows.append(
            {
                "part": part,
                "proven, s": round(statistics.median(by_way["proven"]), 3),
                "not proven, s": round(statistics.median(by_way["not"]), 3),
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    return Report(
        "proof",
        "Proving what attention reads",
        f"Seven rows after one prompt of {length:,} tokens, {steps} steps; the first compares what is "
        "read with what was stored.",
        rows,
        "at most 1.02",
        {"seconds": seconds},
    )


@contextlib.contextmanager
def unproven() -> Iterator[None]:
    """Prove nothing inside the block: attention tells nobody what it reads."""
    with (
        mock.patch.object(LayerProof, "read", return_value=None),
        mock.patch.object(Proof, "place", return_value=None),
        mock.patch.object(Proof, "passed", return_value={}),
    ):
        yield
