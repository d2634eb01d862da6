"""A run seen by its KL to the full cache, in place of its scores."""

from __future__ import annotations

from functools import cached_property

from benchmarks.metric import Metric, plain
from harness.columnar import Records
from harness.report.bootstrap import Scored, average
from harness.report.run import Run

KL = "kl"

_METRIC = Metric(
    KL,
    lambda prediction, answers, all_classes=None: {},
    parts=("kl_to_full",),
    score=plain,
    higher_is_better=False,
    averaged=False,
)


class Divergence(Run):
    """The tasks and cells of a run that have KL, which stands for the score. Never the full cache's."""

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """KL, on each task."""
        return dict.fromkeys(self.tasks, _METRIC)


def divergence(run: Run) -> Divergence:
    """Return a run seen by its KL; without tasks where none is recorded."""
    return run.once("divergence", lambda: _divergence(run))


def _divergence(run: Run) -> Divergence:
    records = {
        (task, cell): known
        for (task, cell), lines in run.records.items()
        if cell != run.full_cell and (known := Records.of(lines).having("kl_to_full"))
    }
    # A task on which nothing was compared, such as one of a single token, is left out for all.
    tasks = {task: KL for task in run.tasks if any(key[0] == task for key in records)}
    return Divergence(run.output_dir, run.info, tasks, run.cells, records)


def kl_averages(run: Run) -> dict[str, Scored]:
    """Return the mean KL over tasks, by cell, of those that have it on every task where any has."""
    seen = divergence(run)
    return {
        cell: average([seen.scores[task, cell] for task in seen.tasks])
        for cell in run.cells
        if seen.tasks and all((task, cell) in seen.scores for task in seen.tasks)
    }
