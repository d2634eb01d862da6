"""Causal attention of a whole prompt in tiles, and its column sums from the same logits.

The way on a CPU in float32, and everywhere for what fused kernels do not know: soft caps, sinks, and a
window without a mask of T x T.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from kvmerge.kernels import choice, packed_linear
from kvmerge.softmax import Softmax, plain

_WORTH_A_CHOICE = 512
"""Prompt tokens from which it is worth knowing the faster way to multiply."""
_TILE = 2**20
"""Logits worked on at once: they stay in the cache between the two products and the softmax."""

_unused: ContextVar[bool] = ContextVar("unused", default=False)


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Leave prompts to torch's own kernel inside the block, wherever that can compute them."""
    token = _unused.set(True)
    try:
        yield
    finally:
        _unused.reset(token)


def suits(states: Tensor) -> bool:
    """Return whether `attend` is the way whatever the softmax: float32 on a CPU.

    With scores it is the fastest there. Without them torch's own kernel is faster on some processors;
    it is not taken, because it rounds otherwise, and what a cell gives must not depend on whether
    another cell beside it wants scores.
    """
    return states.device.type == "cpu" and states.dtype == torch.float32 and not _unused.get()


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: Softmax,
    *,
    scored: bool,
    window: int | None = None,
    products: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return attention and, from the same logits, how much of it each key received.

    A block of rows at a time: its logits, their softmax, the sums of the columns, the product with
    the values. Only columns that a row of the block may see; the map never exists whole. Shapes are
    those of `attention.attention_and_scores`, which calls this where it suits.

    Args:
        window: the last tokens that a row sees, itself among them; None: all before it.
        products: which library multiplies (`choice.WAYS`); None: the faster one on this machine for
            prompts that are long enough to matter, torch for others.
    """
    _, heads, length, head_dim = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    block = max(32, min(128, _TILE // (group * length)))
    in_place = not torch.is_grad_enabled()  # torch refuses where gradients may flow
    multiply: _OneDNN | _Torch
    if (products or faster_products(queries)) == "onednn":
        multiply = _OneDNN()
    else:
        multiply = _Torch(queries.new_empty(group * block * length) if in_place else None)
    future = torch.ones(block, block, dtype=torch.bool, device=queries.device).triu_(1)
    out = torch.empty_like(queries)
    sums = queries.new_zeros(1, kv_heads, length) if scored else None
    scaled = queries * softmax.scale
    for head in range(kv_heads):
        # The query heads of a group become rows of one product.
        heads_of_group = slice(head * group, (head + 1) * group)
        rows, into = (states[0, heads_of_group] for states in (scaled, out))
        multiply.begin(keys[0, head], values[0, head])
        for begin in range(0, length, block):
            end = min(begin + block, length)
            size = end - begin
            first = 0 if window is None else max(0, begin - window + 1)
            seen = slice(first, end)
            logits = multiply.keys(rows[:, begin:end].reshape(-1, head_dim), seen)
            logits = softmax.capped(logits)
            of_rows = logits.view(group, size, end - first)
            of_rows[..., begin - first :].masked_fill_(future[:size, :size], float("-inf"))
            if window is not None:
                # row i of the block sees nothing before column begin + i - window + 1
                passed = torch.ones(size, end - first, dtype=torch.bool, device=queries.device)
                passed.tril_(begin - first - window)
                of_rows.masked_fill_(passed, float("-inf"))
            if softmax.is_plain:
                weights = torch.softmax(logits, -1, out=logits if in_place else None)
            else:
                weights = softmax.weights(of_rows, heads_of_group).view(logits.shape)
            into[:, begin:end] = multiply.values(weights, seen).view(group, size, head_dim)
            if sums is not None:
                sums[0, head, seen] += weights.sum(dim=0)
    return out, sums


def faster_products(queries: Tensor) -> str:
    """Return which library is to multiply for a prompt, by its length and this machine."""
    if queries.shape[2] < _WORTH_A_CHOICE or not packed_linear.available(queries):
        return "torch"
    return choice.fastest(_rehearse)


def faster_transposed(states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what multiplies `(n, d)` by the transpose of `(m, d)` faster for a prompt's states."""
    if faster_products(states) == "onednn":
        return packed_linear.times_transposed
    return lambda left, right: left @ right.T


@torch.no_grad()
def _rehearse(products: str) -> None:
    """Attend once over a prompt of 2,048 tokens and one KV head of three query heads."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(1, heads, 2048, 64, generator=generator) for heads in (3, 1, 1)
    )
    attend(queries, keys, values, plain(64), scored=True, products=products)


class _OneDNN:
    """Products with a head's first keys and values, by oneDNN."""

    def begin(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys.contiguous(), values.contiguous()

    def keys(self, rows: Tensor, seen: slice) -> Tensor:
        return packed_linear.times_transposed(rows, self._keys[seen])

    def values(self, weights: Tensor, seen: slice) -> Tensor:
        return packed_linear.times_transposed(weights, self._values[seen].T)


class _Torch:
    """The same by torch, which is faster where the logits go into memory that is used again."""

    def __init__(self, buffer: Tensor | None) -> None:
        self._buffer = buffer

    def begin(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys.T.contiguous(), values.contiguous()

    def keys(self, rows: Tensor, seen: slice) -> Tensor:
        columns = seen.stop - seen.start
        into = None if self._buffer is None else self._buffer[: len(rows) * columns].view(-1, columns)
        return torch.mm(rows, self._keys[:, seen], out=into)

    def values(self, weights: Tensor, seen: slice) -> Tensor:
        return weights @ self._values[seen]
