"""The hook into transformers: everything that depends on the names inside it is in this file.

A model whose attention implementation is `kvmerge` calls `_attend` in each layer with its queries and
keys after RoPE. The call is handed on to the *session* that was passed to the model's forward, which
keeps the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "kvmerge"
SESSION = "kvmerge_session"
"""Keyword of the model's forward that carries the session down to the attention function."""


class Session(Protocol):
    """What owns the cache during a forward pass."""

    def attend(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend with the new tokens of one layer and take their keys and values over.

        Args:
            queries: `(batch, heads, n, head_dim)` of the new tokens.
            keys: `(batch, kv_heads, n, head_dim)` of the new tokens.
            values: `(batch, kv_heads, n, head_dim)` of the new tokens.

        Returns:
            `(batch, heads, n, head_dim)`.
        """
        ...


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    session: Session | None = kwargs.get(SESSION)
    if session is None:
        raise RuntimeError(
            f"attention implementation {NAME!r} was called outside a session; "
            "use `kvmerge.hook.hooked(model)` and pass a session to the model's forward."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = session.attend(int(module.layer_idx), query, key, value, scale)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def _no_mask(**_: Any) -> None:
    """Pass no mask: sessions know which tokens each row may see. Without this, a padding mask would be
    dropped."""
    return None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)


@contextlib.contextmanager
def hooked(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention to sessions inside the block, and restore it afterwards."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def forward(
    model: PreTrainedModel,
    session: Session,
    input_ids: Tensor,
    positions: Tensor,
    logits_to_keep: int = 0,
) -> Tensor:
    """Run one forward pass of a hooked model, cache-free on transformers' side.

    Args:
        input_ids: `(batch, n)`.
        positions: `(batch, n)` true positions in the text: the length of a compressed cache says
            nothing about them.
        logits_to_keep: logits of only the last tokens; 0 means all.

    Returns:
        `(batch, n or logits_to_keep, vocabulary)` logits.
    """
    return model(
        input_ids=input_ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=logits_to_keep,
        **{SESSION: session},
    ).logits
