"""A tiny checkpoint and tiny LongBench files on disk: whole runs without network, in a second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from harness import settings
from harness.records import CIRCUMSTANCES, KL_DECIMALS
from harness.settings import Settings
from tests.tiny import new_model

TASKS = ("qasper", "trec", "samsum", "lcc")
CELLS = "cells=[full@1,kvmerger@0.5,h2o@0.5,cam@0.5]"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WORDS = (
    "The river was high in spring and the old mill stood still . "
    "A question about the bridge : who built it , and when was it built ? "
    "def read ( path ) : return open ( path ) . read ( ) \n"
    "Answer the question as concisely as you can , using a single phrase if possible . "
)


def save_checkpoint(folder: Path) -> Path:
    """A random two-layer Llama with a byte-level tokenizer of about 300 tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    new_model(vocab_size=len(fast), max_position_embeddings=2048).save_pretrained(folder)
    return folder


def row(task: str, number: int, **fields: Any) -> dict[str, Any]:
    """One LongBench row of a task."""
    answers = {"trec": ["Date"], "lcc": ["return 1"]}.get(task, [f"answer {number}"])
    return {
        "input": f"When was bridge {number} built?",
        "context": " ".join(f"Bridge {i} was built in {1800 + i * number}." for i in range(4)),
        "answers": answers,
        "all_classes": ["Date", "Place", "Person"] if task == "trec" else None,
        "dataset": task,
        "length": 40,
        "language": "en",
        "_id": f"{task}-{number}",
    } | fields


def write_rows(folder: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write `<task>.jsonl` for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, of_task in rows.items():
        lines = [json.dumps(each) + "\n" for each in of_task]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def compose(*overrides: str) -> Settings:
    """The settings of a command line, as `run.py` composes them."""
    return settings.compose(overrides)


def tiny_settings(checkpoint: Path, rows: Path, folder: Path, *overrides: str) -> Settings:
    """A run of `CELLS` with the tiny model on all of `TASKS`; overrides change it."""
    defaults = {
        "benchmark": "longbench",
        "benchmark.data_dir": str(rows),
        "benchmark.tasks": f"[{','.join(TASKS)}]",
        "model.path": str(checkpoint),
        "num_seeds": "2",
        "output_dir": str(folder),
    }
    chosen = {text.partition("=")[0] for text in overrides}
    cells = [] if chosen & {"cells", "method", "budget"} else [CELLS]
    kept = [f"{key}={value}" for key, value in defaults.items() if key not in chosen]
    return compose(*kept, *cells, *overrides)


Key = tuple[str, str, int, str]
"""Task, cell, seed and sample of a line."""


def read_lines(output_dir: Path) -> dict[Key, dict[str, Any]]:
    """Every line under predictions/, without how it was run, which no two runs share."""
    found: dict[Key, dict[str, Any]] = {}
    for path in sorted(output_dir.glob("predictions/*/*.jsonl")):
        for text in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            line = json.loads(text)
            key = (path.parent.name, path.stem, line["seed"], line["id"])
            assert key not in found, f"{key} is there twice"
            found[key] = {name: value for name, value in line.items() if name not in CIRCUMSTANCES}
    return found


def assert_same_lines(found: dict[Key, dict[str, Any]], wanted: dict[Key, dict[str, Any]]) -> None:
    """Equal lines; `kl_to_full` to its last digit, since a batch of other rows rounds otherwise."""
    unit = 10.0**-KL_DECIMALS
    assert found.keys() == wanted.keys()
    for key, line in wanted.items():
        assert found[key] == {
            name: pytest.approx(value, rel=0, abs=1.001 * unit)
            if name == "kl_to_full" and value
            else value
            for name, value in line.items()
        }
