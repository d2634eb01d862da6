"""From a filled prompt to the token ids of prefill, in the order of the official LongBench run.

The order decides what the model sees: the cut is made before the chat wrap, and the text of the two
halves is tokenised anew, so the result may be a few tokens longer than `max_length`
(THUDM/LongBench `LongBench/pred.py`, commit 2e00731).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.task import PromptFormat
from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_truncating_middle(
    tokenizer: PreTrainedTokenizerBase, text: str, fmt: PromptFormat, *, wrap: bool
) -> list[int]:
    """Return the token ids of `text`, its middle cut out where it exceeds `fmt.max_length` tokens.

    `wrap` puts what is left into the model's chat format (`fmt.chat`). Special tokens count
    towards the length, and are added again afterwards, except to the tokenizer's own chat
    template, which holds them. Raises UserError for an unusable format.
    """
    if fmt.max_length < 2:
        raise UserError(f"max_length must be 2 or more (one token a side), got {fmt.max_length}.")
    ids = tokens(tokenizer, text)
    if len(ids) > fmt.max_length:
        half = fmt.max_length // 2
        head, tail = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:])
        )
        text = f"{head}{tail}"
    return encode_wrapped(tokenizer, text, fmt) if wrap else tokens(tokenizer, text)


def encode_wrapped(tokenizer: PreTrainedTokenizerBase, text: str, fmt: PromptFormat) -> list[int]:
    """Return the token ids of `text` in the model's chat format (`fmt.chat`).

    Special tokens are added, except to the tokenizer's own chat template, which holds them. Raises
    UserError for an unusable format.
    """
    if fmt.chat == "none":
        return tokens(tokenizer, text)
    if fmt.chat == "template":
        return tokens(tokenizer, _fill_template(tokenizer, text, fmt), add_special_tokens=False)
    if "{prompt}" not in fmt.chat:
        raise UserError(
            f"unknown chat format {fmt.chat!r}. Give 'template' (the tokenizer's own), 'none', "
            f"or a text holding {{prompt}}, e.g. '[INST]{{prompt}}[/INST]'."
        )
    # Not str.format: prompts and wraps may hold other braces.
    return tokens(tokenizer, fmt.chat.replace("{prompt}", text))


def tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Return the token ids of a text, however long."""
    # Not verbose: the tokenizer would warn of a prompt that is about to be cut.
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
    return list(encoded["input_ids"])


def _fill_template(tokenizer: PreTrainedTokenizerBase, text: str, fmt: PromptFormat) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            "the model's tokenizer has no chat template (no chat_template.jinja). Set the model's "
            "chat format to 'none' or to a text holding {prompt}."
        )
    wrapped = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        **fmt.template_options,
    )
    return str(wrapped)
