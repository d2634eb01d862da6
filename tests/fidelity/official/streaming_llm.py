"""StreamingLLM: `StartRecentKVCache` and its rolled attention, after a prompt and 32 decode steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import PROMPT, STEPS, normal
from tests.fidelity.official._official import Rotary

REPOSITORY, REVISION = "mit-han-lab/streaming-llm", "2e50426"
SOURCE = "streaming_llm/kv_cache.py"
ATTENTION = "streaming_llm/pos_shift/modify_llama.py"
HEADS, KV_HEADS, HEAD_DIM, SINKS, RECENT = 4, 2, 8, 4, 10


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the prompt and the decode steps, before RoPE."""
    length = PROMPT + STEPS
    return (
        2 * normal(1, HEADS, length, HEAD_DIM, seed=0),
        normal(1, KV_HEADS, length, HEAD_DIM, seed=1),
        normal(1, KV_HEADS, length, HEAD_DIM, seed=2),
    )


def record(checkout: Path) -> dict[str, Any]:
    """Positions kept after the prompt and each step, and what the attention of each step gives."""
    cache = _extract.definitions(
        checkout / SOURCE,
        ["StartRecentKVCache", "slice1d", "slice2d", "slice3d"],
        DIM_TO_SLICE={2: lambda x, start, end: x[:, :, start:end, ...]},
    ).StartRecentKVCache(SINKS, RECENT)
    attention = _extract.definitions(
        checkout / ATTENTION,
        ["llama_pos_shift_attention_forward", "apply_rotary_pos_emb_single"],
        repeat_kv=repeat_kv,
        rotate_half=rotate_half,
    )
    module = _extract.attention_module(HEADS, KV_HEADS, HEAD_DIM, Rotary(HEAD_DIM))
    queries, keys, values = states()
    [past] = cache([[keys[:, :, :PROMPT], values[:, :, :PROMPT]]])
    kept, outputs = [_extract.positions_in(past[0], keys)[0]], []
    for step in range(PROMPT, PROMPT + STEPS):
        now = slice(step, step + 1)
        out, _, past = attention.llama_pos_shift_attention_forward(
            module,
            _extract.hidden(queries[:, :, now], keys[:, :, now], values[:, :, now]),
            position_ids=torch.tensor([[past[0].shape[2]]]),
            past_key_value=past,
            use_cache=True,
        )
        [past] = cache([past])
        outputs.append(out[0, 0])
        kept.append(_extract.positions_in(past[0], keys)[0])
        assert kept[-1] == _extract.positions_in(past[1], values)[0]
    return {
        "source": f"{SOURCE}: StartRecentKVCache; {ATTENTION}: llama_pos_shift_attention_forward",
        "positions": kept,
        "outputs": torch.stack(outputs),
    }
