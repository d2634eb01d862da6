"""Units of work and what becomes of them: all that passes between a run and whoever answers.

Both can be pickled. How a run is cut into units depends on its samples and settings alone: not on what
is finished, how much memory is free, or who comes first. So the same samples share a batch wherever and
however often a run is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeAlias

from benchmarks.task import Task
from harness.answering import Job, shared_context
from harness.batching import most_samples, unit_numbers
from harness.failures import Failure
from harness.prompts import Prompt
from harness.records import Record
from harness.settings import Settings


@dataclass(frozen=True)
class Unit:
    """Samples of one task that are answered together, each with the cells that it lacks."""

    jobs: tuple[Job, ...]
    """In the benchmark's order, but that under `question=after` those of one context come together."""

    @property
    def task(self) -> Task:
        """The task that all samples are of."""
        return self.jobs[0].task

    @property
    def length(self) -> int:
        """Characters of the longest prompt: an executor may hand out long ones first."""
        return max(len(job.sample.prompt) for job in self.jobs)


@dataclass(frozen=True)
class Answered:
    """A sample's prompt, and a line for each cell that it lacked."""

    task: str
    prompt: Prompt
    lines: Sequence[tuple[str, Record]]
    """Names of cells, each with its line."""

    @property
    def id(self) -> str:
        """The sample."""
        return self.prompt.id

    @property
    def tokens(self) -> int:
        """Tokens of its prompt, and those that were generated for its cells."""
        return self.prompt.prompt_tokens + sum(record.generated_tokens for _, record in self.lines)


Outcome: TypeAlias = Answered | Failure
"""What became of one sample."""


def numbered(settings: Settings, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs of a task, finished ones among them, each with the number of its unit."""
    contexts = range(len(jobs)) if settings.question == "inside" else map(shared_context, jobs)
    numbers = unit_numbers(contexts, most_samples(settings.batch_size, settings.rows))
    return [replace(job, unit=number) for job, number in zip(jobs, numbers, strict=True)]


def units(jobs: Sequence[Job]) -> Iterator[Unit]:
    """Yield the units that jobs were numbered for, task by task."""
    for _, of_task in groupby(jobs, key=lambda job: job.task):
        ordered = sorted(of_task, key=lambda job: job.unit)
        yield from (Unit(tuple(group)) for _, group in groupby(ordered, key=lambda job: job.unit))
