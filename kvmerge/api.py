"""`compressed`: run any Hugging Face `generate()` call on a compressed cache.

    with compressed(model, method="kvmerger", budget=0.35):
        model.generate(**inputs)

Inside the block each prompt is prefilled with full attention and compressed layer by layer; what is
generated is appended. Left-padded batches work: each row has its budget from its own real tokens.
A call that would mean something else is refused, whatever it would have given.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvmerge.budget import Budget
from kvmerge.compressed_cache import BEAMS, ELSEWHERE, CompressedCache, left_padded
from kvmerge.errors import UserError
from kvmerge.families import check_family
from kvmerge.hook import CACHE_NAMES, SESSION, cache_name, hooked
from kvmerge.limits import check_fits
from kvmerge.method import Method
from kvmerge.resolve import load_method
from kvmerge.session import CacheSession, Policy, Row, session_for

_CAPACITY = 64
"""New entries that buffers have room for at first; they grow."""
_UNCACHED = "use_cache=False leaves nothing to compress: every step would run on the full cache."
_OWN_CACHE = (
    "a cache of your own cannot be compressed: it would stay empty. Give none for a new prompt; to go "
    "on, give the one that an earlier call in this block returned."
)


class NothingCompressedWarning(UserWarning):
    """A `with compressed(...)` block ended without a single prompt having gone through it."""


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

    The model may be called from several threads inside one block, each with a cache of its own. A call
    with the cache that an earlier one returned appends its tokens, uncompressed.

    Args:
        model: a decoder of a supported family, loaded with any attention implementation.
        method: a method's name (`configs/method`), or a method object.
        budget: what remains: a fraction of the prompt in (0, 1], or entries per KV head of 2 or more.
            In models that have layers with a window beside others, of the others.
        decode_policy: `append` stores generated tokens beside the compressed prompt; `hold` evicts
            back to the budget after each step, for methods that have a rule for it.
        seed: for methods that draw.
        settings: settings of the named method, e.g. `sigma="mean_distance"`.

    Raises:
        UserError: for an unsupported model, one that is inside another block, an unknown method or
            setting, and a bad budget; inside the block for calls that would not be compressed as asked:
            a cache of the caller's own, one made elsewhere, no cache at all, positions or masks that
            are not those of the text so far, beam search, assisted generation, chunked prefill, and a
            text that the model cannot hold.
        UnprovenError: inside the block, if attention read something else than was asked for.

    Warns:
        NothingCompressedWarning: if the block ends, without an exception, and nothing was compressed.
    """
    check_family(model.config)
    if isinstance(method, str):
        method = load_method(method, settings)
    elif settings:
        raise UserError(
            f"settings ({', '.join(settings)}) can only be given with a method's name; "
            "set them on the method object instead."
        )
    block = _Block(model, Row(method, Budget.parse(budget), seed), Policy(decode_policy))
    with hooked(model), _replaced(model, "generate", block.generate):
        handles = (
            model.register_forward_pre_hook(block.before, with_kwargs=True),
            model.register_forward_hook(block.after, with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
    if not block.prefills:  # not reached where an exception leaves the block: that says more
        warnings.warn(
            f"nothing was compressed: no prompt went through {type(model).__name__} inside the "
            "`with compressed(...)` block. Call generate() or the model itself inside it, on this very "
            "object: a copy, a pipeline's own or another process's model is not compressed.",
            NothingCompressedWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute of one object inside the block."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if had:
            vars(owner)[name] = before
        else:
            del vars(owner)[name]


class _Block:
    """One `with compressed(...)`: what every call of the model inside it goes through."""

    def __init__(self, model: PreTrainedModel, row: Row, policy: Policy) -> None:
        self.model, self.row, self.policy = model, row, policy
        self._generate: Any = model.generate
        self._generating = threading.local()
        self._made: WeakSet[CompressedCache] = WeakSet()
        self.prefills = 0
        """Prompts, or batches of them, that were compressed."""

    def generate(self, *arguments: Any, **kwargs: Any) -> Any:
        """Run the model's own `generate`, where what it is asked for can be done."""
        bound = inspect.signature(self._generate).bind_partial(*arguments, **kwargs).arguments
        self._check_generate(bound | bound.get("kwargs", {}))
        self._generating.now = True  # its new, empty cache is not the caller's
        try:
            return self._generate(*arguments, **kwargs)
        finally:
            self._generating.now = False

    def _check_generate(self, kwargs: dict[str, Any]) -> None:
        own = kwargs.get("generation_config") or self.model.generation_config

        def asked(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(own, name, None)

        _check_cache_kind(_given_cache(kwargs))
        if asked("use_cache") is False:
            raise UserError(_UNCACHED)
        if (asked("num_beams") or 1) > 1:
            raise UserError(BEAMS)
        for name in ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens"):
            if asked(name) is not None:
                raise UserError(
                    f"{name} cannot be used on a compressed cache, which is made once, from the whole "
                    "prompt. Leave it out."
                )
        if asked("cache_implementation") not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation={asked('cache_implementation')!r} would be replaced by the "
                "compressed cache. Leave it out."
            )

    def before(
        self, _: torch.nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a forward call its compressed cache; a hook that runs before it."""
        if arguments:
            bound = inspect.signature(self.model.forward).bind_partial(*arguments)
            kwargs = {**bound.arguments, **kwargs}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        cache = _given_cache(kwargs)
        if getattr(self._generating, "now", False) and _is_empty(cache):
            cache = None
        _check_cache_kind(cache)
        self._check_call(kwargs)
        if cache is None:
            cache = self._first(kwargs)
        else:
            self._check_next(cache, kwargs)
        placed = {"position_ids": _place(cache, kwargs)}
        cache.let_in()
        rest = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        return (), rest | placed | {cache_name(self.model): cache, SESSION: cache.session}

    def after(self, _: torch.nn.Module, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
        """Hold a forward call that has ended against what was asked; a hook that runs after it."""
        session: CacheSession = kwargs[SESSION]
        self.prefills += not session.proof.fed
        session.passed()

    def _check_call(self, kwargs: dict[str, Any]) -> None:
        """Refuse a forward call that cannot be compressed, whatever its cache."""
        config = self.model.config
        if not kwargs.get("use_cache", getattr(config, "use_cache", True)):
            raise UserError(_UNCACHED)
        modules = self.model.modules() if self.model.training else ()
        if any(getattr(module, "gradient_checkpointing", False) for module in modules):
            raise UserError("gradient checkpointing turns the cache off: call model.eval().")
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            raise UserError("output_attentions: on a compressed cache there are no attention maps.")
        for name in ("attention_mask", "position_ids"):
            if name in kwargs and (not isinstance(kwargs[name], Tensor) or kwargs[name].dim() != 2):
                raise UserError(f"{name} must be 2-D (batch, tokens) on a compressed cache.")

    def _first(self, kwargs: dict[str, Any]) -> CompressedCache:
        """Begin a session for the batch that is about to be prefilled."""
        batch, tokens = _batch_shape(kwargs)
        lengths = _prompt_lengths(kwargs.get("attention_mask"), batch, tokens)
        check_fits(self.model.config, max(lengths), 1)
        rows = [replace(self.row, prompt=index) for index in range(batch)]
        samples = [str(index) for index in range(batch)]
        session = session_for(self.model, rows, samples, policy=self.policy)
        session.begin(lengths, _CAPACITY)
        cache = CompressedCache(session, tokens)
        self._made.add(cache)
        return cache

    def _check_next(self, cache: CompressedCache, kwargs: dict[str, Any]) -> None:
        """Refuse new tokens that do not follow what a cache has seen."""
        batch, tokens = _batch_shape(kwargs)
        session, seen = cache.session, cache.get_seq_length()
        if cache not in self._made:
            raise UserError(ELSEWHERE)
        if batch != len(session.rows):
            raise UserError(f"the batch has {batch} rows, and its cache {len(session.rows)}.")
        mask = kwargs.get("attention_mask")
        if mask is not None:
            wanted = cache.text_columns(seen + tokens).to(mask.device)
            if mask.shape != wanted.shape or not bool((mask.bool() == wanted).all()):
                raise UserError(
                    f"attention_mask must have {seen + tokens} columns, for the {seen} tokens that the "
                    f"cache has seen and the {tokens} new ones, and hide nothing but the prompt's "
                    "padding: tokens after the prompt cannot be padding on a compressed cache."
                )
        check_fits(self.model.config, max(session.lengths), seen + tokens - cache.width)


def _place(cache: CompressedCache, kwargs: dict[str, Any]) -> Tensor:
    """Return the positions `(batch, n)` of new tokens in their texts; padding does not count.

    Raises:
        UserError: if others are given.
    """
    _, tokens = _batch_shape(kwargs)
    seen = cache.get_seq_length()
    device = _new_states(kwargs).device
    columns = cache.text_columns(seen + tokens).to(device)
    positions = (columns.cumsum(dim=-1) - 1).clamp_min(0)[:, seen:]
    given = kwargs.get("position_ids")
    if given is not None:
        shown = given.shape[1] == tokens and given.shape[0] in (1, len(positions))
        if not shown or bool(((given != positions) & columns[:, seen:]).any()):
            raise UserError(
                "position_ids must count each row's own tokens from 0, padding left out; those of this "
                f"call go on at {positions[:, 0].tolist()}. Leave position_ids out."
            )
    return positions


def _given_cache(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _check_cache_kind(cache: Any) -> None:
    if cache is not None and not isinstance(cache, CompressedCache):
        raise UserError(_OWN_CACHE)


def _is_empty(cache: Any) -> bool:
    return isinstance(cache, Cache) and not cache.get_seq_length()


def _prompt_lengths(mask: Tensor | None, batch: int, tokens: int) -> list[int]:
    """Return the real tokens of each row of a left-padded batch. Raises `UserError` for any other."""
    if mask is None:
        return [tokens] * batch
    lengths = [int(length) for length in mask.sum(dim=-1)]
    if mask.shape != (batch, tokens) or not bool(
        (mask.bool() == left_padded(lengths, tokens, tokens).to(mask.device)).all()
    ):
        raise UserError(
            "prompts must be padded on the left, without holes in the attention mask; "
            'set tokenizer.padding_side = "left".'
        )
    if min(lengths) < 1:
        raise UserError("each prompt needs at least one token that is not padding.")
    return lengths


def _new_states(kwargs: dict[str, Any]) -> Tensor:
    """Return what the new tokens are given as."""
    for name in ("input_ids", "inputs_embeds"):
        if name in kwargs:
            found: Tensor = kwargs[name]
            return found
    raise UserError("the call has neither input_ids nor inputs_embeds.")


def _batch_shape(kwargs: dict[str, Any]) -> tuple[int, int]:
    batch, tokens = _new_states(kwargs).shape[:2]
    return batch, tokens
