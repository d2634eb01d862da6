"""`compressed`: run any Hugging Face `generate()` call on a compressed cache.

    with compressed(model, method="kvmerger", budget=0.35) as c:
        model.generate(**inputs)
    print(c)

Inside the block each prompt is prefilled with full attention and compressed layer by layer; what is
generated is appended. Left-padded batches work: each row has its budget from its own real tokens.
A call that would mean something else is refused, whatever it would have given.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvmerge.budget import Budget
from kvmerge.compressed_cache import BEAMS, ELSEWHERE, CompressedCache, EntryPositions, left_padded
from kvmerge.compression import Compression, Generation, kept_rows
from kvmerge.errors import UserError, unknown
from kvmerge.families import check_family
from kvmerge.hook import CACHE_NAMES, SESSION, cache_name, check_generates, hooked
from kvmerge.limits import check_fits
from kvmerge.method import Method
from kvmerge.resolve import load_method
from kvmerge.session import Policy, Row, session_for

NEVER, EACH_TURN = "never", "each_turn"

_CAPACITY = 64
"""New entries that buffers have room for at first; they grow."""
_UNCACHED = "use_cache=False leaves nothing to compress: every step would run on the full cache."
_OWN_CACHE = (
    "a cache of your own cannot be compressed: it would stay empty. Give none for a new prompt; to go "
    "on, give the one that an earlier call in this block returned."
)
_ENDED = (
    "the `with compressed(...)` block that this call was made in has ended, and what follows would not "
    "be compressed. Join the threads that generate inside the block."
)


class NothingCompressedWarning(UserWarning):
    """A `with compressed(...)` block ended without a single prompt having gone through it."""


def compressed(
    model: PreTrainedModel,
    method: str | Method = "kvmerger",
    budget: float | int | str = 0.5,
    *,
    decode_policy: str = "append",
    recompress: str = NEVER,
    keep: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Compressing:
    """Compress the cache of every generation of `model` inside the block.

    The model may be called from several threads inside one block, each with a cache of its own. A call
    with the cache that an earlier one returned is a further turn of the same text: `recompress` says
    what happens to it. Leaving the block waits for the forward passes that other threads are in.

    Args:
        model: a decoder of a supported family, loaded with any attention implementation.
        method: a method's name (`configs/method`), or a method object.
        budget: what remains: a fraction of the prompt in (0, 1], or entries per KV head of 2 or more.
            In models that have layers with a window beside others, of the others.
        decode_policy: `append` stores generated tokens beside the compressed prompt; `hold` evicts
            back to the budget after each step, for methods that have a rule for it.
        recompress: `never` compresses the first prompt of a chat, and appends its answer and further
            turns; the budget is of that prompt. `each_turn` prefills the whole text again at each
            further `generate` call, with full attention, and compresses that: the answer is that of one
            prompt of the whole text, at the cost of its prefill.
        keep: hold the last generation's cache, so that what it kept can be looked at.
        seed: for methods that draw.
        settings: settings of the named method, e.g. `sigma="mean_distance"`.

    Returns:
        a context manager, which can be entered more than once, one after the other; each time it gives
        a new `Compression`, the statistics of every generation.

    Raises:
        UserError: for an unsupported model, one that is inside another block, an unknown method or
            setting, and a bad budget; inside the block for calls that would not be compressed as asked:
            a cache of the caller's own, one made elsewhere or in use by another thread, no cache at
            all, a text, positions or masks that are not those of the text so far, beam search, assisted
            generation, chunked prefill, and a text that the model cannot hold.
        UnprovenError: inside the block, if attention read something else than was asked for.

    Warns:
        NothingCompressedWarning: if the block ends, without an exception, and nothing was compressed.
    """
    check_family(model.config)
    check_generates(model)
    if isinstance(method, str):
        method = load_method(method, settings)
    elif settings:
        raise UserError(
            f"settings ({', '.join(settings)}) can only be given with a method's name; "
            "set them on the method object instead."
        )
    if recompress not in (NEVER, EACH_TURN):
        raise unknown("recompress", str(recompress), (NEVER, EACH_TURN))
    row, policy = Row(method, Budget.parse(budget), seed), Policy(decode_policy)
    return Compressing(partial(_block, model, row, policy, recompress == EACH_TURN, keep))


class Compressing(contextlib.ContextDecorator):
    """What `compressed` returns: opens a new block each time that it is entered."""

    def __init__(self, block: Callable[[], contextlib.AbstractContextManager[Compression]]) -> None:
        """Take what opens a block."""
        self._block = block

    def __enter__(self) -> Compression:
        opened = self._block()
        compression = opened.__enter__()
        self._opened = opened  # only here: a second one at the same time is refused above
        return compression

    def __exit__(self, *error: Any) -> bool | None:
        return self._opened.__exit__(*error)


@contextlib.contextmanager
def _block(
    model: PreTrainedModel, row: Row, policy: Policy, each_turn: bool, keep: bool
) -> Iterator[Compression]:
    block = _Block(model, row, policy, each_turn, keep)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hooked(model))
        stack.enter_context(_replaced(model, "generate", block.generate))
        for handle in (
            model.register_forward_pre_hook(block.before, with_kwargs=True),
            model.register_forward_hook(block.after, with_kwargs=True, always_call=True),
        ):
            stack.callback(handle.remove)
        stack.callback(block.end)
        yield block.compression
    if not block.has_compressed:  # not reached where an exception leaves the block: that says more
        warnings.warn(
            f"nothing was compressed: no prompt went through {type(model).__name__} inside the "
            "`with compressed(...)` block. Call generate() or the model itself inside it, on this very "
            "object: a copy, a pipeline's own or another process's model is not compressed.",
            NothingCompressedWarning,
            stacklevel=4,
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


@dataclass
class _Call:
    """A call of `generate`, in its thread."""

    chat: CompressedCache | None
    """The cache that the whole text is to be compressed into anew."""
    passes: int = 0
    """Forward passes that have ended."""


class _Block:
    """One `with compressed(...)`: what every call of the model inside it goes through."""

    def __init__(
        self, model: PreTrainedModel, row: Row, policy: Policy, each_turn: bool, keep: bool
    ) -> None:
        self.model, self.row, self.policy, self.each_turn = model, row, policy, each_turn
        self.compression = Compression(keep=keep)
        self.has_compressed = False
        self._generate: Any = model.generate
        self._calls = threading.local()
        self._key = object()  # of the caches made here, which may outlive the model
        self._changed = threading.Condition()
        self._passing: set[threading.Thread] = set()
        self._ended = False

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise UserError(
            "a model cannot be copied or pickled inside its `with compressed(...)` block: the copy "
            "would be bound to it. Leave the block first."
        )

    @property
    def _call(self) -> _Call | None:
        return getattr(self._calls, "now", None)

    def end(self) -> None:
        """Let no forward pass begin, and wait for those that other threads are in."""
        with self._changed:
            self._ended = True
            others = self._passing - {threading.current_thread()}
            while any(thread.is_alive() for thread in others & self._passing):
                self._changed.wait(0.1)  # a thread may die without a word

    def generate(self, *arguments: Any, **kwargs: Any) -> Any:
        """Run the model's own `generate`, where what it is asked for can be done."""
        if self._ended:  # by one who held on to the method
            raise UserError(_ENDED)
        bound = inspect.signature(self._generate).bind_partial(*arguments, **kwargs).arguments
        given = bound | bound.get("kwargs", {})
        self._check_generate(given)
        cache = _given_cache(given)
        call, before = _Call(cache if self.each_turn else None), self._call
        if call.chat is not None:
            kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        with contextlib.nullcontext() if cache is None else cache.reserved():
            if cache is not None and not self.each_turn:
                _check_goes_on(cache, given.get("inputs", given.get("input_ids")))
            self._calls.now = call
            try:
                out = self._generate(*arguments, **kwargs)
            finally:
                self._calls.now = before
        if self._ended and not call.passes:
            raise UserError(_ENDED)
        return out

    def _check_generate(self, kwargs: dict[str, Any]) -> None:
        own = kwargs.get("generation_config") or self.model.generation_config

        def asked(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(own, name, None)

        self._check_own(_given_cache(kwargs))
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

    def _check_own(self, cache: Any) -> None:
        """Refuse a cache that no call in this block has returned."""
        if cache is None:
            return
        if not isinstance(cache, CompressedCache):
            raise UserError(_OWN_CACHE)
        if cache.owner is not self._key:
            raise UserError(ELSEWHERE)

    def before(
        self, _: torch.nn.Module, arguments: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a forward call its compressed cache; a hook that runs before it."""
        with self._changed:
            if self._ended:
                raise UserError(_ENDED)
            self._passing.add(threading.current_thread())
        if arguments:
            bound = inspect.signature(self.model.forward).bind_partial(*arguments)
            kwargs = {**bound.arguments, **kwargs}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        cache = _given_cache(kwargs)
        if self._call and _is_empty(cache):
            cache = None  # generate's own new one is not the caller's
        self._check_own(cache)
        self._check_call(kwargs)
        cache, positions = self._first(kwargs) if cache is None else self._next(cache, kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        placed = {"position_ids": positions}
        return (), rest | placed | {cache_name(self.model): cache, SESSION: cache.session}

    def after(self, _: torch.nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Hold a forward call that has ended against what was asked; a hook that runs after it.

        It runs after a call that failed too, without an output, and after one that `before` refused,
        without a session.
        """
        try:
            if SESSION in kwargs:
                cache: CompressedCache = kwargs[cache_name(self.model)]
                sound = False
                try:
                    if output is not None:
                        cache.session.passed()
                        self._count(cache, kwargs.get("input_ids"))
                        sound = True
                finally:
                    cache.let_out(sound=sound)
        finally:
            with self._changed:
                self._passing.discard(threading.current_thread())
                self._changed.notify_all()

    def _count(self, cache: CompressedCache, input_ids: Tensor | None) -> None:
        """Note a forward pass in the statistics, and its tokens in the cache."""
        call, generation, fed = self._call, cache.generation, cache.session.proof.fed
        if generation is None or (call is not None and not call.passes):
            cache.turns += 1
            rows = generation.rows if generation else kept_rows(cache.session)
            generation = Generation(cache.turns, not fed, rows, weakref.ref(cache))
            cache.generation = generation
            self.compression.add(generation)
            self.has_compressed |= generation.compressed
        else:
            generation.decode_steps += 1
        generation.appended_tokens = fed
        cache.saw(input_ids)
        if call is not None:
            call.passes += 1

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

    def _first(self, kwargs: dict[str, Any]) -> tuple[CompressedCache, Tensor]:
        """Begin a cache for the batch that is about to be prefilled; return it and the positions."""
        batch, tokens = _batch_shape(kwargs)
        lengths = _prompt_lengths(kwargs.get("attention_mask"), batch, tokens)
        check_fits(self.model.config, max(lengths), 1)
        positions = _place(left_padded(lengths, tokens, tokens), 0, kwargs)
        rows = [replace(self.row, prompt=index) for index in range(batch)]
        samples = [str(index) for index in range(batch)]
        noted = EntryPositions()
        session = session_for(self.model, rows, samples, noted, self.policy)
        session.begin(lengths, _CAPACITY)
        chat = self._call.chat if self._call and not self._call.passes else None
        cache = CompressedCache(self._key) if chat is None else chat
        with cache.entered():
            if chat is not None:
                _check_retold(chat, kwargs.get("input_ids"), lengths, self._paddings())
            cache.begin(session, tokens, noted)
        return cache, positions

    def _next(self, cache: CompressedCache, kwargs: dict[str, Any]) -> tuple[CompressedCache, Tensor]:
        """Let new tokens go on from a cache; return it and their positions."""
        with cache.entered():
            self._check_next(cache, kwargs)
            seen = cache.get_seq_length()
            _, tokens = _batch_shape(kwargs)
            positions = _place(cache.text_columns(seen + tokens), seen, kwargs)
        return cache, positions

    def _check_next(self, cache: CompressedCache, kwargs: dict[str, Any]) -> None:
        """Refuse new tokens that do not follow what a cache has seen."""
        batch, tokens = _batch_shape(kwargs)
        session, seen = cache.session, cache.get_seq_length()
        if self.each_turn and tokens > 1:
            raise UserError(
                "recompress='each_turn' compresses the whole text at each turn, and this call holds "
                "new tokens only. Give generate() the whole text and this cache, or the model the "
                "whole text and no cache."
            )
        _check_rows(cache, batch)
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

    def _paddings(self) -> set[int]:
        """Return what `generate` feeds to rows that have ended while others go on."""
        own = self.model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        return {token for token in (own.pad_token_id, *ends) if token is not None}


def _check_rows(cache: CompressedCache, batch: int) -> None:
    rows = len(cache.session.rows)
    if batch != rows:
        raise UserError(f"the batch has {batch} rows, and its cache {rows}.")


def _check_goes_on(cache: CompressedCache, text: Any) -> None:
    """Refuse a text `(batch, n)` that does not begin with what a cache has seen, as far as known."""
    seen = cache.get_seq_length()
    if not isinstance(text, Tensor):
        return
    _check_rows(cache, text.shape[0])
    if text.shape[1] <= seen:
        raise UserError(
            f"generate needs the whole text so far and what follows: the cache has seen {seen} tokens, "
            f"and {text.shape[1]} were given."
        )
    known = cache.tokens()
    if known is not None:
        differs = (text[:, :seen].to(known.device) != known).cpu() & cache.text_columns(seen)
        if bool(differs.any()):
            row, column = differs.nonzero()[0].tolist()
            raise _retold(row, column - (cache.width - cache.session.lengths[row]))


def _check_retold(
    chat: CompressedCache, text: Tensor | None, lengths: list[int], paddings: set[int]
) -> None:
    """Refuse a text `(batch, n)` that does not begin, in each row, with what a cache has seen.

    Args:
        chat: the cache.
        text: all tokens, padded on the left as these texts need it.
        lengths: tokens of each row, padding left out.
        paddings: tokens that may have followed an answer that ended before the others of its batch.
    """
    known = chat.tokens()
    if text is None or known is None:
        raise UserError(
            "recompress='each_turn' needs the token ids of the whole text, in every turn: embeddings "
            "cannot be held against those of the turns before."
        )
    _check_rows(chat, len(lengths))
    for row, length in enumerate(lengths):
        before = known[row, chat.width - chat.session.lengths[row] :].tolist()
        while before and before[-1] in paddings:
            before.pop()
        now = text[row, text.shape[1] - length :].tolist()
        if now[: len(before)] != before:
            equal = [one == other for one, other in zip(before, now, strict=False)]
            raise _retold(row, [*equal, False].index(False))


def _retold(row: int, token: int) -> UserError:
    return UserError(
        f"row {row}: from its token {token} on, the text is not what its cache has seen. Go on with "
        "the ids that were fed and generated (a chat template may write earlier turns anew), or give "
        "no cache, to begin with another text."
    )


def _place(columns: Tensor, seen: int, kwargs: dict[str, Any]) -> Tensor:
    """Return the positions `(batch, n)` of new tokens in their texts; padding does not count.

    Args:
        columns: `(batch, seen + n)` bool, which tokens are no padding.
        seen: columns before the new tokens.
        kwargs: of the call.

    Raises:
        UserError: if others are given.
    """
    _, tokens = _batch_shape(kwargs)
    columns = columns.to(_new_states(kwargs).device)
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
