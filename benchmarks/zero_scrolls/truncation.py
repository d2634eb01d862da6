"""From a ZeroSCROLLS row to the token ids of prefill: the document is cut, never the query.

The rule is that of the official run on local models (tau-nlp/zero_scrolls
`experiments/hf/run_hf_model.py`, commit c994676, MIT). That code serves T5; what a chat model needs
beyond it is said at `encode_cutting_document`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.encoding import encode_wrapped, tokens
from benchmarks.task import PromptFormat
from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_REQUEST = "Do not provide any explanation."
"""Sentence that the official run on chat APIs adds (`experiments/api/api.py`, MIT)."""

MARGIN = 16
"""Positions left free between prompt, answer and the end of the context, for the chat wrap."""


@dataclass(frozen=True)
class Parts:
    """A prompt where it can be cut."""

    head: str
    """Instruction and document."""
    separator: str
    """What stands after a document that was cut, e.g. `... [The rest of the story is omitted]`."""
    query: str
    """Query and answer cue."""

    @property
    def whole(self) -> str:
        """The prompt uncut."""
        return self.head + self.query

    @property
    def suffix(self) -> str:
        """What follows a cut document."""
        return self.separator + self.query


def split(row: Mapping[str, Any]) -> Parts:
    """Return the parts of a row's `input`, whose indices count characters."""
    at = row["query_start_index"]
    return Parts(row["input"][:at], row["truncation_seperator"], row["input"][at:])


def split_for_chat(row: Mapping[str, Any], *, request: bool) -> Parts:
    """Return the parts as the official run on chat APIs has them.

    The answer cue after the query goes. With `request`, `FORMAT_REQUEST` is added to the
    instruction, the text before the first blank line, and the indices move along. They move by the
    length of what is added even where spare blanks around the instruction go, as officially.
    Raises UserError if no blank line ends the instruction.
    """
    text, start, end = row["input"], row["query_start_index"], row["query_end_index"]
    if request:
        instruction, blank, rest = text.partition("\n\n")
        if len(instruction) >= start:
            raise UserError(
                "no blank line ends the instruction, so there is no place for the format request. "
                "Use benchmark.chat=wrap."
            )
        text = f"{instruction.strip()} {FORMAT_REQUEST}{blank}{rest}"
        start += len(FORMAT_REQUEST) + 1
        end += len(FORMAT_REQUEST) + 1
    return Parts(text[:start], row["truncation_seperator"], text[start:end])


def input_limit(fmt: PromptFormat, max_new_tokens: int) -> int:
    """Return the most tokens of a prompt: what the model allows and its context leaves to it."""
    if fmt.context is None:
        return fmt.max_length
    return min(fmt.max_length, fmt.context - max_new_tokens - MARGIN)


def encode_cutting_document(
    tokenizer: PreTrainedTokenizerBase, parts: Parts, limit: int, fmt: PromptFormat, *, wrap: bool
) -> list[int]:
    """Return the token ids of a prompt of at most `limit` tokens, special ones included.

    A longer prompt keeps its suffix whole and as many tokens of the head as there is room for. The
    suffix is tokenised by itself and without special tokens, so that the beginning-of-text token
    stands at the front alone. Without a chat wrap these ids are fed as they are.

    With `wrap` and a chat format (`fmt.chat`), the head's ids are decoded, the suffix is appended,
    and the wrapped text is tokenised once, in LongBench's order: cut, then wrap. The wrap, and the
    seam tokenised anew, come on top of `limit`; `MARGIN` is there for them.

    Raises UserError if the suffix alone does not fit, and for an unusable format.
    """
    wrap = wrap and fmt.chat != "none"
    ids = tokens(tokenizer, parts.whole)
    if len(ids) <= limit:
        return encode_wrapped(tokenizer, parts.whole, fmt) if wrap else ids
    suffix = tokens(tokenizer, parts.suffix, add_special_tokens=False)
    special = len(tokens(tokenizer, ""))
    room = limit - len(suffix)
    if room < special:
        raise UserError(
            f"the prompt may have {limit} tokens, but what must follow its document already has "
            f"{len(suffix) + special} (separator, query and special tokens). Raise "
            f"benchmark.max_length or the model's, or lower benchmark.max_new_tokens."
        )
    head = tokens(tokenizer, parts.head)[:room]
    if not wrap:
        return head + suffix
    text = str(tokenizer.decode(head, skip_special_tokens=True)) + parts.suffix
    return encode_wrapped(tokenizer, text, fmt)
