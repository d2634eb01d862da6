"""`compressed`: run any Hugging Face `generate()` call on a compressed cache.

    with compressed(model, method="kvmerger", budget=0.35):
        model.generate(**inputs)

Inside the block each prompt is prefilled with full attention and compressed layer by layer; what is
generated is appended. Left-padded batches work: each row has its budget from its own real tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.hook import SESSION, hooked
from kvmerge.method import Method
from kvmerge.resolve import load_method
from kvmerge.session import CacheSession, Policy, Row, RowStats, check_sliding_window, session_for

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""Model types whose attention runs through transformers' AttentionInterface as the engine needs it."""
_CAPACITY = 64
"""New entries that buffers have room for at first; they grow."""


class CompressedCache(Cache):
    """What transformers sees as the cache: it counts tokens, while the entries live in a session.

    Its length is the number of tokens seen, not of entries stored, so that the next token takes its
    true position in the text.
    """

    def __init__(self, session: CacheSession) -> None:
        """Wrap a session whose prefill is about to run."""
        super().__init__(layers=[_CountingLayer() for _ in range(session.num_layers)])
        self.session = session

    @property
    def stats(self) -> list[RowStats]:
        """Entries and bytes that each row of the batch kept of its prompt."""
        return self.session.stats

    def nbytes(self) -> int:
        """Count the bytes of all keys and values stored now, generated tokens included."""
        return sum(layer.nbytes() for layer in self.session.layers)


class _CountingLayer(CacheLayerMixin):
    """A cache layer that passes new states through and only counts them."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Return the same, by the name that earlier 5.x versions call."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UserError(
            "beam search is not supported on a compressed cache: each beam would need its own "
            "compressed copy. Use num_beams=1 (greedy or sampling)."
        )


@contextlib.contextmanager
def compressed(
    model: PreTrainedModel,
    method: str | Method = "kvmerger",
    budget: float | int | str = 0.5,
    *,
    decode_policy: str = "append",
    seed: int = 0,
    **settings: Any,
) -> Iterator[None]:
    """Compress the cache of every generation of `model` inside the block.

    Args:
        model: a decoder of a supported family, loaded with any attention implementation.
        method: a method's name (`configs/method`), or a method object.
        budget: what remains: a fraction of the prompt in (0, 1], or entries per KV head of 2 or more.
        decode_policy: `append` stores generated tokens beside the compressed prompt; `hold` evicts
            back to the budget after each step, for methods that have a rule for it.
        seed: for methods that draw.
        settings: settings of the named method, e.g. `sigma="mean_distance"`.

    Raises:
        UserError: for an unsupported model, unknown method or setting, a bad budget, beam search, or a
            prompt longer than the model's sliding window.
    """
    check_family(model)
    if isinstance(method, str):
        method = load_method(method, settings)
    elif settings:
        raise UserError(
            f"settings ({', '.join(settings)}) can only be given with a method's name; "
            "set them on the method object instead."
        )
    row, policy = Row(method, Budget.parse(budget), seed), Policy(decode_policy)
    name = _cache_parameter(model)

    def before(_: torch.nn.Module, arguments: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if arguments:
            bound = inspect.signature(model.forward).bind_partial(*arguments)
            kwargs = {**bound.arguments, **kwargs}
        # The deprecated name is still accepted where the new one exists.
        cache = kwargs.pop("past_key_values", None)
        cache = kwargs.pop(name, None) if cache is None else cache
        if not isinstance(cache, CompressedCache):
            if cache is not None and cache.get_seq_length():
                raise UserError("the given cache already holds tokens; start with an empty one.")
            cache = CompressedCache(_begin(model, row, policy, kwargs))
        else:
            _check_new_tokens(model, cache, kwargs)
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is None and mask is not None and mask.dim() == 2:
            # Padding must not count as positions.
            new = _new_tokens(kwargs)
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -new:]
        kwargs = {**kwargs, name: cache, SESSION: cache.session}
        return (), kwargs

    with hooked(model):
        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _begin(model: PreTrainedModel, row: Row, policy: Policy, kwargs: dict[str, Any]) -> CacheSession:
    """Begin a session for the batch that is about to be prefilled."""
    batch, tokens = _batch_shape(kwargs)
    mask = kwargs.get("attention_mask")
    lengths = [tokens] * batch
    if mask is not None:
        if mask.dim() != 2:
            raise UserError("attention_mask must be 2-D (batch, tokens) on a compressed cache.")
        lengths = mask.sum(dim=-1).tolist()
        left_padded = torch.arange(tokens, device=mask.device) >= tokens - mask.sum(-1, keepdim=True)
        if not bool((mask.bool() == left_padded).all()):
            raise UserError(
                "prompts must be padded on the left, without holes in the attention mask; "
                'set tokenizer.padding_side = "left".'
            )
        if min(lengths) < 1:
            raise UserError("each prompt needs at least one token that is not padding.")
    check_sliding_window(model, tokens, 1)
    rows = [replace(row, prompt=index) for index in range(batch)]
    session = session_for(model, rows, [str(index) for index in range(batch)], policy=policy)
    session.begin(lengths, _CAPACITY)
    return session


def _batch_shape(kwargs: dict[str, Any]) -> tuple[int, int]:
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs["inputs_embeds"]
    return int(given.shape[0]), int(given.shape[1])


def _new_tokens(kwargs: dict[str, Any]) -> int:
    return _batch_shape(kwargs)[1]


def _check_new_tokens(model: PreTrainedModel, cache: CompressedCache, kwargs: dict[str, Any]) -> None:
    """Refuse padding after the prompt, since rows are padded on the left only, and what outgrows a
    sliding window."""
    new = _new_tokens(kwargs)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not bool(mask[:, -new:].all()):
        raise UserError("tokens after the prompt cannot be padding on a compressed cache.")
    prompt = max(cache.session.lengths)
    check_sliding_window(model, prompt, cache.get_seq_length() + new - prompt)


def _cache_parameter(model: PreTrainedModel) -> str:
    """Return the forward's name for the cache: `past_key_values` before transformers 5.20."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def check_family(model: PreTrainedModel) -> None:
    """Raise `UserError` for a model whose attention the engine cannot take over."""
    kind = str(model.config.model_type)
    if kind not in SUPPORTED:
        raise UserError(f"model type {kind!r} is not supported. Supported: {', '.join(SUPPORTED)}.")
