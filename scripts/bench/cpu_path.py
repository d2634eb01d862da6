"""Which way through a prompt's attention is fastest on this processor, and which one is taken?"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvmerge.kernels import packed_linear, tiled
from kvmerge.kernels.attention import prefill_attention
from kvmerge.kernels.choice import VARIABLE
from kvmerge.models import attention_sizes
from kvmerge.scores import column_sums
from kvmerge.softmax import Softmax, plain
from scripts.bench.measure import Bench, Report, in_turn, random_states, ratio

LENGTHS = (512, 1024, 2048, 4096, 8000)
_BLOCKS = {"torch": "blocks, torch", "onednn": "blocks, oneDNN"}
_FUSED, _ALONE = "torch's kernel, then sums", "torch's kernel, no sums"


@torch.inference_mode()
def cpu_path(bench: Bench) -> Report:
    """Time every way to one layer's attention and sums, and show which one the engine takes."""
    heads, kv_heads, head_dim = attention_sizes(bench.model.config)
    softmax = plain(head_dim)
    blocks = dict(_BLOCKS)
    if not packed_linear.available(torch.empty(0)):
        del blocks["onednn"]
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for length in LENGTHS:
        states = random_states(heads, kv_heads, length, head_dim, torch.float32, "cpu")
        ways: dict[str, Callable[[], object]] = {
            name: partial(tiled.attend, *states, softmax, scored=True, products=products)
            for products, name in blocks.items()
        }
        ways[_FUSED] = partial(_fused, *states, softmax)
        ways[_ALONE] = partial(prefill_attention, *states, softmax.scale)
        seconds = in_turn(ways, bench.repeats)
        raw[str(length)] = seconds
        taken = _BLOCKS[tiled.faster_products(states[0])]
        best = min((name for name in ways if name != _ALONE), key=lambda name: min(seconds[name]))
        rows.append(
            {
                "tokens": length,
                **{f"{name} ms": _milliseconds(seconds[name]) for name in ways},
                "taken": taken,
                "its time : the best's": round(ratio(seconds[taken], seconds[best]), 2),
            }
        )
    return Report(
        "cpu_path",
        "One layer's attention and column sums on the CPU, by the way",
        f"Random states of the model's shape ({heads} query and {kv_heads} KV heads of {head_dim}), "
        f"float32. Taken: by {VARIABLE}, or by what was measured once on this machine.",
        rows,
        "the way taken is the best of those that give sums, within the machine's noise",
        {"seconds": raw},
    )


def _fused(queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attend by torch's own kernel, and sum columns from the log-sum-exp that it gives."""
    out, lse = prefill_attention(queries, keys, values, softmax.scale)
    return out, column_sums(queries, keys, lse, softmax=softmax)


def _milliseconds(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 1)
