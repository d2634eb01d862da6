"""The tasks of the needle test: what is hidden, and how it is asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any

from benchmarks.needle.metrics import NUMBER, RECALL, ROUGE1_F
from benchmarks.task import Task
from kvmerge.errors import unknown

_DECODING: dict[str, Any] = {"max_new_tokens": 30, "stop_at_newline": True}

TASKS: tuple[Task, ...] = (
    Task("number", NUMBER, **_DECODING),
    Task("sandwich_recall", RECALL, **_DECODING),
    Task("sandwich_rouge1", ROUGE1_F, **_DECODING),
)
"""The three tasks; the two of the sandwich have the same prompts and differ in their score."""

_BY_NAME = {task.name: task for task in TASKS}

SANDWICH = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
)
SANDWICH_QUESTION = "The best thing to do in San Francisco is: "
SANDWICH_EXPECTED = "eat a sandwich and sit in Dolores Park on a sunny day."

CITIES = (
    "Amsterdam",
    "Athens",
    "Berlin",
    "Boston",
    "Cairo",
    "Chicago",
    "Copenhagen",
    "Delhi",
    "Dublin",
    "Geneva",
    "Havana",
    "Istanbul",
    "Lima",
    "Lisbon",
    "Madrid",
    "Nairobi",
    "Oslo",
    "Prague",
    "Sydney",
    "Tokyo",
)


def find_task(name: str) -> Task:
    """Return the task called `name`. Raises UserError listing the tasks if there is none."""
    if name not in _BY_NAME:
        raise unknown("needle task", name, _BY_NAME)
    return _BY_NAME[name]


@dataclass(frozen=True)
class Fact:
    """What a needle says, and how it is asked for."""

    sentence: str
    question: str
    answer: str
    """What a score compares with."""


def fact(task: Task, length: int, depth: int, repeat: int) -> Fact:
    """Return what is hidden in one sample, the same on every machine."""
    if task.name == "number":
        rng = Random(f"needle/{length}/{depth}/{repeat}")
        city, number = rng.choice(CITIES), str(rng.randrange(1_000_000, 10_000_000))
        sentence = f"The secret number for {city} is {number}."
        return Fact(sentence, f"What is the secret number for {city}?", number)
    answer = SANDWICH if task.name == "sandwich_rouge1" else SANDWICH_EXPECTED
    return Fact(SANDWICH, SANDWICH_QUESTION, answer)


@functools.cache
def template() -> str:
    """Return the prompt template, byte for byte."""
    # Bytes, because reading text would translate line ends.
    return (files(__package__) / "prompt.txt").read_bytes().decode("utf-8")
