"""Which samples a cell breaks: those that the full cache answers well and the cell does not.

An average hides them: a cell that loses ten samples and gains nine is as good as the full cache on the
average, and not on ten samples. Such negative samples are what arXiv 2503.24000 looks at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.judgement import FlipRule
from harness.report.run import Run

_DIGITS = 10  # decimals of a score: one that was averaged over seeds must meet the rule's bound


@dataclass(frozen=True)
class Flips:
    """The samples of one task that a cell loses to the full cache, or gains over it."""

    task: str
    cell: str
    n: int
    """Samples that both hold."""
    well: tuple[str, ...]
    """Ids that the full cache answers well."""
    lost: tuple[str, ...]
    """Of these, the ids that the cell answers worse by the drop or more."""
    gained: tuple[str, ...]
    """Ids that the cell answers well, and the full cache worse by the drop or more."""


def flips(run: Run, rule: FlipRule) -> Sequence[Flips]:
    """Return the flips of every task and cell that share samples with the full cache.

    In the run's order of tasks, then cells; none without a full cache. Methods that draw count by the
    mean score over their seeds. Tasks whose scores are not of 0 to 100 take no part (`without_flips`).
    """
    name = f"flips {rule}"
    if name not in run.memo:
        run.memo[name] = [
            one
            for task in run.averaged_tasks
            for cell in run.cells
            if cell != run.full_cell and (one := _flips(run, rule, task, cell))
        ]
    found: list[Flips] = run.memo[name]
    return found


def without_flips(run: Run) -> list[str]:
    """Name the tasks whose scores are no points of 0 to 100, to which no rule applies."""
    return [task for task in run.tasks if task not in run.averaged_tasks]


def points(run: Run, task: str, cell: str) -> Mapping[str, float]:
    """Return the score of each sample, 0 to 100, averaged over seeds; {} without records."""
    samples = run.samples.get((task, cell))
    if samples is None:
        return {}
    scores = run.metrics[task].score(samples.parts).round(_DIGITS)
    return dict(zip(samples.ids, scores.tolist(), strict=True))


def _flips(run: Run, rule: FlipRule, task: str, cell: str) -> Flips | None:
    if run.full_cell is None:
        return None
    full, other = points(run, task, run.full_cell), points(run, task, cell)
    both = [sample for sample in full if sample in other]
    if not both:
        return None
    return Flips(
        task,
        cell,
        len(both),
        well=tuple(sample for sample in both if full[sample] >= rule.well),
        lost=tuple(sample for sample in both if _falls(rule, full[sample], other[sample])),
        gained=tuple(sample for sample in both if _falls(rule, other[sample], full[sample])),
    )


def _falls(rule: FlipRule, high: float, low: float) -> bool:
    """Return whether a score is good and the other one lower by the drop or more."""
    return high >= rule.well and round(high - low, _DIGITS) >= rule.drop
