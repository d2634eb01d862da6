"""summary.csv: a line a task and cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from harness.records import Record
from harness.report.run import Run
from kvmerge.cells import parse_name
from kvmerge.files import write_atomically

COLUMNS = [
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
    "budget_achieved_mean",
    "budget_achieved_min",
    "budget_achieved_max",
    "kv_bytes",
    "kv_bytes_full",
    "kl_to_full",
    "top1_agreement",
    "fidelity_n",
    "prompt_tokens_mean",
    "generated_tokens_mean",
    "kept_entries_mean",
    "kept_entries_min",
    "kept_entries_max",
    "size_bytes",
    "merged_tokens",
    "evicted_tokens",
    "prefill_seconds",
    "decode_seconds",
]
"""Columns of summary.csv in order; the contract fixes those up to `top1_agreement`."""


def summarise(run: Run) -> pd.DataFrame:
    """Give the summary of a run: one line a cell and task that has records, columns `COLUMNS`."""
    rows = []
    for cell in run.cells:
        name = parse_name(cell)
        method, budget = name.variant, str(name.budget)
        for task, metric in run.tasks.items():
            if (task, cell) not in run.records:
                continue
            records = run.records[task, cell]
            score = run.scores[task, cell].estimate()
            rows.append(
                {
                    "model": run.model,
                    "method": method,
                    "budget": budget,
                    "benchmark": run.benchmark,
                    "task": task,
                    "metric": metric,
                    "n": len(run.samples[task, cell].ids),
                    "score": score.value,
                    "ci_low": score.low,
                    "ci_high": score.high,
                    "budget_achieved_mean": sample_mean(records, "budget_achieved"),
                    "budget_achieved_min": _extreme(min, records, "budget_achieved"),
                    "budget_achieved_max": _extreme(max, records, "budget_achieved"),
                    "fidelity_n": len({r.id for r in records if r.kl_to_full is not None}),
                    "prompt_tokens_mean": sample_mean(records, "prompt_tokens"),
                    "generated_tokens_mean": sample_mean(records, "generated_tokens"),
                    "kept_entries_mean": sample_mean(records, "kept_entries"),
                    "kept_entries_min": _extreme(min, records, "kept_entries_min"),
                    "kept_entries_max": _extreme(max, records, "kept_entries_max"),
                    **{
                        name: sample_mean(records, name)
                        for name in (
                            "kv_bytes",
                            "kv_bytes_full",
                            "kl_to_full",
                            "top1_agreement",
                            "size_bytes",
                            "merged_tokens",
                            "evicted_tokens",
                            "prefill_seconds",
                            "decode_seconds",
                        )
                    },
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def sample_mean(records: Iterable[Record], name: str) -> float:
    """Mean of a field over seeds, then over the samples that have it; NaN where none has."""
    by_id: dict[str, list[float]] = defaultdict(list)
    for record in records:
        value = getattr(record, name)
        if value is not None:
            by_id[record.id].append(value)
    return float(np.mean([np.mean(values) for values in by_id.values()])) if by_id else np.nan


def _extreme(pick: Callable[..., float], records: Iterable[Record], name: str) -> float:
    values = [value for record in records if (value := getattr(record, name)) is not None]
    return pick(values, default=np.nan)


def write_summary(run: Run) -> None:
    """Write a run's summary.csv in one step, never half of it."""
    write_atomically(run.output_dir / "summary.csv", to_csv(summarise(run)))


def to_csv(frame: pd.DataFrame) -> str:
    """Format a table as CSV: 12 significant digits, unknown values empty."""
    return frame.to_csv(index=False, float_format="%.12g", lineterminator="\n")
