"""Build the data files of the mini benchmark, and keep them in the user's cache directory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.loading import read_bytes, sha256
from benchmarks.mini.tasks import MAKERS
from benchmarks.task import Task
from kvmerge.errors import UserError

VERSION = "1"
"""Goes up whenever a data file, a prompt or a task's settings change."""

SAMPLES = 20
"""Samples of each task."""

ROOM = {"short": 950, "long": 2850}
"""What context and input should fill, as `text.size` counts: about 1,000 and 3,000 tokens."""


def expected_sha256(length: str) -> dict[str, str]:
    """Return the SHA-256 that each task's file has where the locked packages are installed."""
    text = (files(__package__) / "sha256.json").read_text(encoding="utf-8")
    digests: dict[str, dict[str, str]] = json.loads(text)
    return digests[length]


def build(task: Task, length: str) -> bytes:
    """Return a task's data file: JSON lines in the layout of LongBench.

    Raises UserError if a package that the text comes from is not installed.
    """
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(task, length))
    return "".join(lines).encode("utf-8")


def cached(task: Task, length: str, cache: Path) -> tuple[bytes, Path]:
    """Return a task's data file and its place under `cache`, building it unless it is there.

    A file with another SHA-256 than expected is built anew: it may be damaged, or come from
    another version of the packages. Raises UserError if it can be neither built nor written.
    """
    path = cache / f"mini-v{VERSION}" / length / f"{task.name}.jsonl"
    if path.is_file():
        data = read_bytes(path)
        if sha256(data) == expected_sha256(length)[task.name]:
            return data, path
    data = build(task, length)
    try:
        _write(path, data)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Set KVMERGE_CACHE to a folder that "
            f"can be written."
        ) from error
    return data, path


def _rows(task: Task, length: str) -> Iterator[dict[str, Any]]:
    rng = Random(f"mini {VERSION} {length} {task.name}")
    seen: set[tuple[str, str]] = set()
    while len(seen) < SAMPLES:
        made = MAKERS[task](rng, ROOM[length])
        if (made.input, made.answer) in seen:
            continue
        yield {
            "input": made.input,
            "context": made.context,
            "answers": [made.answer],
            "length": len(made.context.split()),
            "dataset": task.name,
            "language": "en",
            "all_classes": made.all_classes,
            "_id": f"{task.name}-{len(seen):02d}",
        }
        seen.add((made.input, made.answer))


def _write(path: Path, data: bytes) -> None:
    """Write a file in one step, so that runs side by side never read a half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
