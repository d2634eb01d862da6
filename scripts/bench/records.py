"""How long does a folder of very many records take, and how much memory?

The records are made up, of the sizes that those of a 32-layer model on LongBench have: 21 tasks of 500
samples in 30 cells, all but the full cache at one budget, so that every two of them are compared.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.longbench.tasks import TASKS
from benchmarks.task import Task
from harness.prompts import CHARACTERS, Prompt, prompt_path
from harness.records import Record, prediction_path
from kvmerge.names import parse_name
from kvmerge.places import choices
from scripts.bench.measure import Bench, Report
from scripts.bench.record_steps import STEPS

SAMPLES = 500
CELLS = 30
LAYERS = 32
BUDGET = 0.35
_WORDS = ("the", "river", "government", "is", "a", "committee,", "“costs”", "évidence", "report")


def records(bench: Bench) -> Report:
    """Measure what resuming, the summary and the report take, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_folder(folder)
        rows = [_measured(step, folder) for step in STEPS]
    return Report(
        "records",
        f"{len(TASKS) * SAMPLES * CELLS:,} records in a folder",
        f"{len(TASKS)} tasks, {SAMPLES} samples, {CELLS} cells, {size / 1e6:.0f} MB of predictions; a "
        "process each. CPU seconds are of all threads, memory is the peak of the process.",
        rows,
        "5 s to resume, 60 s for the summary and the report, 1 GiB",
        model="made-up",
        dtype="none",
    )


def _measured(step: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "scripts.bench.record_steps", step, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"step": step} | json.loads(done.stdout.splitlines()[-1])


def cells_of(count: int) -> list[str]:
    """Return the full cache, and other methods at one budget."""
    others = [name for name in choices("method") if name != "full"]
    return ["full@1", *(f"{name}@{BUDGET}" for name in others[: count - 1])]


def write_folder(folder: Path, samples: int = SAMPLES, cells: int = CELLS) -> int:
    """Write rows and records as a finished run of LongBench leaves them; return their bytes."""
    rng = random.Random(0)
    names_of_cells = cells_of(cells)
    for task in TASKS:
        rows, prompts = [], []
        by_cell: dict[str, list[str]] = {cell: [] for cell in names_of_cells}
        for number in range(samples):
            row, prompt = _sample(rng, task, f"{task.name}-{number:06x}{rng.getrandbits(64):016x}")
            rows.append(json.dumps(row))
            prompts.append(prompt.to_json())
            ease = rng.random()
            for cell in names_of_cells:
                by_cell[cell].append(_record(rng, task, cell, prompt, row["answers"], ease).to_json())
        _write(folder / "data" / f"{task.name}.jsonl", rows)
        _write(prompt_path(folder / "run", task.name), prompts)
        for cell, lines in by_cell.items():
            _write(prediction_path(folder / "run", task.name, cell), lines)
    info: dict[str, Any] = {
        "model": "made-up-7b",
        "benchmark": "longbench",
        "tasks": {
            task.name: {
                "metric": task.metric.name,
                "max_new_tokens": task.max_new_tokens,
                "samples": samples,
            }
            for task in TASKS
        },
        "cells": names_of_cells,
    }
    (folder / "run" / "run.json").write_text(json.dumps(info))
    return sum(path.stat().st_size for path in folder.glob("run/predictions/*/*.jsonl"))


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _text(rng: random.Random, tokens: int) -> str:
    return " ".join(rng.choices(_WORDS, k=max(1, int(0.75 * tokens))))


def _sample(rng: random.Random, task: Task, name: str) -> tuple[dict[str, Any], Prompt]:
    """Return a row of the benchmark, short of its context, and the prompt that is recorded of it."""
    answers = [  # every metric finds in them what it looks for
        f"Paragraph {n}, 段落{n}: {_text(rng, rng.randint(2, task.max_new_tokens))}"
        for n in range(1, 1 + rng.randint(1, 3))
    ]
    row = {
        "input": _text(rng, 20),
        "context": _text(rng, 50),
        "answers": answers,
        "all_classes": answers,
        "dataset": task.name,
        "length": 50,
        "language": "en",
        "_id": name,
    }
    ends = [_text(rng, 600)[:CHARACTERS] for _ in range(2)]
    tokens = rng.randint(1500, 3500)
    return row, Prompt(
        id=name,
        prompt_hash=f"{rng.getrandbits(64):016x}",
        prompt_tokens=tokens,
        head=ends[0],
        tail=ends[1],
    )


def _record(
    rng: random.Random, task: Task, cell: str, prompt: Prompt, answers: list[str], ease: float
) -> Record:
    budget = float(parse_name(cell).budget.value)
    length = prompt.prompt_tokens
    kept = [round(budget * length) + rng.randint(0, 32) / 32 * (budget < 1) for _ in range(LAYERS)]
    generated = rng.randint(1, task.max_new_tokens)
    right = rng.random() < ease
    return Record(
        id=prompt.id,
        seed=0,
        prediction=_text(rng, generated),
        answers=tuple(answers),
        score=1.0 if right else max(0.0, round(rng.random(), 17) - 0.3),
        prompt_hash=prompt.prompt_hash,
        prompt_tokens=length,
        generated_tokens=generated,
        kept_entries=sum(kept) / LAYERS,
        budget_achieved=sum(kept) / LAYERS / length,
        kv_bytes=int(sum(kept)) * 16384,
        kl_to_full=round(rng.expovariate(3), 4) if budget < 1 else 0.0,
        top1_agreement=rng.randint(0, generated) / generated,
        fidelity_tokens=generated,
        context_tokens=length,
        question_tokens=0,
        requested_entries=round(budget * length),
        kept_entries_by_layer=kept,
        kept_entries_min=int(min(kept)),
        kept_entries_max=int(max(kept)),
        read_entries=sum(kept) / LAYERS,
        kv_bytes_full=length * LAYERS * 16384,
        size_bytes=0,
        merged_tokens=rng.random() * length,
        evicted_tokens=rng.random() * length,
        prefill_seconds=round(rng.random(), 4),
        decode_seconds=round(rng.random(), 4),
        finish_reason="length" if generated == task.max_new_tokens else "stop",
        batch_samples=4,
        batch_rows=120,
        threads=8,
        kernel="tiled-onednn+packed/float32",
    )
