"""The engine as one would write it first: one row, one token at a time, plain attention, no buffers.

It shares with the engine the hook into the model and the methods themselves, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.cache import append_entry
from kvmerge.check.tiny import AnySession
from kvmerge.hook import forward, hooked
from kvmerge.method import Allowance, DecodeStep, Entries, PrefillLayer, keep_all
from kvmerge.rope import Rope
from kvmerge.session import DEFAULT_POLICY, Policy, Row, seeded_generator
from kvmerge.softmax import Softmax


@dataclass
class NaiveSession(AnySession):
    """One row's cache."""

    row: Row
    layers: int
    sample_id: str = ""
    rope: Rope | None = None
    policy: Policy = DEFAULT_POLICY
    length: int = 0
    entries: list[Entries] = field(default_factory=list)
    steps: int = 0

    def attend(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax
    ) -> Tensor:
        """Attend in one layer, as `kvmerge.hook` asks a session to."""
        scale = softmax.scale
        if layer_idx == len(self.entries):
            self.length = keys.shape[2]
            scores = map_column_sums(queries, keys, scale)
            layer = PrefillLayer(
                queries, keys, values, scores, layer_idx, self.layers, softmax, self.rope
            )
            self.entries.append(self._compress(layer))
            allowance = self._allowance(layer_idx)
            if self.row.method.alters_prefill and allowance.n_keep < self.length:
                visible = self.row.method.visible(layer, allowance)
                return masked_attention(queries, keys, values, scale, visible)
            return attend(queries[0], keys[0], values[0], scale)[None]
        stored = append_entry(self.entries[layer_idx], keys, values, self.length + self.steps)
        bias = None if stored.bias is None else stored.bias[0]
        out = attend(queries[0], stored.keys[0], stored.values[0], scale, bias)[None]
        if self.policy.decides(self.row.method):
            weights = last_row(queries, stored.keys, scale, bias)
            allowance = self._allowance(layer_idx, self.steps)
            step = DecodeStep(
                weights=weights,
                prompt_length=self.length,
                layer_idx=layer_idx,
                step=self.steps,
                allowance=allowance,
                rope=self.rope,
            )
            stored = self.row.method.hold(stored, step)
        self.entries[layer_idx] = stored
        self.steps += layer_idx == self.layers - 1
        return out

    def _compress(self, layer: PrefillLayer) -> Entries:
        allowance = self._allowance(layer.layer_idx)
        if allowance.n_keep >= self.length and not self.row.method.acts_on_decode:
            return keep_all(layer)
        return self.row.method.compress(layer, allowance)

    def _allowance(self, layer_idx: int, step: int | None = None) -> Allowance:
        generator = None
        if self.row.method.stochastic:
            generator = seeded_generator(self.row.seed, self.sample_id, layer_idx, step)
        allowed = self.policy.allowance(self.row.budget, self.length, layer_idx, self.layers)
        return Allowance(*allowed, generator)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention of `(heads, n, head_dim)` queries whose own keys are the last `n`, in plain torch."""
    heads, n_new, _ = queries.shape
    kv_heads, length, _ = keys.shape
    out = torch.empty_like(queries)
    for head in range(heads):
        kv_head = head * kv_heads // heads
        for i in range(n_new):
            end = length - n_new + i + 1
            logits = keys[kv_head, :end] @ queries[head, i] * scale
            if bias is not None:
                logits = logits + bias[kv_head, :end]
            out[head, i] = logits.softmax(-1) @ values[kv_head, :end]
    return out


def map_column_sums(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Column sums from the whole map in torch (the list version is too slow for a model)."""
    group = queries.shape[1] // keys.shape[1]
    logits = queries @ keys.repeat_interleave(group, dim=1).transpose(2, 3) * scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(future, -torch.inf).softmax(-1).sum(dim=2)
    return weights.unflatten(1, (keys.shape[1], group)).sum(dim=2)


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor
) -> Tensor:
    """Attention where each row sees only what `visible` `(1, kv_heads, T, T)` says."""
    group = queries.shape[1] // keys.shape[1]
    keys, values, visible = (t.repeat_interleave(group, dim=1) for t in (keys, values, visible))
    logits = queries @ keys.transpose(2, 3) * scale
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def last_row(queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention weights `(1, heads, n)` of the last query."""
    group = queries.shape[1] // keys.shape[1]
    logits = (queries[:, :, -1:] @ keys.repeat_interleave(group, 1).transpose(2, 3))[:, :, 0] * scale
    if bias is not None:
        logits = logits + bias.repeat_interleave(group, 0)
    return logits.softmax(-1)


@contextmanager
def session(
    model: PreTrainedModel, row: Row, sample_id: str = "", policy: Policy = DEFAULT_POLICY
) -> Iterator[NaiveSession]:
    """Let the model attend through the cache of one row inside the block."""
    rope = Rope.of(model) if row.method.needs_rope or policy.rolled else None
    with hooked(model), torch.inference_mode():
        yield NaiveSession(row, model.config.num_hidden_layers, sample_id, rope, policy)


def step_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    row: Row,
    answer: Sequence[int],
    sample_id: str = "",
    policy: Policy = DEFAULT_POLICY,
) -> Tensor:
    """Next-token logits `(len(answer) + 1, vocabulary)` after the prompt and each answer token."""
    length = input_ids.shape[1]
    with session(model, row, sample_id, policy) as naive:
        logits = [forward(model, naive, input_ids, torch.arange(length)[None])[0, -1]]
        for step, token in enumerate(answer):
            fed, position = torch.tensor([[token]]), torch.tensor([[length + step]])
            logits.append(forward(model, naive, fed, position)[0, -1])
        return torch.stack(logits)


def greedy(
    model: PreTrainedModel,
    input_ids: Tensor,
    row: Row,
    tokens: int,
    sample_id: str = "",
    policy: Policy = DEFAULT_POLICY,
) -> list[int]:
    """Return the greedy answer of `tokens` tokens, whatever they are."""
    length = input_ids.shape[1]
    answer: list[int] = []
    fed, positions = input_ids, torch.arange(length)[None]
    with session(model, row, sample_id, policy) as naive:
        while len(answer) < tokens:
            answer.append(int(forward(model, naive, fed, positions)[0, -1].argmax()))
            fed = torch.tensor([answer[-1:]])
            positions = torch.tensor([[length + len(answer) - 1]])
    return answer
