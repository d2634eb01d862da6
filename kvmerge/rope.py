"""Rotating cached keys: what methods need that merge before RoPE or renumber positions.

Keys are cached after RoPE. Rotations by different angles compose, so a key is moved from one position
to another by rotating it by their difference; nothing has to be stored unrotated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.errors import UserError

_FIXED_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the text."""


@dataclass(frozen=True)
class Rope:
    """The rotation of one model: an angle per position for each pair of dimensions."""

    frequencies: Tensor
    """`(rotary_dim / 2,)` radians per position."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Rope:
        """Read a model's rotary embedding. Raise `UserError` where its angles are not fixed."""
        embedding = getattr(model.base_model, "rotary_emb", None)
        kind = getattr(embedding, "rope_type", None)
        if embedding is None or kind not in _FIXED_TYPES:
            raise UserError(
                f"{model.config.model_type} with RoPE type {kind!r} cannot rotate cached keys; "
                f"supported types: {', '.join(_FIXED_TYPES)}."
            )
        return cls(embedding.inv_freq.float())

    def rotate(self, states: Tensor, by: Tensor) -> Tensor:
        """Rotate states by some positions.

        Args:
            states: `(batch, heads, n, head_dim)`; dimensions past the rotary ones stay as they are.
            by: positions to move by, broadcastable to `(batch, heads, n)`, may be negative.

        Returns:
            `(batch, heads, n, head_dim)` in the dtype of `states`, computed in float32 or better.
        """
        exact = torch.promote_types(states.dtype, torch.float32)
        half = self.frequencies.shape[0]
        angles = by.unsqueeze(-1).to(exact) * self.frequencies.to(states.device, exact)
        cos, sin = angles.cos(), angles.sin()
        first, second = states[..., :half].to(exact), states[..., half : 2 * half].to(exact)
        turned = [first * cos - second * sin, second * cos + first * sin]
        rest = states[..., 2 * half :]
        return torch.cat([*(part.to(states.dtype) for part in turned), rest], dim=-1)
