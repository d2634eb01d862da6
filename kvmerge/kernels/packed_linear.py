"""oneDNN's kernels, where float32 runs on a CPU.

torch multiplies float32 matrices through MKL, which runs at half of oneDNN's rate on AMD processors
with AVX-512, and packs the weights of a linear layer anew at every step of decoding
(docs/performance.md has the figures). oneDNN's operators are those that torch's own compiler emits
when it freezes a model; where they are missing, everything here says so and the callers go on without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def available(states: Tensor) -> bool:
    """Return whether oneDNN can work on states: float32 on the CPU, by a torch that has it."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def times_transposed(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `left @ right.T + bias` of float32 `(..., n)` and `(m, n)`, which may be packed."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


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
    plain = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and available(child.weight)
    ]
    for parent, name, child in plain:
        setattr(parent, name, PackedLinear(child))
    return len(plain)
