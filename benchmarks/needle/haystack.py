"""Where a needle goes in a book, in tokens: the construction of the common needle test.

Follows `run_needle_in_haystack.py` of Zefan-Cai/KVCache-Factory at commit c97f9d7. Only a book need
not begin at the start of its text, and a full stop is told by what a token decodes to: that gives the
ids which are listed there for Llama (29889, 869), Llama 3 (13) and Mistral (842, 28723), and other
models need no list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from benchmarks.encoding import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_A_TOKEN = 8
"""Of the text to tokenise at first: more than prose has, so that once is mostly enough."""


def book_ids(tokenizer: PreTrainedTokenizerBase, text: str, start: int, count: int) -> list[int]:
    """Return the first `count` tokens of `text` from the character `start` on.

    At its end the text begins anew, as often as needed. No special tokens.
    """
    rotated = text[start:] + text[:start]
    characters = _CHARACTERS_A_TOKEN * (count + 1)
    while True:
        repeats = -(-characters // len(rotated))
        ids = tokens(tokenizer, (rotated * repeats)[:characters], add_special_tokens=False)
        # One more, because the last one may be a word cut in two.
        if len(ids) > count:
            return ids[:count]
        characters *= 2


def insertion_point(ids: Sequence[int], depth: int, ends_sentence: Callable[[int], bool]) -> int:
    """Return where a needle at `depth` percent goes: an index into `ids`.

    The cut at `int(len(ids) * depth / 100)` moves back to behind the last token before it that ends
    a sentence, or to the start if none does; 100 is the end itself.
    """
    if depth == 100:
        return len(ids)
    cut = int(len(ids) * (depth / 100))
    while cut and not ends_sentence(ids[cut - 1]):
        cut -= 1
    return cut


def hide(
    tokenizer: PreTrainedTokenizerBase, book: Sequence[int], needle: Sequence[int], depth: int
) -> list[int]:
    """Return the tokens of a book with the needle put in at `depth` percent."""
    cut = insertion_point(book, depth, lambda token: str(tokenizer.decode([token])).strip() == ".")
    return [*book[:cut], *needle, *book[cut:]]
