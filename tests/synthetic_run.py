"""Output folders as a run would write them, made from numbers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.records import Record, prediction_path

SETTINGS: dict[str, Any] = {
    "model": "toy-1m",
    "benchmark": "toy",
    "seeds": [42],
    "dtype": "float32",
    "fingerprint": {"data": {"t": "abc"}},
    "config": {"decode_policy": "append"},
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "packages": {"torch": "2.13.0"},
}


def record(sample: str, score: float, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "id": sample,
        "seed": 42,
        "prediction": "Grüße\n2",
        "answers": ("a", "b"),
        "score": score,
        "prompt_hash": "cafe",
        "prompt_tokens": 100,
        "generated_tokens": 3,
        "kept_entries": 50.0,
        "budget_achieved": 0.5,
        "kv_bytes": 1000,
        "kv_bytes_full": 2000,
    }
    return Record(**(values | fields))


def write_run(
    folder: Path,
    tasks: Mapping[str, str],
    cells: Mapping[str, Mapping[str, Iterable[Record]]],
    **info: Any,
) -> Path:
    """`tasks`: metric by task; `cells`: records by cell name, then task."""
    folder.mkdir(parents=True, exist_ok=True)
    run = SETTINGS | {
        "tasks": {task: {"metric": metric} for task, metric in tasks.items()},
        "cells": list(cells),
    }
    (folder / "run.json").write_text(json.dumps(run | info))
    for cell, by_task in cells.items():
        for task, records in by_task.items():
            lines = "".join(record.to_json() + "\n" for record in records)
            if lines:
                path = prediction_path(folder, task, cell)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(lines)
    return folder
