"""All cells of several runs in one table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from harness.report.columns import TABLE
from harness.report.missed import missed_budgets
from harness.report.run import Run, averages
from harness.report.summary import summarise
from harness.report.tables.table import Table, score_text
from harness.report.words import INTERVAL, gaps, sample_counts, setting


def _missed(runs: Sequence[Run]) -> dict[str, str]:
    """Return what cells kept instead of their budgets, of those that kept it in all runs alike."""
    kept: dict[str, set[str]] = {}
    for run in runs:
        for cell in run.cells:
            kept.setdefault(cell, set()).add(missed_budgets(run).get(cell, ""))
    return {cell: texts.pop() for cell, texts in kept.items() if len(texts) == 1 and "" not in texts}


def runs_table(runs: Sequence[Run]) -> Table:
    """Put all cells of several runs in one table, keyed by model and benchmark."""
    overview = [column for column in TABLE if column.overview]
    ordered = sorted(runs, key=lambda run: (run.model, run.benchmark))
    rows = []
    frames = []
    for run in ordered:
        averaged = averages(run)
        for cell in run.cells:
            values = run.over_tasks(cell)
            rows.append(
                (
                    run.model,
                    run.benchmark,
                    run.place,
                    cell,
                    f"{len(run.averaged_tasks)}",
                    sample_counts(run, run.averaged_tasks),
                    score_text(averaged.get(cell)),
                    *(column.text(values.get(column.name, np.nan)) for column in overview),
                )
            )
        frames.append(summarise(run).assign(output_dir=run.place))
    return Table(
        name="runs",
        title="All runs",
        caption="Average score over each run's tasks, by model and benchmark. In brackets: "
        f"{INTERVAL}. Averages compare only within one benchmark and the same tasks and samples. "
        "Settings: " + "; ".join(f"{run.place}: {setting(run)}" for run in ordered) + ".",
        header=(
            "model",
            "benchmark",
            "output_dir",
            "cell",
            "tasks",
            "n a task",
            "average",
            *(column.header for column in overview),
        ),
        rows=tuple(rows),
        missed=_missed(ordered),
        notes=tuple(f"{run.place}: {note}" for run in ordered for note in gaps(run)),
        data=pd.concat(frames, ignore_index=True),
        naming=(3,),
    )
