"""Beside a peer: kvpress, whose presses compress in a prefill of their own.

It is not a dependency. Where it is installed (`pip install --no-deps kvpress`) it runs in this process,
on the same samples and the same weights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from kvmerge.errors import UserError
from scripts.bench.measure import Bench, Report, against

_PLAIN = "plain SDPA prefill"
_SCORES = "kvpress ObservedAttentionPress (attention scores), 35%"


def peer(bench: Bench, length: int = 2048) -> Report:
    """Time prefills: plain, kvpress with attention scores and with SnapKV, and H2O here.

    Raises `UserError` where kvpress is not installed or does not fit the installed transformers.
    """
    try:
        kvpress = importlib.import_module("kvpress")
    except Exception as error:
        raise UserError(
            f"kvpress cannot be used here: {error}. Install it with `pip install --no-deps kvpress`, "
            "or in another environment, and run again."
        ) from error
    version = importlib.metadata.version("kvpress")
    ids = bench.prompt(length)
    rows = bench.rows(["h2o@0.35"])

    @torch.inference_mode()
    def pressed(press: Any, attention: str) -> None:
        model = bench.plain
        previous = model.config._attn_implementation
        model.set_attn_implementation(attention)
        try:
            with press(model) if press else contextlib.nullcontext():
                model(ids, use_cache=True, logits_to_keep=1)
        finally:
            model.set_attn_implementation(previous)

    actions: dict[str, Callable[[], object]] = {
        _PLAIN: lambda: pressed(None, "sdpa"),
        _SCORES: lambda: pressed(kvpress.ObservedAttentionPress(compression_ratio=0.65), "eager"),
        "kvpress SnapKVPress, 35%": lambda: pressed(
            kvpress.SnapKVPress(compression_ratio=0.65), "sdpa"
        ),
        "H2O here, 35%": lambda: bench.run([ids], rows, 1),
    }
    seconds = bench.in_turn(actions)
    return Report(
        "peer",
        f"Prefill of {length:,} tokens beside kvpress {version}",
        "One prompt, compressed to 35% of the cache. kvpress runs on plain transformers; its attention "
        "scores need eager attention.",
        against(seconds, _PLAIN),
        raw={"seconds": seconds},
    )
