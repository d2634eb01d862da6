"""Inputs that both sides of a comparison build from a seed: tensors, maps, and a tiny model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LAYERS, HEADS, HEAD_DIM = 31, 2, 4, 8
PROMPT, STEPS = 40, 32
"""Prompt tokens, and decode steps after them."""


def normal(*shape: int, seed: int) -> Tensor:
    """Float32 normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_logits(heads: int, length: int, *, seed: int) -> Tensor:
    """Logits `(1, heads, length, length)` of uneven columns, those of the future included."""
    return 2 * normal(1, heads, length, length, seed=seed)


def attention_map(logits: Tensor) -> Tensor:
    """The causal softmax map of such logits."""
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(dim=-1)


def attention_row(heads: int, length: int, *, seed: int) -> Tensor:
    """The weights `(1, heads, length)` of one new token."""
    return (2 * normal(1, heads, length, seed=seed)).softmax(dim=-1)


def tokens() -> Tensor:
    """`(1, PROMPT + STEPS)` token ids: a prompt and what is fed after it."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (1, PROMPT + STEPS), generator=generator)


def tiny_llama(kv_heads: int = HEADS) -> LlamaForCausalLM:
    """A float32 Llama of two layers, its weights drawn name by name."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:
                parameter.copy_(0.35 * normal(*parameter.shape, seed=seed))
    return model
