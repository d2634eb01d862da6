"""Rotating cached keys: what methods need that merge before RoPE or renumber positions.

Keys are cached after RoPE. Rotations by different angles compose, so a key is moved from one position
to another by rotating it by their difference; nothing has to be stored unrotated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIXED_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the text."""
_UNTURNED = ("cohere2", "exaone4", "smollm3")
"""Model types of which some layers have no rotation."""


@dataclass(frozen=True)
class Rope:
    """The rotation of one model: an angle per position for each pair of dimensions."""

    frequencies: Tensor
    """`(rotary_dim / 2,)` radians per position."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Rope:
        """Read a model's rotary embedding.

        Raises:
            UserError: where its angles are not fixed, not the same in all layers, or turn other pairs
                of dimensions than `rotate` does.
        """
        kind = model.config.model_type
        embedding = getattr(model.base_model, "rotary_emb", None)
        rope_type = getattr(embedding, "rope_type", None)
        if embedding is None or rope_type not in _FIXED_TYPES:
            raise UserError(
                f"{kind} with RoPE type {rope_type!r} cannot rotate cached keys; "
                f"supported types: {', '.join(_FIXED_TYPES)}."
            )
        rope = cls(embedding.inv_freq.float())
        if kind in _UNTURNED or not rope._agrees_with(model, embedding):
            raise UserError(
                f"{kind} cannot rotate cached keys: not all of its layers are turned, or not in halves "
                "of a head."
            )
        return rope

    @classmethod
    def check(cls, skeleton: PreTrainedModel) -> None:
        """Refuse a model whose rotation `of` would refuse, by its layers without weights.

        Args:
            skeleton: the model on the device `meta`; its rotation is built anew, with numbers.

        Raises:
            UserError: as `of` does.
        """
        embedding: Any = getattr(skeleton.base_model, "rotary_emb", None)
        if embedding is not None:
            skeleton.base_model.rotary_emb = type(embedding)(config=embedding.config)
        cls.of(skeleton)

    def _agrees_with(self, model: PreTrainedModel, embedding: nn.Module) -> bool:
        """Return whether moving a state gives what the model's own code gives at the other place."""
        apply = vars(sys.modules[type(model).__module__]).get("apply_rotary_pos_emb")
        if apply is None:
            return False
        width = 2 * len(self.frequencies)
        state = torch.linspace(-1, 1, width, device=self.frequencies.device).view(1, 1, 1, width)
        before, after = (
            apply(state, state, *embedding(state, torch.tensor([[place]], device=state.device)))[0]
            for place in (3, 10)
        )
        moved = self.rotate(before, torch.tensor(7, device=state.device))
        return torch.allclose(moved, after, atol=1e-4)

    def rotate(self, states: Tensor, by: Tensor) -> Tensor:
        """Rotate states by some positions.

        Args:
            states: `(batch, heads, n, head_dim)`; dimensions past the rotary ones stay as they are.
            by: positions to move by, broadcastable to `(batch, heads, n)`, may be negative.

        Returns:
            `(batch, heads, n, head_dim)` in the dtype of `states`, computed in float32 or better.
        """
        cos, sin = self._waves(states, by)
        return self._turned(states, cos, sin)

    def rotate_by_mean(self, states: Tensor, by: Tensor) -> Tensor:
        """Apply the mean of the rotations by some positions, which shortens what it turns.

        Args:
            states: `(…, head_dim)`; dimensions past the rotary ones stay as they are.
            by: `(n,)` positions.

        Returns:
            like `states`, in their dtype, computed in float32 or better.
        """
        cos, sin = self._waves(states, by)
        return self._turned(states, cos.mean(dim=0), sin.mean(dim=0))

    def _waves(self, states: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions: `(…, rotary_dim / 2)`, on the device of `states`."""
        exact = torch.promote_types(states.dtype, torch.float32)
        angles = by.unsqueeze(-1).to(exact) * self.frequencies.to(states.device, exact)
        return angles.cos(), angles.sin()

    def _turned(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self.frequencies.shape[0]
        first, second = states[..., :half].to(cos), states[..., half : 2 * half].to(cos)
        turned = [first * cos - second * sin, second * cos + first * sin]
        rest = states[..., 2 * half :]
        return torch.cat([*(part.to(states.dtype) for part in turned), rest], dim=-1)
