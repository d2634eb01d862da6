"""What zyxxmu/cam gives: its merging of a prompt, while decoding under a mask, and token by token."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.fidelity.official import _extract, _inputs, _official

REPOSITORY = "zyxxmu/cam"
REVISION = "fc80e64f460b343be96c87596f2494fc9d319c45"

SIZES = [(4, 6), (1, 20), (0, 9)]
"""Sinks and recent tokens of the merging of a prompt."""
MASKED_SIZES = [(10, 10), (2, 36), (20, 20)]
"""The same under the mask: fewer receivers than 32, all of them, and a budget that holds the prompt."""
STREAMED_SIZES = [(4, 12), (2, 24)]
"""The same token by token: fewer receivers than 16, and all of them."""


def record(checkout: Path) -> dict[str, Any]:
    """Merged values, masks, scores and logits."""
    one_pass, masked = (
        _extract.definitions(
            checkout / "cam_hf" / folder / "modify_llama_cam.py",
            ["local_cam_mask", "LlamaAttention_cam"],
            **_official.OLD_NAMES,
        )
        for folder in ("utils_lm_eval", "utils_hh")
    )
    found: dict[str, Any] = {}
    for start, recent in SIZES:
        with _official.drawing(draws()[..., start:]):
            merged = one_pass.local_cam_mask(
                prompt_values(), _inputs.attention_map(banded_logits(start, recent)), start, recent
            )
        found[f"pass_{start}_{recent}"] = merged[0]
    start, recent = SIZES[0]
    merging = partial(one_pass.LlamaAttention_cam, _config(start, recent, merge_token=True))
    model, hosted = _official.host(merging, first_drawn=start)
    _official.run(model, [_inputs.PROMPT])
    found["pass_first_layer"] = hosted[0].stored()[1][0]
    for start, recent in MASKED_SIZES:
        model, hosted = _official.host(partial(masked.LlamaAttention_cam, _config(start, recent)))
        logits = _official.run(model, [_inputs.PROMPT, *[1] * _inputs.STEPS])
        found[f"masked_{start}_{recent}"] = {
            "logits": logits[_inputs.PROMPT - 1 :],
            "values": hosted[1].stored()[1][0, :, -recent:],
        }
    folder = checkout / "generate_task" / "streaming_llm"
    slices = _extract.definitions(folder / "kv_cache_cam.py", ["slice2d", "slicev"])
    cache = _extract.definitions(
        folder / "kv_cache_cam.py",
        ["StartRecentKVCache_cam"],
        DIM_TO_SLICE={2: slices.slice2d, 4: slices.slicev},
    ).StartRecentKVCache_cam
    shifted = _extract.definitions(
        folder / "pos_shift" / "modify_llama_cam.py",
        ["llama_pos_shift_attention_forward", "apply_rotary_pos_emb_single", "repeat_kv"],
        **_official.OLD_NAMES,
    )
    for start, recent in STREAMED_SIZES:
        found[f"streamed_prompt_{start}_{recent}"] = _streamed(cache(start, recent), start, recent)
        build = _shifted(shifted.llama_pos_shift_attention_forward, cache, start, recent)
        model, hosted = _official.host(build, rolled=True)
        logits = _official.run(model, [1] * (_inputs.PROMPT + _inputs.STEPS))
        attention: Any = hosted[1].attention
        found[f"streamed_{start}_{recent}"] = {
            "logits": logits[_inputs.PROMPT - 1 :],
            "values": hosted[1].stored()[1][0],
            "scores": attention.kv_cache.accum_attn[0, :, 0],
        }
    return found


def prompt_values() -> Tensor:
    """Values of a prompt."""
    return _inputs.normal(1, _inputs.HEADS, _inputs.PROMPT, 2, seed=11)


def banded_logits(start: int, recent: int) -> Tensor:
    """Attention logits of a prompt whose rows see the sinks, themselves and `recent` tokens before."""
    logits = _inputs.attention_logits(_inputs.HEADS, _inputs.PROMPT, seed=12)
    tokens = torch.arange(_inputs.PROMPT)
    hidden = (tokens >= start) & (tokens[:, None] - tokens > recent)
    return logits.masked_fill(hidden, torch.finfo(torch.float32).min)


def draws() -> Tensor:
    """Uniform numbers, one for each head and token of the prompt."""
    generator = torch.Generator().manual_seed(13)
    return torch.rand(1, _inputs.HEADS, _inputs.PROMPT, generator=generator)


def _config(start: int, recent: int, **more: Any) -> Any:
    shares = {"start_ratio": start / _inputs.PROMPT, "recent_ratio": recent / _inputs.PROMPT}
    return _official.old_config(**shares, **more)


def _streamed(cache: Any, start: int, recent: int) -> dict[str, Any]:
    """Feed a prompt to the cache token by token, its attention given by logits."""
    weights = _inputs.attention_map(banded_logits(start, recent))
    values, stored = prompt_values(), torch.arange(0)
    past = [values[:, :, :0], values[:, :, :0]]
    for token in range(_inputs.PROMPT):
        stored = torch.cat([stored, torch.tensor([token])])
        past = [torch.cat([kept, values[:, :, token : token + 1]], dim=2) for kept in past]
        with _official.drawing(draws()[..., max(0, token - recent) :]):
            past = cache(weights[:, :, token : token + 1, stored], past)
        if len(stored) > start + recent:
            stored = torch.cat([stored[:start], stored[start + 1 :]])
    return {"values": past[1][0], "scores": cache.accum_attn[0, :, 0]}


def _shifted(forward: Any, cache: Any, start: int, recent: int) -> Callable[[], nn.Module]:
    """Builds what the authors' forward needs of a Llama attention module."""

    def build() -> nn.Module:
        module: Any = nn.Module()
        width = _inputs.HEADS * _inputs.HEAD_DIM
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module.add_module(name, nn.Linear(width, width, bias=False))
        module.config = _official.old_config()
        module.num_heads = module.num_key_value_heads = _inputs.HEADS
        module.num_key_value_groups, module.head_dim, module.hidden_size = 1, _inputs.HEAD_DIM, width
        module.rotary_emb = _official.Rotary(_inputs.HEAD_DIM)
        module.kv_cache = cache(start, recent)
        module.forward = types.MethodType(forward, module)
        return module

    return build
