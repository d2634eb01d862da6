"""Tiny random models of every family; the rest is what the contract itself is tried on."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import settings
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvmerge.check.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    SETTINGS,
    VOCABULARY,
    AnySession,
    generator,
    layer,
    normal,
    prompt,
    random_model,
    replayed,
)

__all__ = [
    "HEADS",
    "HEAD_DIM",
    "LAYERS",
    "SETTINGS",
    "VOCABULARY",
    "AnySession",
    "generator",
    "layer",
    "normal",
    "prompt",
    "replayed",
]

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}

quick = settings(max_examples=40, deadline=None, derandomize=True)
"""Property tests: the same examples on every run, few enough for every commit."""


def new_model(family: str = "llama", kv_heads: int = 2, **changes: object) -> PreTrainedModel:
    """A model of its own for a test that changes it. Its weights are large: attention is uneven."""
    config_class, model_class = FAMILIES[family]
    config = config_class(**(SETTINGS | {"num_key_value_heads": kv_heads} | changes))
    return random_model(lambda: model_class(config))


_OWN_NAMES = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": HEADS * HEAD_DIM, "init_std": 0.3},
}
"""Settings that a family calls otherwise."""


def any_model(kind: str, **changes: object) -> PreTrainedModel:
    """A model of any supported type, its own; those with local layers have one that sees all."""
    settings_ = SETTINGS | {"num_key_value_heads": 2} | _OWN_NAMES.get(kind, {})
    usual = AutoConfig.for_model(kind)
    if "sliding_attention" in (getattr(usual, "layer_types", None) or ()) and kind != "mistral":
        kinds = ["sliding_attention"] * 3 + ["full_attention"]
        settings_ |= {"num_hidden_layers": 4, "sliding_window": 16, "layer_types": kinds}
    if kind == "gemma2":
        settings_ |= {"attn_logit_softcapping": 3.0}  # low, so that it is felt
    config = AutoConfig.for_model(kind, **(settings_ | changes))
    return random_model(lambda: AutoModelForCausalLM.from_config(config))


@cache
def shared_model(family: str = "llama", kv_heads: int = 2, dtype: str = "float32") -> PreTrainedModel:
    """A model that no test may change."""
    return new_model(family, kv_heads).to(getattr(torch, dtype))
