"""Linear layers in the layout that oneDNN's kernels read.

torch multiplies float32 matrices through MKL, which is slow on AMD processors and packs the weights
anew at every step of decoding. oneDNN takes weights that are packed once (docs/performance.md has
the figures). The operators are those that torch's own compiler emits when it freezes a model; where
they are missing, nothing is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


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
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def can_pack(linear: nn.Linear) -> bool:
    """Whether a layer can be packed: plain float32 weights on the CPU, and a torch that has oneDNN."""
    return (
        type(linear) is nn.Linear
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linear_layers(model: PreTrainedModel) -> int:
    """Replace a model's linear layers by packed ones, in place, and return how many.

    Weights are not stored twice, so the model can no longer be trained or saved. An output layer
    that is tied to the embedding gets a copy, since the embedding is read row by row.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and can_pack(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)
