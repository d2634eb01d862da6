"""D2O: the whole method in five layers, and the earlier class that compresses the prompt itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from tests.fidelity.official import _extract
from tests.fidelity.official._inputs import PROMPT, STEPS, normal

REPOSITORY, REVISION = "AIoT-MLSys-Lab/D2O", "12c99d8"
FOLDER = "LLM_merge_new/LMEval_kv_token_merge"
HEADS, HEAD_DIM = 32, 128
"""The authors' code takes no others."""
LAYERS, RATIO = 5, 0.2
"""Heavy hitters and recent tokens, as a fraction of the prompt each."""
SHOWN = slice(0, HEADS, 8)
"""Heads whose numbers are recorded; all of them take part in the decisions."""


def states(layer_idx: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the prompt and the decode steps, with keys that resemble each other.

    Some heads attend less evenly than the others, more of them in later layers.
    """
    length, seed = PROMPT + STEPS, 10 * layer_idx
    sharp = torch.arange(heads) < (layer_idx + 1) * heads // (LAYERS + 1)
    sharpness = torch.where(sharp, 2.0, 0.5).view(1, heads, 1, 1)
    keys = normal(1, heads, length, HEAD_DIM, seed=seed + 1)
    common = normal(1, heads, 1, HEAD_DIM, seed=seed + 3)
    return (
        sharpness * normal(1, heads, length, HEAD_DIM, seed=seed),
        keys + common,
        normal(1, heads, length, HEAD_DIM, seed=seed + 2),
    )


def probe() -> Tensor:
    """A direction that states are projected on, so that few numbers show a change of any."""
    return normal(HEAD_DIM, seed=99) / HEAD_DIM**0.5


def record(checkout: Path) -> dict[str, Any]:
    """Run both."""
    return {
        "source": f"{FOLDER}/modeling_llama3_7b_13b_d2o.py: LlamaAttention3_D2O.forward, "
        "D2O_LayerKVCache; modeling_llama3_new.py: LlamaModel.forward (allocation); "
        "modeling_llama_drop_merge.py: H2OKVCache_LayerWise",
        "whole": whole(checkout / FOLDER),
        "prompt": prompt(checkout / FOLDER),
    }


def whole(folder: Path) -> dict[str, Any]:
    """Prompt, allocation, and decode steps of all layers through the authors' attention module."""
    official = _extract.definitions(
        folder / "modeling_llama3_7b_13b_d2o.py",
        [
            "D2O_LayerKVCache",
            "LlamaAttention3_D2O",
            "_make_causal_mask",
            "apply_rotary_pos_emb_single",
            "repeat_kv",
        ],
        LlamaConfig=object,
        rotate_half=rotate_half,
    )

    def unrotated(_: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        """RoPE that leaves states as they are: those given count as rotated already."""
        return torch.ones(1, 1, seq_len, HEAD_DIM), torch.zeros(1, 1, seq_len, HEAD_DIM)

    modules, pasts = [], []
    for layer_idx in range(LAYERS):
        module = _extract.attention_module(HEADS, HEADS, HEAD_DIM, unrotated)
        module.kv_cache = official.D2O_LayerKVCache(hh_ratio=RATIO, recent_ratio=RATIO)
        module.layer_idx, module.layer_nums = layer_idx, LAYERS
        module.uniform_hh_ratio = module.uniform_recent_ratio = RATIO
        module.layer_hh_ratio = module.layer_recent_ratio = module.prfill_size = 0
        modules.append(module)

    def forward(layer_idx: int, tokens: slice, past: Any) -> Any:
        parts = [each[:, :, tokens] for each in states(layer_idx)]
        return official.LlamaAttention3_D2O.forward(
            modules[layer_idx],
            _extract.hidden(*parts),
            position_ids=torch.arange(tokens.start, tokens.stop)[None],
            past_key_value=past,
            use_cache=True,
        )

    pasts = [forward(layer_idx, slice(0, PROMPT), None)[2] for layer_idx in range(LAYERS)]
    model = SimpleNamespace(
        layers=[SimpleNamespace(self_attn=module) for module in modules],
        config=SimpleNamespace(num_hidden_layers=LAYERS),
    )
    allocated = _extract.branch(
        folder / "modeling_llama3_new.py",
        ["LlamaModel", "forward"],
        "multimodal_entropy",
        self=model,
    )
    outputs: list[list[Tensor]] = []
    thresholds, lengths = [], []
    for step in range(PROMPT, PROMPT + STEPS):
        outputs.append([])
        for layer_idx in range(LAYERS):
            found = forward(layer_idx, slice(step, step + 1), pasts[layer_idx])
            pasts[layer_idx] = found[2]
            outputs[-1].append(found[0].view(HEADS, HEAD_DIM)[SHOWN] @ probe())
        thresholds.append([module.kv_cache.threshold for module in modules[2:-1]])
        lengths.append([past[0].shape[2] for past in pasts])
    return {
        "shares": allocated["dynamic_layer_ratios"],
        "lengths": [lengths[0], lengths[-1]],
        "thresholds": torch.tensor(thresholds),
        "outputs": torch.stack([torch.stack(layers[2:-1]) for layers in outputs]),
        "keys": [pasts[layer_idx][0][0, SHOWN] @ probe() for layer_idx in range(2, LAYERS - 1)],
        "values": [pasts[layer_idx][1][0, SHOWN] @ probe() for layer_idx in range(2, LAYERS - 1)],
    }


def prompt(folder: Path) -> dict[str, Any]:
    """The earlier class, which compresses the prompt and every step; one head, given twice.

    With equal heads it makes no difference that it decides for the n-th evicted token of all at once.
    """
    official = _extract.definitions(folder / "modeling_llama_drop_merge.py", ["H2OKVCache_LayerWise"])
    cache = official.H2OKVCache_LayerWise(hh_ratio=RATIO, recent_ratio=RATIO)
    queries, keys, values = (each.expand(-1, 2, -1, -1) for each in states(1, heads=1))
    now = slice(0, PROMPT)
    logits = queries[:, :, now] @ keys[:, :, now].transpose(2, 3) / HEAD_DIM**0.5
    future = torch.ones(PROMPT, PROMPT, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(future, -torch.inf).softmax(dim=-1)
    past = cache((keys[:, :, now], values[:, :, now]), weights)
    stored, thresholds = [past], [cache.threshold]
    for step in range(PROMPT, PROMPT + STEPS):
        now = slice(step, step + 1)
        grown_keys = torch.cat([past[0], keys[:, :, now]], dim=2)
        grown_values = torch.cat([past[1], values[:, :, now]], dim=2)
        weights = _extract.softmax_row(queries[:, :, now], grown_keys)
        past = cache((grown_keys, grown_values), weights)
        stored.append(past)
        thresholds.append(cache.threshold)
    return {
        "thresholds": torch.stack(thresholds),
        "keys": [past[0][0, 0] @ probe() for past in stored],
        "values": [past[1][0, 0] @ probe() for past in stored],
    }
