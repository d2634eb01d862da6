"""The hook into transformers: everything that depends on the names inside it is in this file.

A model whose attention implementation is `kvmerge` calls `_attend` in each layer with its queries and
keys after RoPE. The call is handed on to the *session* that was passed to the model's forward, which
keeps the cache.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvmerge.errors import UserError
from kvmerge.softmax import Softmax, plain

NAME = "kvmerge"
SESSION = "kvmerge_session"
"""Keyword of the model's forward that carries the session down to the attention function."""

CACHE_NAMES = ("cache", "past_key_values")
"""What a model's forward may call its cache: the second before transformers 5.20, accepted since."""


class Session(Protocol):
    """What owns the cache during a forward pass."""

    def attend(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax
    ) -> Tensor:
        """Attend with the new tokens of one layer and take their keys and values over.

        Args:
            queries: `(batch, heads, n, head_dim)` of the new tokens.
            keys: `(batch, kv_heads, n, head_dim)` of the new tokens.
            values: `(batch, kv_heads, n, head_dim)` of the new tokens.
            softmax: the layer's.

        Returns:
            `(batch, heads, n, head_dim)`.
        """
        ...

    def place(self, positions: Tensor | None) -> None:
        """Hold the positions of new tokens, as they reach the model's layers, against the text.

        Args:
            positions: `(batch, n)`; None: the layers are given none.

        Raises:
            UnprovenError: if they do not go on where the text stands.
        """
        ...

    def passed(self) -> None:
        """End a forward pass.

        Raises:
            UnprovenError: if its attention was not what the session's rows claim (`kvmerge.proof`).
        """
        ...


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    session: Session | None = kwargs.get(SESSION)
    if session is None:
        raise UserError(
            "the model's attention is taken over by kvmerge, and this call did not come through the "
            "model's own forward. Call the whole model, inside the `with compressed(...)` block."
        )
    if dropout:
        raise UserError("the model is being trained, with dropout in its attention: call model.eval().")
    scale = plain(query.shape[-1]).scale if scaling is None else scaling
    softmax = Softmax(scale, softcap, s_aux)
    out = session.attend(int(module.layer_idx), query, key, value, softmax)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


def _before_layers(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Show a session the positions that reach the layers; a hook of the model's decoder."""
    session: Session | None = kwargs.get(SESSION)
    if session is not None:
        session.place(kwargs.get("position_ids"))


def _no_mask(**_: Any) -> None:
    """Pass no mask: sessions know which tokens each row may see. Without this, a padding mask would be
    dropped."""
    return None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)

_taken: set[int] = set()
"""Configurations whose attention implementation is ours now, by `id`: they are what is changed, and a
model has those of the models in it too."""
_taking = threading.Lock()


@contextlib.contextmanager
def hooked(model: PreTrainedModel) -> Iterator[None]:
    """Route the model's attention to sessions inside the block, and restore it afterwards.

    Raises:
        UserError: if another block holds the model, in this thread or another, or a model that shares
            a configuration or layers with it; and for a model that does not let its attention be
            replaced.
    """
    owned = {id(each.config) for each in model.modules() if isinstance(each, PreTrainedModel)}
    with _taking:
        if owned & _taken:
            raise UserError(
                "this model is inside another block or run of kvmerge already, here or in another "
                "thread. Leave that one first: a model serves one method and budget at a time."
            )
        _taken.update(owned)
    try:
        previous = model.config._attn_implementation
        try:
            model.set_attn_implementation(NAME)
            if model.config._attn_implementation != NAME:
                raise UserError(
                    f"{type(model).__name__} does not let its attention be replaced: it does not use "
                    "transformers' AttentionInterface."
                )
            handle = model.get_decoder().register_forward_pre_hook(_before_layers, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
        finally:
            model.set_attn_implementation(previous)
    finally:
        with _taking:
            _taken.difference_update(owned)


def check_generates(model: PreTrainedModel) -> None:
    """Refuse a model without `generate`, such as a decoder that was loaded without its head.

    Raises:
        UserError: naming what to load it with.
    """
    if not model.can_generate():
        raise UserError(
            f"{type(model).__name__} cannot generate; load the model with AutoModelForCausalLM."
        )


def cache_name(model: PreTrainedModel) -> str:
    """Return what a model's forward calls its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in parameters)


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
    logits = model(
        input_ids=input_ids,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=logits_to_keep,
        **{SESSION: session},
    ).logits
    session.passed()
    return logits
