"""Where a prompt's question begins: what a cache that serves several questions cannot have seen."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = "{context}"
_WINDOW = 64
"""Tokens at the end of a prompt that are looked through first."""
_TELLING = 20
"""Characters of a question that do not stand at the end of a context by chance."""


def after_context(template: str, fields: Mapping[str, Any] | None = None) -> str | None:
    """Return what follows `{context}` in a template, filled; None where that is nothing but blanks.

    Args:
        template: a prompt template that holds `{context}` once.
        fields: what fills its other places; None leaves them as they are.
    """
    rest = template.partition(CONTEXT)[2]
    return stated(rest if fields is None else rest.format_map(fields))


def stated(question: str) -> str | None:
    """Return a question without the blanks around it; None where nothing else is there."""
    return question.strip() or None


def question_start(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], question: str) -> int:
    """Return the index of the first token that holds a part of a prompt's question.

    A token that holds the end of the context as well belongs to the question. Where the prompt was cut
    inside the question, what is left of it counts.

    Args:
        tokenizer: which made the ids.
        ids: tokens of the whole prompt, cut and wrapped.
        question: text from the end of the context on, without the blanks around it.

    Raises:
        UserError: if the question does not stand at the prompt's end, or leaves no context before it.
    """
    whole = _text(tokenizer, ids)
    # a suffix of one that is there is there: the longest is found by halving
    kept = _last(range(len(question) + 1), lambda length: question[len(question) - length :] in whole)
    left = question[len(question) - kept :]
    start = _start(tokenizer, ids, left) if left else len(ids)
    if kept < len(question) and _ends_within(_text(tokenizer, ids[:start]), question[:-kept]):
        kept = 0
    if not kept or not start:
        shown = question if len(question) <= 60 else f"{question[:57]}..."
        raise UserError(
            f"no context is left before the question {shown!r} of a prompt of {len(ids)} tokens. Raise "
            "model.max_length if the prompt was cut, or use question=inside."
        )
    return start


def _start(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> int:
    """Return the last index from which on the tokens hold a text that stands among them."""
    window = _WINDOW
    while window < len(ids) and text not in _text(tokenizer, ids[-window:]):
        window *= 2
    first = max(0, len(ids) - window)
    return _last(range(first, len(ids)), lambda begin: text in _text(tokenizer, ids[begin:]))


def _last(numbers: range, holds: Callable[[int], bool]) -> int:
    """Return the last number for which something holds: for the first, and up to that one for all."""
    return numbers[bisect_left(numbers, True, key=lambda number: not holds(number)) - 1]


def _ends_within(text: str, question: str) -> bool:
    """Return whether a text goes on into the beginning of a question."""
    return any(text.endswith(question[:length]) for length in range(_TELLING, len(question) + 1))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # special tokens too: nothing that stands between must go unseen
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
