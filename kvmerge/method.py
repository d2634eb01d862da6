"""The interface of a cache method: what it is handed, and what it returns.

A method never sees the model or the tokenizer. It is handed one finished prefill layer and says
what stays in the cache. It keeps no state: what it must remember lives in what it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kvmerge import rows
from kvmerge.rope import Rope
from kvmerge.softmax import Softmax

Found = TypeVar("Found")


@dataclass(frozen=True)
class PrefillLayer:
    """One layer as the prefill leaves it. `T` prompt tokens, head `h` uses KV head `h // G`."""

    queries: Tensor
    """`(batch, heads, T, head_dim)`, after RoPE."""
    keys: Tensor
    """`(batch, kv_heads, T, head_dim)`, after RoPE."""
    values: Tensor
    """`(batch, kv_heads, T, head_dim)`."""
    scores: Tensor | None
    """`(batch, kv_heads, T)` float32 attention column sums; None for methods that need none."""
    layer_idx: int
    num_layers: int
    softmax: Softmax
    """How the layer turns products of queries and keys into weights."""
    rope: Rope | None = None
    """Moves keys between positions, for methods that declared `needs_rope`."""
    _found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def length(self) -> int:
        """Prompt tokens `T`."""
        return self.keys.shape[2]

    def once(self, question: Hashable, answer: Callable[[], Found]) -> Found:
        """Return what `answer` returns, called once a layer: what cells of one prompt ask alike.

        It lives as long as the layer, which is as long as the prefill where a method divides the budget
        across layers: something small, that does not hold the layer itself.

        Args:
            question: all that the answer depends on but the layer, and whose question it is.
            answer: computes it.
        """
        if question not in self._found:
            self._found[question] = answer()
        return self._found[question]

    def column_scores(self) -> Tensor:
        """Return the scores, for methods that declared `needs_scores`."""
        assert self.scores is not None, "a method that reads scores must set needs_scores = True"
        return self.scores


@dataclass(frozen=True)
class Allowance:
    """How much one method may keep of one layer."""

    n_keep: int
    """Entries per KV head, at least 1 and below the prompt length."""
    budget: float
    """The same as a fraction of the prompt, as requested."""
    generator: torch.Generator | None = None
    """Seeded by (seed, sample, layer); None where nothing may be random."""


@dataclass(frozen=True)
class Entries:
    """What stays of one layer, `n` entries per KV head, ascending by position."""

    keys: Tensor
    """`(batch, kv_heads, n, head_dim)`, in the cache's dtype."""
    values: Tensor
    """`(batch, kv_heads, n, head_dim)`, in the cache's dtype."""
    positions: Tensor
    """`(batch, kv_heads, n)` int64: the prompt position an entry answers to (a merged one: its
    pivot's)."""
    sizes: Tensor | None = None
    """`(batch, kv_heads, n)` int64 tokens merged into each entry; None means all 1."""
    bias: Tensor | None = None
    """`(batch, kv_heads, n)` float32 added to the attention logits of each entry; None means 0."""
    scores: Tensor | None = None
    """`(batch, kv_heads, n)` attention mass of each entry, for methods that go on deciding while
    decoding."""
    state: Tensor | None = None
    """`(batch,)` one more number that a method remembers from step to step."""
    next_bias: Tensor | None = None
    """`(batch, kv_heads)` bias that the next token's own entry gets, for methods that decide again at
    every step; None means 0."""

    @property
    def is_ragged(self) -> bool:
        """Whether KV heads hold different numbers of entries (padding has size 0)."""
        return self.sizes is not None and bool((self.sizes == 0).any())


@dataclass(frozen=True)
class DecodeStep:
    """What happened at one decode step of a layer, after its attention."""

    weights: Tensor
    """`(batch, heads, n)` float32 attention weights of the new token over the stored entries, its own
    last."""
    prompt_length: int
    """Prompt tokens `T`, which budgets and protected counts refer to."""
    layer_idx: int
    step: int
    """Decode steps before this one."""
    allowance: Allowance
    rope: Rope | None = None
    """Moves keys between positions, for methods that declared `needs_rope`."""

    def mass(self, kv_heads: int) -> Tensor:
        """Sum the weights over the query heads of each group: `(batch, kv_heads, n)`."""
        return self.weights.unflatten(1, (kv_heads, -1)).sum(dim=2)


