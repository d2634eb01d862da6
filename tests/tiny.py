"""Tiny random models and layers: everything a test needs, built in memory in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from hypothesis import settings
from torch import Tensor
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

from kvmerge.engine import Comparison, Decoder
from kvmerge.method import PrefillLayer
from kvmerge.scores import column_sums
from kvmerge.softmax import plain

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
VOCABULARY = 97
LAYERS, HEADS, HEAD_DIM = 2, 4, 16

SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of every model: weights are large, so that attention is uneven."""

quick = settings(max_examples=40, deadline=None, derandomize=True)
"""Property tests: the same examples on every run, few enough for every commit."""


def new_model(family: str = "llama", kv_heads: int = 2, **changes: object) -> PreTrainedModel:
    """A model of its own for a test that changes it. Its weights are large: attention is uneven."""
    config_class, model_class = FAMILIES[family]
    settings_ = SETTINGS | {"num_key_value_heads": kv_heads}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**(settings_ | changes))).eval()


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@cache
def shared_model(family: str = "llama", kv_heads: int = 2, dtype: str = "float32") -> PreTrainedModel:
    """A model that no test may change."""
    return new_model(family, kv_heads).to(getattr(torch, dtype))


def prompt(length: int, seed: int = 0) -> Tensor:
    """`(1, length)` token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (1, length), generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def layer(
    length: int = 40,
    *,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 8,
    seed: int = 0,
    scores: Tensor | None = None,
) -> PrefillLayer:
    """A finished prefill layer of random states, with its own column sums unless given others."""
    queries = normal(1, kv_heads * group, length, head_dim, seed=seed)
    keys = normal(1, kv_heads, length, head_dim, seed=seed + 1)
    values = normal(1, kv_heads, length, head_dim, seed=seed + 2)
    if scores is None:
        scores = column_sums(queries, keys)
    return PrefillLayer(queries, keys, values, scores, 0, LAYERS, plain(head_dim))


class AnySession:
    """What a session of a test's own need not look at."""

    def place(self, positions: Tensor | None) -> None:
        pass

    def passed(self) -> None:
        pass


def replayed(comparison: Comparison, text: Sequence[int]) -> Tensor:
    """`(rows, n, vocabulary)` logits of one comparison along a text, its first token left out."""
    return torch.cat([parts[0] for parts in Decoder([comparison]).replay([text])], dim=1)
