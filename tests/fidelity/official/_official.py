"""Running the authors' attention classes inside a current model, and giving them our draws.

Their code was written for transformers 4.28 to 4.33. Its attention modules take a cache of tuples and a
rotary embedding that is called with a length; here they are hosted in the layers of a current Llama,
whose weights they take over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from kvmerge.session import seeded_generator
from tests.fidelity.official import _inputs


class Rotary(nn.Module):
    """The rotary embedding with the interface of transformers 4.28."""

    def __init__(
        self, dim: int, max_position_embeddings: int = 2048, base: float = 10000.0, device: Any = None
    ) -> None:
        super().__init__()
        self.frequencies = base ** -(torch.arange(0, dim, 2).float() / dim)

    def forward(self, states: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(1, 1, seq_len, dim)`."""
        angles = torch.arange(seq_len).float()[:, None] * self.frequencies
        doubled = torch.cat([angles, angles], dim=-1)[None, None].to(states.dtype)
        return doubled.cos(), doubled.sin()


def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> list[Tensor]:
    """`apply_rotary_pos_emb` with the interface of transformers 4.28."""
    cos, sin = cos[0, 0][positions].unsqueeze(1), sin[0, 0][positions].unsqueeze(1)
    return [states * cos + turned(states) * sin for states in (queries, keys)]


def turned(states: Tensor) -> Tensor:
    """`rotate_half` of transformers."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


OLD_NAMES = {
    "LlamaConfig": object,
    "LlamaRotaryEmbedding": Rotary,
    "apply_rotary_pos_emb": rotate,
    "rotate_half": turned,
}
"""What the authors import from transformers, for `_extract.definitions`."""


def old_config(**settings: Any) -> SimpleNamespace:
    """The fields of a Llama configuration that the authors' classes read, for the tiny model."""
    fields = {
        "hidden_size": _inputs.HEADS * _inputs.HEAD_DIM,
        "num_attention_heads": _inputs.HEADS,
        "num_key_value_heads": _inputs.HEADS,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "pretraining_tp": 1,
    }
    return SimpleNamespace(**(fields | settings))


class Hosted(nn.Module):
    """One of the authors' attention modules in a layer of a current model."""

    def __init__(
        self, attention: nn.Module, layer_idx: int, first_drawn: int = 0, rolled: bool = False
    ) -> None:
        """Take over a module.

        Args:
            first_drawn: first token that it draws for, where it merges the prompt token by token.
            rolled: whether it expects positions in the cache, as its caller would have given them.
        """
        super().__init__()
        self.attention, self.layer_idx = attention, layer_idx
        self.first_drawn, self.rolled = first_drawn, rolled
        self.past: Sequence[Tensor] | None = None
        self.weights: Tensor | None = None
        self.step: int | None = None
        """Decode steps so far; None before the prefill."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Attend with the old interface, and keep the cache that comes back."""
        length = hidden_states.shape[1]
        stored = 0 if self.past is None else self.past[0].shape[2]
        if self.rolled:
            position_ids = torch.arange(stored, stored + length)[None]
        mask = torch.full((length, length), torch.finfo(hidden_states.dtype).min).triu(1)
        mask = nn.functional.pad(mask, (stored, 0))[None, None]
        generator = seeded_generator(0, "", self.layer_idx, self.step)
        draws = torch.rand(1, _inputs.HEADS, length, generator=generator)
        with drawing(draws[..., self.first_drawn if self.step is None else 0 :]):
            out, self.weights, self.past = self.attention(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids.clone(),
                past_key_value=self.past,
                output_attentions=True,
                use_cache=True,
            )
        self.step = 0 if self.step is None else self.step + 1
        return out, None

    def attended(self) -> Tensor:
        """The weights of the last pass, `(1, heads, n, stored)`."""
        assert self.weights is not None
        return self.weights

    def stored(self) -> Sequence[Tensor]:
        """Keys and values in the cache, `(1, heads, stored, head_dim)`."""
        assert self.past is not None
        return self.past


@contextlib.contextmanager
def drawing(draws: Tensor) -> Iterator[None]:
    """Let each call of `torch.bernoulli` use up the next of the draws `(1, heads, calls)`."""
    left = iter(draws.unbind(dim=-1))

    def bernoulli(chances: Tensor) -> Tensor:
        return (next(left).view(chances.shape) < chances).to(chances.dtype)

    with mock.patch("torch.bernoulli", bernoulli):
        yield


def host(build: Callable[[], nn.Module], **options: Any) -> tuple[LlamaForCausalLM, list[Hosted]]:
    """The tiny model with the authors' attention in its layers, and those; options of `Hosted`."""
    model = _inputs.tiny_llama()
    hosted = []
    for index, layer in enumerate(model.model.layers):
        attention = build()
        attention.load_state_dict(layer.self_attn.state_dict(), strict=False)
        hosted.append(Hosted(attention, index, **options))
        layer.self_attn = hosted[-1]
    return model, hosted


def run(
    model: LlamaForCausalLM, chunks: Sequence[int], after_chunk: Callable[[], None] | None = None
) -> Tensor:
    """Feed the tokens of `_inputs` in chunks, at their true positions.

    Returns:
        `(tokens, vocabulary)` logits after every token.
    """
    fed, begin, logits = _inputs.tokens(), 0, []
    for size in chunks:
        now = slice(begin, begin + size)
        positions = torch.arange(begin, begin + size)[None]
        logits.append(model(fed[:, now], position_ids=positions, use_cache=False).logits[0])
        begin += size
        if after_chunk is not None:
            after_chunk()
    return torch.cat(logits)
