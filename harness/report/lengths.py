"""How long a cell's answers are beside the full cache's, and how they end.

A cache that lost the end of a thought can ramble into the limit or stop at once, and a score does not
say which. Lengths are in tokens, an end token included where one ended the answer; of methods that draw
they are averaged over seeds within a sample first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.metric import Metric, plain
from harness.columnar import Records
from harness.report.bootstrap import Estimate, Samples, Scored, average, by_sample, score_cells
from harness.report.contrasts import AVERAGE
from harness.report.run import Run

_LIMIT = "max_new_tokens"
_LENGTH = Metric(
    "length",
    lambda prediction, answers, all_classes=None: {},
    parts=("length",),
    score=plain,
    averaged=False,
)


@dataclass(frozen=True)
class Bounds:
    """A share of which records of an earlier version tell the bounds alone."""

    low: float
    high: float


@dataclass(frozen=True)
class Lengths:
    """The answers of one cell on a task, or on the average over tasks."""

    task: str
    """A task, or `average`."""
    cell: str
    n: int
    """Samples, summed over tasks."""
    mean: float
    """Tokens of an answer."""
    pairs: int
    """Samples that the full cache answered too; 0 for the full cache itself."""
    change: Estimate | None
    """Mean length over these, less the full cache's, in tokens; None without any."""
    cut_off: Bounds
    """Share of answers that the limit ended, 0 to 1."""
    empty: float
    """Share of answers without text, 0 to 1."""


def lengths(run: Run) -> list[Lengths]:
    """Return every cell on the average over the tasks that generate; only where it has all of them."""
    return run.once("lengths", lambda: _measured(run))[0]


def lengths_by_task(run: Run) -> list[Lengths]:
    """Return every task that generates and cell with records, in the run's order."""
    return run.once("lengths", lambda: _measured(run))[1]


def _measured(run: Run) -> tuple[list[Lengths], list[Lengths]]:
    """Return the averages and what they are over, at once: replicates of all are much to keep."""
    tasks = generating(run)
    by_key: dict[tuple[str, str], Lengths] = {}
    changes: dict[tuple[str, str], Scored] = {}
    for task in tasks:
        of_task, changes_here = _of_task(run, task)
        by_key |= {(task, one.cell): one for one in of_task}
        changes |= {(task, cell): change for cell, change in changes_here.items()}
    keys_of = {cell: [(task, cell) for task in tasks] for cell in run.cells if tasks}
    averages = [
        _on_average(cell, [by_key[key] for key in keys], [changes.get(key) for key in keys])
        for cell, keys in keys_of.items()
        if all(key in by_key for key in keys)
    ]
    return averages, [*by_key.values()]


def generating(run: Run) -> list[str]:
    """Return the tasks whose answers are generated; of a given continuation nothing is."""
    return [task for task in run.tasks if not run.metrics[task].continuation]


def _of_task(run: Run, task: str) -> tuple[list[Lengths], dict[str, Scored]]:
    """Return every cell with records of a task, and its change with replicates, where it has one."""
    answers = {cell: _answers(run, task, cell) for cell in run.cells if (task, cell) in run.records}
    full = answers.get(run.full_cell or "")
    beside = {
        cell: replace(a, parts=a.parts[:, :1] - b.parts[:, :1])
        for cell, own in answers.items()
        if full and own is not full and (common := set(own.ids) & set(full.ids))
        for a, b in [(own.only(common), full.only(common))]
    }
    changes = score_cells(task, beside, _LENGTH)
    found = []
    for cell, own in answers.items():
        mean, low, high, empty = own.parts.mean(axis=0).tolist()
        pairs = len(beside[cell].ids) if cell in beside else 0
        change = changes[cell].estimate() if cell in changes else None
        found.append(Lengths(task, cell, len(own.ids), mean, pairs, change, Bounds(low, high), empty))
    return found, changes


def _answers(run: Run, task: str, cell: str) -> Samples:
    """Collect length, least and most that was cut off, and emptiness, averaged over seeds."""
    limit = run.recorded("tasks", task, _LIMIT)
    records = Records.of(run.records[task, cell])
    columns = map(records.values, ("generated_tokens", "finish_reason", "prediction"))
    answers = [
        (tokens, *_cut_off(tokens, reason, limit), not prediction.strip())
        for tokens, reason, prediction in zip(*columns, strict=True)
    ]
    return by_sample(records, [*np.array(answers, dtype=np.float64).T], run.contexts[task])


def _cut_off(tokens: int, reason: str | None, limit: int | None) -> tuple[bool, bool]:
    """Return whether the limit ended an answer: for certain, and perhaps.

    Earlier versions did not record why an answer ended: one below the limit was not cut off, one of
    its length may have been.
    """
    if reason is not None:
        known = reason == "length"
        return known, known
    return False, limit is None or tokens >= limit


def _on_average(cell: str, tasks: Sequence[Lengths], changes: Sequence[Scored | None]) -> Lengths:
    known = [change for change in changes if change is not None]
    return Lengths(
        AVERAGE,
        cell,
        n=sum(one.n for one in tasks),
        mean=float(np.mean([one.mean for one in tasks])),
        pairs=sum(one.pairs for one in tasks),
        change=average(known).estimate() if len(known) == len(tasks) else None,
        cut_off=Bounds(
            float(np.mean([one.cut_off.low for one in tasks])),
            float(np.mean([one.cut_off.high for one in tasks])),
        ),
        empty=float(np.mean([one.empty for one in tasks])),
    )
