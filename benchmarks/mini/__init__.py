"""The mini benchmark: seven tasks that a small model can do, built on the user's own machine.

The rows are in the layout of LongBench and are scored by its metrics. Their text comes from the
docstrings and sources of locked packages and from generators (`tasks.py`), so that every machine
builds the same files: their SHA-256 is committed, the text is not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from benchmarks.task import Task


@functools.cache
def template(name: str) -> str:
    """Return the prompt template of a task."""
    path = files(__package__) / "prompts" / f"{name}.txt"
    # Bytes, because reading text would translate line ends.
    return path.read_bytes().decode("utf-8")


def prompt(task: Task, row: Mapping[str, Any]) -> str:
    """Return the task's template filled with a row, neither cut nor wrapped."""
    return template(task.name).format_map(row)
