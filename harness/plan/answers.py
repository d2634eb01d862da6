"""How long answers may be that nobody has seen yet: as those of the task that are finished, or guessed.

A row leaves the batch as its answer ends, and a step is made as long as any row is left. So the cost of
a batch hangs on three lengths: of a row, of the longest row of a sample, and of the text that all rows
are replayed along for their fidelity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.task import Task
from harness.records import Record
from harness.results import Results
from kvmerge.cells import Cell

_GUESSED_MEAN, _GUESSED_LONGEST = 0.6, 0.9
"""Share of the most tokens that the answer of a row has, and that the longest of a sample has, where no
answer is known. Tasks differ widely (docs/cost.md)."""


@dataclass(frozen=True)
class Answers:
    """Lengths of a task's answers in tokens, the stop token included: a sample of each."""

    of_rows: Sequence[float]
    """Of single rows."""
    longest: Sequence[float]
    """Of the longest row of each sample."""
    replayed: Sequence[float]
    """Of the text of each sample that its rows are replayed along."""

    @property
    def mean(self) -> float:
        """Tokens of a row's answer."""
        return fmean(self.of_rows)


def most(task: Task) -> Answers:
    """Return answers that all go on for as long as they may."""
    return _alike(task.max_new_tokens)


def least(task: Task) -> Answers:
    """Return answers that all end as soon as they may."""
    return _alike(max(1, task.min_new_tokens))


def guessed(task: Task) -> Answers:
    """Return answers as they may be where nothing is known of them."""
    mean, longest = (
        max(1.0, share * task.max_new_tokens) for share in (_GUESSED_MEAN, _GUESSED_LONGEST)
    )
    return Answers([mean], [longest], [mean])


def finished(results: Results, task: Task, cells: Sequence[Cell]) -> Answers | None:
    """Return the lengths that the finished answers of a task have; None where there is none yet."""
    by_sample: dict[str, list[Record]] = defaultdict(list)
    full: dict[str, Record] = {}
    for cell in cells:
        for record in results.records(task.name, cell.name):
            by_sample[record.id].append(record)
            if cell.is_full:
                full[record.id] = record
    rows = [record.generated_tokens for of_sample in by_sample.values() for record in of_sample]
    if not any(rows):  # none, or probabilities of given texts
        return None
    longest = [max(record.generated_tokens for record in each) for each in by_sample.values()]
    return Answers(rows, longest, [record.generated_tokens for record in full.values()] or rows)


def largest_of(lengths: Sequence[float], count: int) -> float:
    """Return the expected largest of `count` draws from a sample of lengths."""
    ordered, size = sorted(lengths), len(lengths)
    shares = [(place / size) ** count for place in range(size + 1)]
    return sum(
        length * (upto - below)
        for length, below, upto in zip(ordered, shares, shares[1:], strict=False)
    )


def _alike(tokens: int) -> Answers:
    return Answers([tokens], [tokens], [tokens])
