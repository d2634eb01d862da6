"""The real tokenizers: what prefill is fed equals the official pipelines on the raw `tokenizer.json`.

The restatement is independent of the harness and of transformers: it reads `tokenizer.json` with the
`tokenizers` library and writes each wrap out. LongBench's pred.py knows Llama 2's wrap alone; those of
the other models, and ZeroSCROLLS for chat models, are the rules of docs/models.md, restated.
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer

from tests.real_tokenizers import (
    BENCHMARKS,
    DIGITS,
    GOLDEN,
    TOKENIZERS,
    digest,
    rows_fed,
    summaries,
    tokenizer_folder,
)

EVERY = int(os.environ.get("KVMERGE_EVERY_ROW", "24"))
"""Every n-th row of a task is looked at: 1 takes two minutes, and compares the totals too."""
UNWRAPPED = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
"""As in pred.py."""
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QWEN2 = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n"
)
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
INST = "[INST]{}[/INST]"


class Rule(NamedTuple):
    """A model's limits and wrap, as docs/models.md has them."""

    max_length: int
    context: int
    wrap: str


RULES = {
    "llama2-7b-chat": Rule(3500, 4096, INST),
    "llama2-13b-chat": Rule(3500, 4096, INST),
    "mistral-7b-instruct-v0.1": Rule(3500, 32768, INST),
    "mistral-7b-instruct-v0.2": Rule(31500, 32768, INST),
    "llama3.1-8b-instruct": Rule(31500, 131072, LLAMA3),
    "qwen2.5-7b-instruct": Rule(31500, 32768, QWEN2 + CHATML),
    "qwen3-8b": Rule(31500, 40960, CHATML + "<think>\n\n</think>\n\n"),
}


@cache
def raw(model: str) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder(model) / "tokenizer.json"))


def wrapped(model: str, text: str) -> list[int]:
    wrap = RULES[model].wrap
    said = text.strip() if wrap is LLAMA3 else text  # Llama 3's template trims what is said
    before, after = wrap.split("{}")
    return list(raw(model).encode(before + said + after, add_special_tokens=wrap is INST).ids)


def longbench(model: str, task: str, prompt: str) -> tuple[list[int], bool]:
    """The ids of pred.py, and whether the middle was cut out."""
    encoder, limit = raw(model), RULES[model].max_length
    ids = encoder.encode(prompt).ids
    cut = len(ids) > limit
    if cut:
        half = limit // 2
        prompt = "".join(
            encoder.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:])
        )
    if task not in UNWRAPPED:
        return wrapped(model, prompt), cut
    return (list(encoder.encode(prompt).ids) if cut else ids), cut


def zero_scrolls(model: str, row: dict[str, Any], answer: int) -> tuple[list[int], bool]:
    """The ids of a row whose document is cut at its end, and whether it was."""
    encoder, rule = raw(model), RULES[model]
    limit = min(rule.max_length, rule.context - answer - 16)
    text, at = row["input"], row["query_start_index"]
    cut = len(encoder.encode(text).ids) > limit
    if cut:
        suffix = row["truncation_seperator"] + text[at:]
        room = limit - len(encoder.encode(suffix, add_special_tokens=False).ids)
        text = encoder.decode(encoder.encode(text[:at]).ids[:room], skip_special_tokens=True) + suffix
    return wrapped(model, text), cut


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("model", TOKENIZERS)
def test_prefill_is_fed_the_recorded_ids_of_the_official_pipeline(model: str, benchmark: str) -> None:
    tokenizer_folder(model)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[model][benchmark]
    rows = list(rows_fed(model, benchmark, EVERY))
    for row in rows:
        name, sample = row.task.name, row.sample
        if benchmark == "longbench":
            expected = longbench(model, name, sample.prompt)
        else:
            expected = zero_scrolls(model, dict(sample.row), row.task.max_new_tokens)
        assert (row.ids, row.cut) == expected, (name, sample.id)
        assert digest(row.ids)[:DIGITS] == golden[name]["each"].split()[row.number], (name, sample.id)
    assert {row.task.name for row in rows} == set(golden)
    if EVERY == 1:
        assert summaries(rows) == golden
