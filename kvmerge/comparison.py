"""`compare`: several methods and budgets on prompts of your own, as one table.

    compare(model, tokenizer, ["Who wrote ...?"], ["full@1", "h2o@0.35", "kvmerger@0.35"])

It is the harness's engine without its files: one prefill a prompt serves every cell, and the cells
decode together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmerge.budget import Budget
from kvmerge.cells import Cell, parse_cells
from kvmerge.engine import RowResult, Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.families import check_family
from kvmerge.hook import check_generates
from kvmerge.models import end_token_ids
from kvmerge.resolve import load_method
from kvmerge.session import Row

Prompt: TypeAlias = str | Sequence[Mapping[str, str]]
"""A text, or a chat as the tokenizer's template takes it: messages with `role` and `content`."""

COLUMNS = (
    "prompt",
    "cell",
    "method",
    "budget",
    "text",
    "prompt_tokens",
    "generated_tokens",
    "kept_entries",
    "kv_bytes",
    "kl_to_full",
    "top1_agreement",
)
"""Of the table. The figures are a record's (`harness.records.Record`), by the same names."""


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    cells: Sequence[str],
    *,
    max_new_tokens: int = 64,
    chat: bool = True,
    seed: int = 0,
    fidelity: bool = True,
) -> pd.DataFrame:
    """Answer every prompt greedily from every cell's cache.

    Args:
        model: a decoder of a supported family, on any device; it is left as it was.
        tokenizer: its tokenizer.
        prompts: texts, or chats (lists of messages).
        cells: methods at budgets by name, e.g. `full@1`, `kvmerger:sigma=mean_distance@0.35`.
        max_new_tokens: the most tokens of an answer; the model's end tokens end it before.
        chat: put a text into the tokenizer's chat template, as a user's message; a tokenizer without
            one, and `False`, take the text as it is.
        seed: for methods that draw.
        fidelity: measure every cell against the full cache, which is run for it if it is no cell.

    Returns:
        a line a prompt and cell, in the order given, with `COLUMNS`. `prompt` is the prompt's number
        from 0, `text` the answer, `kept_entries` the mean over layers and KV heads after the prefill,
        `kv_bytes` the bytes of these keys and values, `kl_to_full` (nats) and `top1_agreement` (0 to
        1) the means along the full cache's answer, NaN where it has one token only or `fidelity` is
        off.

    Raises:
        UserError: for an unsupported model, no prompt, a prompt that is empty or longer than
            the model's sliding window, a chat without a template, and cells that are none, unknown or
            listed twice.
    """
    check_family(model.config)
    check_generates(model)
    for name, given in (("prompts", prompts), ("cells", cells)):
        if isinstance(given, str):
            raise UserError(
                f"{name} must be a list, and {given[:40]!r} is one text; give [{name[:-1]}]."
            )
    if not prompts:
        raise UserError("there are no prompts to answer; give at least one text or chat.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    compared = parse_cells(cells)
    rows = [Row(cell.method, cell.budget, seed, cell=cell.name) for cell in compared]
    reference = None
    if fidelity:
        reference = next((index for index, cell in enumerate(compared) if cell.is_full), len(rows))
        if reference == len(rows):
            rows.append(Row(load_method("full"), Budget.parse(1)))
    encoded = [_encode(tokenizer, prompt, index, chat) for index, prompt in enumerate(prompts)]
    stop = Stop(max_new_tokens, end_token_ids(model, tokenizer))
    lines = []
    for index, ids in enumerate(encoded):
        prompt = torch.tensor([ids], device=model.device)
        try:
            results, _ = run_sample(
                model, prompt, rows, stop, sample_id=str(index), reference=reference
            )
        except UserError as error:
            raise UserError(f"prompt {index} ({len(ids)} tokens): {error}") from error
        lines += [
            {"prompt": index, "prompt_tokens": len(ids), **_line(tokenizer, cell, result)}
            for cell, result in zip(compared, results, strict=False)
        ]
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int, chat: bool) -> list[int]:
    """Return the token ids of a prompt. Raises `UserError` for what is empty or no prompt."""
    if not prompt:
        raise UserError(f"prompt {index} is empty; give some text.")
    if isinstance(prompt, Mapping):
        raise UserError(f"prompt {index} is one message; a chat is a list of them.")
    if isinstance(prompt, str):
        if not (chat and tokenizer.chat_template):
            return list(tokenizer(prompt, verbose=False)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if not tokenizer.chat_template:
        raise UserError(
            f"prompt {index} is a chat, and the tokenizer has no chat template; give a text."
        )
    messages = [dict(message) for message in prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # the template holds its special tokens itself
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _line(tokenizer: PreTrainedTokenizerBase, cell: Cell, result: RowResult) -> dict[str, object]:
    return {
        "cell": cell.name,
        "method": cell.method_name,
        "budget": cell.budget.value,
        "text": tokenizer.decode(result.token_ids, skip_special_tokens=True),
        "generated_tokens": len(result.token_ids),
        "kept_entries": result.stats.kept_entries,
        "kv_bytes": result.stats.kv_bytes + result.stats.local_bytes,
        "kl_to_full": result.fidelity.kl if result.fidelity else float("nan"),
        "top1_agreement": result.fidelity.top1 if result.fidelity else float("nan"),
    }
