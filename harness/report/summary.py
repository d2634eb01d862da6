"""summary.csv: a line a task and cell."""

from __future__ import annotations

import pandas as pd

from harness.report.columns import COLUMNS
from harness.report.run import Run
from kvmerge.files import write_atomically
from kvmerge.names import parse_name

_KEYS = (
    "model",
    "method",
    "budget",
    "benchmark",
    "task",
    "metric",
    "n",
    "score",
    "ci_low",
    "ci_high",
)
_CONTEXTS = "contexts"
"""Contexts that the `n` samples stand on: what the interval resamples."""


def summarise(run: Run) -> pd.DataFrame:
    """Return the summary of a run: one line a cell and task that has records."""
    rows = []
    for cell in run.cells:
        name = parse_name(cell)
        for task, metric in run.tasks.items():
            if (task, cell) not in run.records:
                continue
            score = run.scores[task, cell].estimate()
            samples = run.samples[task, cell]
            n, contexts = len(samples.ids), len(samples.clusters)
            keys = (run.model, name.variant, str(name.budget), run.benchmark, task, metric, n)
            values = (*keys, score.value, score.low, score.high)
            row = dict(zip(_KEYS, values, strict=True)) | run.figures[task, cell]
            rows.append(row | {_CONTEXTS: contexts})
    columns = [*_KEYS, *(column.name for column in COLUMNS), _CONTEXTS]
    return pd.DataFrame(rows, columns=columns)


def write_summary(run: Run) -> None:
    """Write a run's summary.csv in one step, never half of it."""
    write_atomically(run.output_dir / "summary.csv", to_csv(summarise(run)))


def to_csv(frame: pd.DataFrame) -> str:
    """Format a table as CSV: 12 significant digits, unknown values empty."""
    return frame.to_csv(index=False, float_format="%.12g", lineterminator="\n")