class Method(ABC):
    """A cache method: subclass as a frozen dataclass whose fields are its settings."""

    needs_scores: ClassVar[bool] = False
    """Whether `compress` reads the attention column sums."""
    stochastic: ClassVar[bool] = False
    """Whether the result depends on the seed; such methods are run once a seed."""
    holds: ClassVar[bool] = False
    """Whether `hold` is defined: the method's own rule for `decode_policy=hold`."""
    acts_on_decode: ClassVar[bool] = False
    """Whether `hold` belongs to the method under any decode policy (mask simulations)."""
    needs_rope: ClassVar[bool] = False
    """Whether `compress` or `hold` moves keys between positions."""
    allocates: ClassVar[bool] = False
    """Whether the budget is divided across layers by `allocate`; all full layers are held for it."""
    allocates_heads: ClassVar[bool] = False
    """Whether the KV heads of a layer divide its budget among themselves: their mean is what each is
    allowed."""
    alters_prefill: ClassVar[bool] = False
    """Whether prompt tokens attend only where `visible` says: such a method gets a prefill of its own,
    and its first answer token may differ from the full cache's."""
    simulates: ClassVar[bool] = False
    """Whether entries are hidden rather than dropped: memory stays that of the full cache."""
    meets_budget: ClassVar[bool] = True
    """Whether every KV head keeps what it is allowed, where layers or heads divide it on their mean.
    False where a threshold or the authors' rounding says how many: the achieved budget tells."""
    hold_every: ClassVar[int] = 1
    """Decode steps after which `hold` has returned to the allowance."""

    @abstractmethod
    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep `allowance.n_keep` entries of a finished layer.

        Not called where the budget holds the whole prompt: everything is kept then.

        Raises:
            UserError: if the prompt is too short for what the method protects; `check` foretells it.
        """

    def check(self, layer_idx: int, length: int, allowance: Allowance) -> None:  # noqa: B027
        """Refuse an allowance for which `compress` would raise, before there is a layer.

        A run asks for its prompts before it loads any weight, so that it does not end hours later.

        Args:
            layer_idx: the layer.
            length: tokens of the prompt.
            allowance: what may be kept of it; without a generator.

        Raises:
            UserError: as `compress` does for a layer of this length.
        """

    def files(self) -> tuple[Path, ...]:
        """Return the files that the settings name; results are of what they hold."""
        return ()

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Decide again after a decode step, under `decode_policy=hold`.

        Args:
            entries: what is stored, the new token's entry last. Attention has already used all of it.
            step: the attention weights of the new token, and what may be kept.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rule for decode_policy=hold")

    def allocate(self, layers: Sequence[PrefillLayer], allowance: Allowance) -> list[int]:
        """Return the entries per KV head for each layer, for methods that declared `allocates`."""
        raise NotImplementedError(f"{type(self).__name__} does not allocate across layers")

    def visible(self, layer: PrefillLayer, allowance: Allowance) -> Tensor:
        """Return which columns each row of the prompt may see, where `alters_prefill` is declared.

        Not called where the budget holds the whole prompt: every row sees all before it then.

        Returns:
            `(batch, kv_heads, T, T)` bool, row by column, causal.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the prefill as it is")


def select(layer: PrefillLayer, positions: Tensor) -> Entries:
    """Keep whole tokens: `positions` `(batch, kv_heads, n)` int64, ascending."""
    return pick(keep_all(layer), positions)


def keep_all(layer: PrefillLayer) -> Entries:
    """Keep every token of a layer."""
    batch, kv_heads, length, _ = layer.keys.shape
    positions = torch.arange(length, device=layer.keys.device).expand(batch, kv_heads, length)
    return Entries(layer.keys, layer.values, positions, scores=layer.scores)


def tail(layer: PrefillLayer, count: int) -> Entries:
    """Keep the last `count` tokens of a layer, or all where there are fewer."""
    kept = keep_all(layer)
    first = max(0, layer.length - count)
    return Entries(kept.keys[:, :, first:], kept.values[:, :, first:], kept.positions[..., first:])


def pick(entries: Entries, slots: Tensor) -> Entries:
    """Keep the entries at `slots` `(batch, kv_heads, n)` int64, and what is stored beside them."""

    def chosen(extra: Tensor | None) -> Tensor | None:
        return None if extra is None else extra.gather(-1, slots)

    return Entries(
        rows.take(entries.keys, slots),
        rows.take(entries.values, slots),
        entries.positions.gather(-1, slots),
        chosen(entries.sizes),
        chosen(entries.bias),
        chosen(entries.scores),
        entries.state,
        entries.next_bias,
    )


def ragged(layer: PrefillLayer, tokens: Tensor, counts: Tensor) -> Entries:
    """Keep another number of tokens in each KV head; the rest of a shorter one is padding.

    Args:
        layer: a finished layer.
        tokens: `(batch, kv_heads, n)` int64 positions, none twice in a head, the first to keep first.
        counts: `(batch, kv_heads)` how many of them each head keeps, at most `n`.

    Returns:
        the `n` tokens in ascending order; those not kept have size 0 and a bias that hides them.
    """
    order = tokens.argsort(dim=-1)
    entries = select(layer, tokens.gather(-1, order))
    kept = order < counts.unsqueeze(-1)
    if bool(kept.all()):
        return entries
    return replace(entries, sizes=kept.long(), bias=torch.where(kept, 0.0, -torch.inf))


HIDDEN = torch.finfo(torch.float32).min
"""Bias of an entry that is stored but may not be seen: finite, so that a row without any visible entry
attends to all alike, as in the authors' mask simulations."""


def hide(entries: Entries, visible: Tensor) -> Entries:
    """Let the next token see only some entries, for methods that simulate eviction.

    Args:
        entries: all that is stored, `n` entries.
        visible: `(batch, kv_heads, n + 1)` bool; the last column is the next token itself.
    """
    bias = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, HIDDEN)
    return replace(entries, bias=bias[..., :-1], next_bias=bias[..., -1])


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` largest scores, ascending; of equal ones the lower.

    `torch.topk` leaves the order of ties open, so this is a stable sort (docs/methods.md).
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
