"""Tiny random models and layers: what a rule is tried on, built in memory in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvmerge.engine import Comparison, Decoder
from kvmerge.method import PrefillLayer
from kvmerge.scores import column_sums
from kvmerge.softmax import plain

VOCABULARY = 97
LAYERS, HEADS, HEAD_DIM = 2, 4, 16
SETTINGS: dict[str, Any] = {
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


def random_model(make: Callable[[], Any]) -> PreTrainedModel:
    """Return what `make` makes, with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = make().eval()
    return model


def llama(kv_heads: int) -> PreTrainedModel:
    """Return a Llama of its own, of `LAYERS` layers and `HEADS` heads."""
    config = LlamaConfig(**(SETTINGS | {"num_key_value_heads": kv_heads}))
    return random_model(lambda: LlamaForCausalLM(config))


@cache
def shared(kv_heads: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a Llama that nobody may change; no token ends its answers, so their length is fixed."""
    model = llama(kv_heads)
    torch.nn.Module.to(model, dtype)
    # `generate` does not suppress an end token that it does not have
    model.generation_config.eos_token_id = None
    return model


@cache
def twins() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a grouped-query model whose query heads of a group are equal, and it with all heads."""
    grouped, full = llama(HEADS // 2), llama(HEADS)
    full.load_state_dict(
        {k: v for k, v in grouped.state_dict().items() if "k_proj" not in k and "v_proj" not in k},
        strict=False,
    )
    with torch.no_grad():
        for of_grouped, of_full in zip(grouped.model.layers, full.model.layers, strict=True):
            query = of_grouped.self_attn.q_proj.weight.unflatten(0, (2, 2, HEAD_DIM))
            query[:, 1] = query[:, 0]
            of_full.self_attn.q_proj.weight.copy_(of_grouped.self_attn.q_proj.weight)
            for name in ("k_proj", "v_proj"):
                of_group = getattr(of_grouped.self_attn, name).weight.unflatten(0, (2, HEAD_DIM))
                repeated = of_group.repeat_interleave(2, dim=0).flatten(0, 1)
                getattr(of_full.self_attn, name).weight.copy_(repeated)
    return grouped, full


def prompt(length: int, seed: int = 0) -> Tensor:
    """Return `(1, length)` token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (1, length), generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    """Return a seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers of a shape."""
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
    """Return a finished prefill layer of random states, with its own column sums or those given."""
    queries = normal(1, kv_heads * group, length, head_dim, seed=seed)
    keys = normal(1, kv_heads, length, head_dim, seed=seed + 1)
    values = normal(1, kv_heads, length, head_dim, seed=seed + 2)
    if scores is None:
        scores = column_sums(queries, keys)
    return PrefillLayer(queries, keys, values, scores, 0, LAYERS, plain(head_dim))


class AnySession:
    """What a session that takes no part in proofs need not look at."""

    def place(self, positions: Tensor | None) -> None:
        """Take the positions of new tokens."""

    def passed(self) -> None:
        """Take note that a forward pass has ended."""


def replayed(comparison: Comparison, text: Sequence[int]) -> Tensor:
    """Return `(rows, n, vocabulary)` logits of one comparison along a text, without its first token."""
    return torch.cat([parts[0] for parts in Decoder([comparison]).replay([text])], dim=1)
