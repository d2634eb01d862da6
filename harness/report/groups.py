"""Scores by groups of samples: length buckets, the depth of a needle, or both at once.

A benchmark says in `Sample.groups` what its scores are also reported by; the runner writes it into the
records, so that a report needs nothing else.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from harness.columnar import Records
from harness.records import Record
from harness.report.bootstrap import Scored
from harness.report.run import Run

Value = str | int
Group = tuple[Value, ...]
"""A value for each of the names that scores are grouped by."""


@dataclass(frozen=True)
class GroupScore:
    """The score of one task and cell over the samples of one group."""

    task: str
    cell: str
    group: Group
    n: int
    """Samples; never 0."""
    prompt_tokens: float
    """Mean over the samples: a nominal length need not be that of a prompt."""
    scored: Scored
    """Resampled within the group, alike in all cells that hold the same samples of it."""


def group_values(run: Run) -> dict[str, list[Value]]:
    """Return the names that the run's samples are grouped by, each with its values in order.

    Numbers are in their own order, texts such as `4-8k` in that of the number they begin with.
    """
    found: dict[str, set[Value]] = defaultdict(set)
    for records in run.records.values():
        for groups in Records.of(records).values("groups"):
            for name, value in (groups or {}).items():
                found[name].add(value)
    return {name: sorted(values, key=place_of) for name, values in found.items()}


def scores_by(run: Run, names: Sequence[str]) -> list[GroupScore]:
    """Score every task, group and cell that has samples, in the run's order of tasks and cells.

    A group is what samples share that have the same value of every name; samples that lack one are
    left out.
    """
    scores = [
        GroupScore(
            task, cell, group, len(tokens), mean(tokens.values()), run.score_of(task, cell, tokens)
        )
        for (task, cell), records in run.records.items()
        for group, tokens in _members(records, names).items()
    ]
    tasks, cells = list(run.tasks), list(run.cells)
    return sorted(
        scores,
        key=lambda one: (tasks.index(one.task), [*map(place_of, one.group)], cells.index(one.cell)),
    )


def unsampled(run: Run) -> dict[str, list[Value]]:
    """Return what was asked for and has no sample, by name: a run's `limit` may end before a length.

    Read from the lists in the run's own settings (`benchmark.lengths`, `benchmark.depths`).
    """
    found = {}
    for name, values in group_values(run).items():
        asked = run.recorded("config", "benchmark", f"{name}s")
        if isinstance(asked, list) and (missing := [each for each in asked if each not in values]):
            found[name] = missing
    return found


def unsampled_notes(run: Run) -> list[str]:
    """Name what was asked for and has no sample."""
    limit = run.recorded("config", "limit")
    why = f": limit={limit} ends before" if limit is not None else ""
    return [
        f"No samples of {name} {', '.join(map(str, missing))}{why}."
        for name, missing in unsampled(run).items()
    ]


def _members(records: Iterable[Record], names: Sequence[str]) -> dict[Group, dict[str, int]]:
    """Return the prompt tokens of each sample by its id, by group."""
    members: dict[Group, dict[str, int]] = defaultdict(dict)
    columns = map(Records.of(records).values, ("groups", "id", "prompt_tokens"))
    for groups, sample, tokens in zip(*columns, strict=True):
        if groups and all(name in groups for name in names):
            members[tuple(groups[name] for name in names)][sample] = tokens
    return members


def groups_of(record: Record) -> Mapping[str, Value]:
    """Return what the scores of a sample are also reported by; {} where there is nothing."""
    groups: Mapping[str, Value] = record.extra.get("groups", {})
    return groups


def place_of(value: Value) -> tuple[float, str]:
    """Sort key: the value, or the number that a text begins with; texts without one come last."""
    if isinstance(value, str):
        number = re.match(r"\d+", value)
        return (float(number[0]) if number else math.inf, value)
    return (value, "")
