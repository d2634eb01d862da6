"""Build the data files of the mini benchmark, in memory: all seven take about 3 seconds."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib.resources import files
from random import Random
from typing import Any

from benchmarks.mini.tasks import ASKERS, MAKERS, Made
from benchmarks.task import Task

VERSION = "1"
"""Goes up whenever a data file, a prompt or a task's settings change."""

SAMPLES = 20
"""Samples of each task."""

ROOM = {"short": 950, "long": 2850}
"""What context and input should fill, as `text.size` counts: about 1,000 and 3,000 tokens."""

SHARED = "shared"
"""What the file of digests calls the tasks whose contexts have several questions."""
CONTEXTS = 5
"""Contexts of each such task."""
QUESTIONS = 6
"""Questions about each context."""


@functools.cache
def expected_sha256(length: str) -> dict[str, str]:
    """Return the SHA-256 that each task's file has where the locked packages are installed."""
    text = (files(__package__) / "sha256.json").read_text(encoding="utf-8")
    digests: dict[str, dict[str, str]] = json.loads(text)
    return digests[length]


def build(task: Task, length: str) -> bytes:
    """Return a task's data file: JSON lines in the layout of LongBench.

    Args:
        task: one of `MAKERS`, or of `ASKERS` where contexts are shared.
        length: of `ROOM`, or `SHARED`: contexts of the short length, with several questions each.

    Raises UserError if a package that the text comes from is not installed.
    """
    rows = _shared_rows(task) if length == SHARED else _rows(task, length)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return "".join(lines).encode("utf-8")


def _rows(task: Task, length: str) -> Iterator[dict[str, Any]]:
    rng = Random(f"mini {VERSION} {length} {task.name}")
    seen: set[tuple[str, str]] = set()
    while len(seen) < SAMPLES:
        made = MAKERS[task](rng, ROOM[length])
        if (made.input, made.answer) in seen:
            continue
        yield _row(task, made, f"{task.name}-{len(seen):02d}")
        seen.add((made.input, made.answer))


def _shared_rows(task: Task) -> Iterator[dict[str, Any]]:
    rng = Random(f"mini {VERSION} {SHARED} {task.name}")
    asked: list[list[Made]] = []
    while len(asked) < CONTEXTS:
        questions = ASKERS[task](rng, ROOM["short"])
        if len(questions) >= QUESTIONS:
            asked.append(rng.sample(questions, QUESTIONS))
    for context, questions in enumerate(asked):
        for number, made in enumerate(questions):
            yield _row(task, made, f"{task.name}-{context}-{number}")


def _row(task: Task, made: Made, name: str) -> dict[str, Any]:
    return {
        "input": made.input,
        "context": made.context,
        "answers": [made.answer],
        "length": len(made.context.split()),
        "dataset": task.name,
        "language": "en",
        "all_classes": made.all_classes,
        "_id": name,
    }
