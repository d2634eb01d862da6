"""What FMInference/H2O gives: its real drop, its decoding mask and its single-pass mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.fidelity.official import _extract, _inputs, _official

REPOSITORY = "FMInference/H2O"
REVISION = "ac75c2a8a9e76832b2a4139b9363373b56336bfb"

SIZES = {"float32": [(6, 10), (10, 6), (0, 8), (8, 0)], "float16": [(6, 10), (10, 6)]}
"""Heavy hitters and recent tokens of the runs on tensors."""
CHECKED = [0, 1, 2, 4, 8, 16, _inputs.STEPS]
"""Decode steps after which those runs are compared."""
HEAVY = RECENT = 10
"""The same, of the runs on the tiny model: a quarter of the prompt each."""


def record(checkout: Path) -> dict[str, Any]:
    """Kept tokens, scores, masks and logits."""
    drop = _definitions(
        checkout / "h2o_hf" / "utils_real_drop",
        "H2OKVCache_LayerWise",
        "H2OLlamaAttention",
        "H2OLlamaAttention_streaming",
        "_make_causal_mask",
        "apply_rotary_pos_emb_single",
        "repeat_kv",
    )
    decode = _definitions(checkout / "h2o_hf" / "utils_hh", "LlamaAttention_heavy_hitter")
    one_pass = _definitions(
        checkout / "h2o_hf" / "utils_lm_eval",
        "LlamaAttention_heavy_hitter",
        "local_heavy_hitter_mask",
    )
    sizes = _official.old_config(hh_size=HEAVY, recent_size=RECENT)
    shares = _official.old_config(
        heavy_ratio=HEAVY / _inputs.PROMPT, recent_ratio=RECENT / _inputs.PROMPT
    )
    found: dict[str, Any] = {}
    for dtype, pairs in SIZES.items():
        for heavy, recent in pairs:
            cache = drop.H2OKVCache_LayerWise(heavy, recent)
            found[f"drop_{heavy}_{recent}_{dtype}"] = _dropped(cache, getattr(torch, dtype))
    steps = [_inputs.PROMPT, *[1] * _inputs.STEPS]
    model, _ = _official.host(lambda: drop.H2OLlamaAttention(sizes))
    found["drop_logits"] = _official.run(model, steps)[_inputs.PROMPT - 1 :]
    model, _ = _official.host(lambda: drop.H2OLlamaAttention_streaming(sizes))
    found["drop_rolled_logits"] = _official.run(model, steps)[_inputs.PROMPT - 1 :]
    found |= _masked(lambda: decode.LlamaAttention_heavy_hitter(shares), steps)
    model, hosted = _official.host(lambda: one_pass.LlamaAttention_heavy_hitter(shares))
    found["pass_logits"] = _official.run(model, [_inputs.PROMPT])
    found["pass_seen"] = [_bits(layer.attended()[0] > 0) for layer in hosted]
    future = torch.ones(_inputs.PROMPT, _inputs.PROMPT, dtype=torch.bool).triu(1)
    masked = prompt_logits().masked_fill(future, torch.finfo(torch.float32).min)
    hitters = one_pass.local_heavy_hitter_mask(masked, HEAVY)
    found["local_seen"] = _bits(hitters[0].tril())
    return found


def prompt_logits() -> Tensor:
    """Attention logits of a prompt."""
    return _inputs.attention_logits(_inputs.HEADS, _inputs.PROMPT, seed=3)


def _definitions(folder: Path, *names: str) -> Any:
    return _extract.definitions(folder / "modify_llama.py", names, **_official.OLD_NAMES)


def _dropped(cache: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Feed a map and then rows to the cache; keys and values carry the token's position."""
    heads, length = _inputs.HEADS, _inputs.PROMPT
    weights = _inputs.attention_map(prompt_logits()).to(dtype)
    tokens = torch.arange(length).view(1, 1, -1, 1).expand(1, heads, -1, 2)
    past = cache((tokens, tokens), weights)
    kept = [past[0][0, :, :, 0]]
    for step in range(_inputs.STEPS):
        new = torch.full((1, heads, 1, 2), length + step)
        past = [torch.cat([states, new], dim=2) for states in past]
        row = _inputs.attention_row(heads, past[0].shape[2], seed=100 + step).to(dtype)
        past = cache(past, row.unsqueeze(2))
        if step + 1 in CHECKED:
            kept.append(past[0][0, :, :, 0])
    return {"kept": torch.stack(kept), "scores": cache.hh_score.float()}


def _masked(build: Callable[[], nn.Module], steps: list[int]) -> dict[str, Any]:
    """Logits of the decoding mask, and the first layer's mask and scores after each step."""
    model, hosted = _official.host(build)
    seen: list[list[str]] = []

    def watch() -> None:
        attention: Any = hosted[0].attention
        seen.append(_bits(attention.attention_masks_next[0, :, 0] > 0))

    logits = _official.run(model, steps, watch)[_inputs.PROMPT - 1 :]
    scores = [layer.attention.previous_scores for layer in hosted]
    return {"mask_logits": logits, "mask_seen": seen, "mask_scores": scores}


def _bits(visible: Tensor) -> Any:
    """A mask as text, a line of 0 and 1 for its last axis."""
    if visible.dim() == 1:
        return "".join("1" if each else "0" for each in visible.tolist())
    return [_bits(part) for part in visible]
