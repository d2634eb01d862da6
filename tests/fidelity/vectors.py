"""What the authors' code gave, and this project's side of the comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvmerge.cache import SteppedRow
from kvmerge.hook import forward, hooked
from kvmerge.method import Entries
from kvmerge.rope import Rope
from kvmerge.session import DEFAULT_POLICY, CacheSession, Policy, Row, session_for
from kvmerge.softmax import plain
from tests.fidelity.official import _inputs


def recorded(family: str) -> dict[str, Any]:
    """The record of a family, as `tests.fidelity.record` wrote it."""
    path = Path(__file__).with_name(f"{family}.json")
    return json.loads(path.read_text(encoding="utf-8"))


class Replay:
    """One row that is handed given queries, keys and values of several layers."""

    def __init__(
        self,
        row: Row,
        states: list[tuple[Tensor, Tensor, Tensor]],
        prompt: int,
        rope: Rope | None = None,
        policy: Policy = DEFAULT_POLICY,
    ):
        """Run the prompt; `states` of each layer are `(1, heads, tokens, head_dim)`, after RoPE."""
        self.states, self.position = states, prompt
        self.session = CacheSession([row], len(states), rope=rope, policy=policy)
        self.session.begin([prompt], capacity=8)
        self._attend(slice(0, prompt))

    def step(self) -> list[Tensor]:
        """Feed one more token: the attention output `(heads, head_dim)` of each layer."""
        self.position += 1
        return self._attend(slice(self.position - 1, self.position))

    def _attend(self, now: slice) -> list[Tensor]:
        outputs = []
        for layer_idx, layer in enumerate(self.states):
            queries, keys, values = (state[:, :, now] for state in layer)
            softmax = plain(queries.shape[-1])
            out = self.session.attend(layer_idx, queries, keys, values, softmax)
            outputs.append(out[0, :, -1])
        return outputs

    def entries(self, layer_idx: int = 0) -> Entries:
        """What a layer stores now."""
        [group] = self.session.layers[layer_idx].groups
        assert isinstance(group, SteppedRow)
        return group.entries


class TinyRun:
    """One row on the tiny model, fed the recorded prompt and the tokens after it one at a time."""

    def __init__(self, row: Row, policy: Policy = DEFAULT_POLICY) -> None:
        self.model = _inputs.tiny_llama()
        self.session = session_for(self.model, [row], [""], policy=policy)

    @torch.inference_mode()
    def logits(self, watch: Callable[[], None] | None = None) -> Tensor:
        """`(steps + 1, vocabulary)` after the prompt and each token; `watch` is called after each."""
        tokens, found = _inputs.tokens(), []
        self.session.begin([_inputs.PROMPT], capacity=_inputs.STEPS)
        ends = range(_inputs.PROMPT, tokens.shape[1] + 1)
        with hooked(self.model):
            for begin, end in zip([0, *ends], ends, strict=False):
                positions = torch.arange(begin, end)[None]
                out = forward(self.model, self.session, tokens[:, begin:end], positions)
                found.append(out[0, -1])
                if watch is not None:
                    watch()
        return torch.stack(found)

    def entries(self, layer_idx: int = 0) -> Entries:
        """What a layer stores now, for rows that act while decoding."""
        [group] = self.session.layers[layer_idx].groups
        assert isinstance(group, SteppedRow)
        return group.entries


def positions(entries: Entries) -> list[list[int]]:
    """Positions of each KV head."""
    return entries.positions[0].tolist()


def close(found: Tensor, wanted: Any, tolerance: float = 2e-5) -> None:
    """Equal up to float32 rounding; JSON keeps eight digits."""
    wanted = torch.as_tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
