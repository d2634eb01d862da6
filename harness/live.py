"""The scores of a run that is under way, for who watches it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.task import Task
from harness.report.bootstrap import gather
from harness.results import Results
from kvmerge.cells import Cell

_TASKS = 5
"""Tasks that are shown: those that gained a line last."""


class LiveScores:
    """A table of the scores that a run's records have so far, those of earlier runs among them."""

    def __init__(self, results: Results, tasks: Sequence[Task], cells: Sequence[Cell]) -> None:
        self._results = results
        self._tasks = {task.name: task for task in tasks}
        self._cells = [cell.name for cell in cells]
        self._latest: dict[str, None] = {}
        self._shown: dict[tuple[str, str], tuple[int, str]] = {}

    def note(self, task: str) -> None:
        """Note that a task gained a line."""
        self._latest.pop(task, None)
        self._latest[task] = None

    def table(self) -> Table:
        """Return a row a cell: score, and samples that it is over, of the latest tasks."""
        tasks = list(self._latest)[-_TASKS:]
        table = Table("scores so far", *tasks, box=None, pad_edge=False)
        for cell in self._cells:
            table.add_row(cell, *(self._score(task, cell) for task in tasks))
        return table

    def _score(self, task: str, cell: str) -> str:
        """Return a score as a text, taken anew where there are more records."""
        records = self._results.records(task, cell)
        count, shown = self._shown.get((task, cell), (0, ""))
        if count != len(records):
            metric = self._tasks[task].metric
            try:
                samples = gather(records, metric)
            except ValueError:  # no number: the report says so
                shown = ""
            else:
                score = float(metric.score(samples.parts.mean(axis=0)))
                shown = f"{score:.1f} ({len(samples.ids)})"
            self._shown[task, cell] = len(records), shown
        return shown
