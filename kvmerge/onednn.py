"""oneDNN's kernels, where float32 runs on a CPU.

torch multiplies float32 matrices through MKL, which uses half of an AMD processor and packs the weights
of a linear layer anew at every step of decoding. oneDNN does neither (docs/performance.md has the
figures). Its operators are those that torch's own compiler emits when it freezes a model; where they
are missing, everything here says so and the callers go on without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_TILE = 2**20
"""Logits worked on at once: they stay in the cache between the two products and the softmax."""


def available(states: Tensor) -> bool:
    """Whether oneDNN can work on states: float32 on the CPU, and a torch that has its operators."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def times_transposed(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right.T + bias` of float32 `(..., n)` and `(m, n)`, which may be packed."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


def prefill_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, *, scored: bool
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a whole prompt and, from the same logits, its column sums.

    A block of rows at a time: its logits, their softmax, the sums of the columns, the product with
    the values. Causal blocks only; the map never exists whole.

    Args:
        queries: `(1, heads, T, head_dim)`.
        keys: `(1, kv_heads, T, head_dim)`.
        values: `(1, kv_heads, T, head_dim)`.
        scored: whether the sums are wanted.

    Returns:
        output `(1, heads, T, head_dim)`; sums `(1, kv_heads, T)` float32 as `scores.column_sums` gives
        them, or None.
    """
    _, heads, length, head_dim = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    block = max(32, min(128, _TILE // (group * length)))
    future = torch.ones(block, block, dtype=torch.bool).triu_(1)
    out = torch.empty_like(queries)
    sums = queries.new_zeros(1, kv_heads, length) if scored else None
    scaled = queries * scale
    for head in range(kv_heads):
        # The query heads of a group become rows of one product.
        rows, into = (states[0, head * group : (head + 1) * group] for states in (scaled, out))
        own_keys, own_values = keys[0, head].contiguous(), values[0, head].contiguous()
        for begin in range(0, length, block):
            end = min(begin + block, length)
            size = end - begin
            tile = rows[:, begin:end].reshape(-1, head_dim)
            logits = times_transposed(tile, own_keys[:end])
            logits.view(group, size, end)[..., begin:].masked_fill_(future[:size, :size], float("-inf"))
            weights = logits.softmax(dim=-1)
            product = times_transposed(weights, own_values[:end].T)
            into[:, begin:end] = product.view(group, size, head_dim)
            if sums is not None:
                sums[0, head, :end] += weights.sum(dim=0)
    return out, sums


class PackedLinear(nn.Module):
    """A linear layer for inference on the CPU, its weight packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        # Without a batch size: the same layout serves a prompt's thousands of rows and a step's few.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, states: Tensor) -> Tensor:
        """Apply the layer to `(..., in_features)`."""
        return times_transposed(states, self.packed, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def pack_linear_layers(model: PreTrainedModel) -> int:
    """Replace a model's plain float32 linear layers by packed ones, in place, and return how many.

    Weights are not stored twice, so the model can no longer be trained or saved. An output layer
    that is tied to the embedding gets a copy, since the embedding is read row by row.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and available(child.weight)
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)
