"""How do time and memory grow with the prompt, and with the number of cells?"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from kvmerge.kernels.attention import attention_and_scores, prefill_attention
from kvmerge.models import attention_sizes
from kvmerge.scores import column_sums
from kvmerge.softmax import plain
from scripts.bench.measure import Bench, LiveBytes, Report, in_turn, random_states, ratio

LENGTHS = (512, 1024, 2048, 4096, 8000)
SCORES_ONLY = 32_768
CELLS = (1, 2, 4, 7, 10, 14)
_MORE = ("streaming_llm", "snapkv", "tova", "random", "pivot_only", "meanpool_sets", "kvmerger_log")


@torch.inference_mode()
def by_length(bench: Bench) -> Report:
    """Time attention and column sums of one layer, and count the bytes that the sums need."""
    heads, kv_heads, head_dim = attention_sizes(bench.model.config)
    softmax = plain(head_dim)
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for length in (*LENGTHS, SCORES_ONLY):
        states = random_states(heads, kv_heads, length, head_dim, torch.float32, "cpu")
        _, lse = prefill_attention(*states, softmax.scale)
        ways: dict[str, Callable[[], object]] = {
            "torch's attention": partial(prefill_attention, *states, softmax.scale),
            "column sums alone": partial(column_sums, *states[:2], lse, softmax=softmax),
            "attention with sums": partial(attention_and_scores, *states, softmax, scored=True),
        }
        seconds = in_turn(ways, bench.repeats if length < SCORES_ONLY else 1)
        with LiveBytes() as live:
            ways["attention with sums"]()
        raw[str(length)] = seconds
        rows.append(
            {
                "tokens": length,
                **{f"{name} s": round(statistics.median(of), 4) for name, of in seconds.items()},
                "with sums : torch's": round(
                    ratio(seconds["attention with sums"], seconds["torch's attention"]), 2
                ),
                "its memory MiB": round(live.peak / 2**20, 1),
                "the map MiB": round(4 * heads * length**2 / 2**20, 1),
            }
        )
    return Report(
        "scaling_length",
        "One layer's attention and column sums, by prompt length",
        f"Random states of the model's shape ({heads} query and {kv_heads} KV heads of {head_dim}), "
        f"float32; one reading at {SCORES_ONLY:,} tokens. Memory: largest total of what attention with "
        "sums allocates, its output included.",
        rows,
        "linear memory",
        raw,
    )


def by_cells(bench: Bench, length: int = 2048, tokens: int = 32) -> Report:
    """Time one sample with 1 to 14 cells."""
    pool = [*bench.cells, *(f"{name}@0.35" for name in _MORE)]
    ids = [bench.prompt(length)]
    rows_of = {str(count): bench.rows(pool[:count]) for count in CELLS}
    seconds = bench.in_turn(
        {name: partial(bench.run, ids, rows, tokens) for name, rows in rows_of.items()}
    )
    table = [
        {
            "cells": int(name),
            "median s": round(statistics.median(values), 3),
            "ratio to one cell": round(ratio(values, seconds["1"]), 3),
        }
        for name, values in seconds.items()
    ]
    return Report(
        "scaling_cells",
        "One sample, by the number of cells",
        f"A prompt of {length:,} tokens, {tokens} answer tokens, fidelity off. The first cell is the "
        "full cache alone.",
        table,
        "close to flat",
        {"seconds": seconds, "cells": pool},
    )


def picture(reports: Sequence[Report]) -> dict[str, bytes]:
    """Draw both scalings; PNG and PDF by file name."""
    by_name = {report.name: report for report in reports}
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        lengths = by_name["scaling_length"].rows
        for key, colour in (
            ("torch's attention s", "#0072B2"),
            ("column sums alone s", "#D55E00"),
            ("attention with sums s", "#009E73"),
        ):
            left.loglog(
                [row["tokens"] for row in lengths],
                [row[key] for row in lengths],
                "o-",
                color=colour,
                label=key.removesuffix(" s"),
            )
        left.set(xlabel="prompt tokens", ylabel="seconds a layer")
        left.legend(frameon=False)
        cells = by_name["scaling_cells"].rows
        right.plot(
            [row["cells"] for row in cells],
            [row["ratio to one cell"] for row in cells],
            "o-",
            color="#009E73",
        )
        right.set(xlabel="cells", ylabel="time, one cell = 1", ylim=(0, None))
        files = {}
        for ending in ("png", "pdf"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=150)
            files[f"scaling.{ending}"] = buffer.getvalue()
    return files
