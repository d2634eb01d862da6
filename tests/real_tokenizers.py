"""The models' own tokenizers, where `../shared/data` holds them, and what they feed prefill.

`python -m tests.real_tokenizers` records digests of the ids (`tests/golden/token_ids.json`).
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.encoding import tokens
from benchmarks.task import Sample, Task
from benchmarks.zero_scrolls.truncation import input_limit
from harness import settings
from harness.settings import Settings
from kvmerge.models import tokenizer as tokenizers
from tests.benchmarks.test_wrapped_prompts import LLAMA3_TEMPLATE

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TOKENIZERS = {
    "llama2-7b-chat": "llama2-7b",
    "llama2-13b-chat": "llama2-7b",
    "mistral-7b-instruct-v0.1": "mistral-7b",
    "mistral-7b-instruct-v0.2": "mistral-7b",
    "llama3.1-8b-instruct": "llama3.1-8b",
    "qwen2.5-7b-instruct": "qwen2.5-7b",
    "qwen3-8b": "qwen3-8b",
}
"""The tokenizer of each model, among those that may lie beside the repository."""
BENCHMARKS = ("longbench", "zero_scrolls")
DIGITS = 12
"""Of a row's digest that are recorded."""
GOLDEN = Path(__file__).parent / "golden" / "token_ids.json"


def shared(*parts: str) -> Path:
    """A folder of the data beside the repository; skips the test where it is not there."""
    folder = SHARED.joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


def tokenizer_folder(model: str) -> Path:
    return shared("tokenizers", TOKENIZERS[model])


@cache
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as a run loads it; Llama 3.1's folder has an older template than the hub's."""
    tokenizer = tokenizers.load_tokenizer(folder, lambda: folder)
    if folder.name == "llama3.1-8b":
        tokenizer.chat_template = LLAMA3_TEMPLATE
    return tokenizer


def settings_of(model: str, benchmark: str) -> Settings:
    """A run of a model on all rows beside the repository."""
    rows = shared(benchmark)
    tasks = ",".join(sorted(path.stem for path in rows.glob("*.jsonl")))
    return settings.compose(
        [
            f"model={model}",
            f"benchmark={benchmark}",
            f"benchmark.data_dir={rows}",
            f"benchmark.tasks=[{tasks}]",
        ]
    )


class Row(NamedTuple):
    """One row of a task: its place in the file, and what the harness makes of it."""

    number: int
    task: Task
    sample: Sample
    ids: list[int]
    """Fed to prefill."""
    cut: bool


def rows_fed(model: str, benchmark: str, every: int = 1) -> Iterator[Row]:
    """Yield what prefill is fed, of every row or of every n-th of each task."""
    run = settings_of(model, benchmark)
    tokenizer, fmt = load_tokenizer(tokenizer_folder(model)), run.prompt_format
    for task in run.benchmark.tasks:
        limit = input_limit(fmt, task.max_new_tokens) if benchmark == "zero_scrolls" else fmt.max_length
        for number, sample in list(enumerate(run.benchmark.samples(task)))[::every]:
            ids = run.benchmark.encode(sample, task, tokenizer, fmt).prompt
            cut = len(tokens(tokenizer, sample.prompt)) > limit
            yield Row(number, task, sample, ids, cut)


def digest(ids: Iterable[int]) -> str:
    """The SHA-256 of ids as little-endian int32."""
    given = list(ids)
    return hashlib.sha256(struct.pack(f"<{len(given)}i", *given)).hexdigest()


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What is recorded of a task: a digest of all ids, and each row's first digits."""
    ids = [token for row in rows for token in row.ids]
    return {
        "rows": len(rows),
        "ids": len(ids),
        "cut": sum(row.cut for row in rows),
        "sha256": digest(ids),
        "each": " ".join(digest(row.ids)[:DIGITS] for row in rows),
    }


def summaries(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """The summaries of a benchmark's rows, by task."""
    by_task = groupby(rows, key=lambda row: row.task.name)
    return {task: summary(list(of_task)) for task, of_task in by_task}


def record() -> None:
    """Write what the tokenizers give now."""
    found = {
        model: {name: summaries(rows_fed(model, name)) for name in BENCHMARKS} for model in TOKENIZERS
    }
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if not SHARED.is_dir():
        sys.exit(f"{SHARED} is not there: nothing to record from.")
    record()
