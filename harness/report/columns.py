"""The figures of a run, each named once: where it is read in a record and how it is shown.

summary.csv, the tables, the terminal and the plots loop over `COLUMNS`. A figure that is added to
`Record` and listed here is in all of them (docs/add_a_figure.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.columnar import Records
from harness.records import Record


@dataclass(frozen=True)
class Reduction:
    """From many numbers to one; NaN where there are none."""

    records: Callable[[Iterable[Record], str], float]
    """Over the records of a task and cell that have a field."""
    tasks: Callable[[Sequence[float]], float]
    """Over the tasks of a cell that have the figure."""


def _mean(records: Iterable[Record], field: str) -> float:
    """Return the mean over the seeds of each sample, then over the samples."""
    of = Records.of(records)
    values = of.numbers(field)
    known = ~np.isnan(values)
    places = of.samples()[1][known]
    sums, counts = np.bincount(places, values[known]), np.bincount(places)
    means = sums[counts > 0] / counts[counts > 0]
    return float(means.mean()) if means.size else np.nan


MEAN = Reduction(_mean, lambda values: float(np.mean(values)))
SMALLEST = Reduction(lambda records, field: Records.of(records).extremes(field)[0], min)
LARGEST = Reduction(lambda records, field: Records.of(records).extremes(field)[1], max)
SAMPLES = Reduction(lambda records, field: len(Records.of(records).having(field).samples()[0]), sum)
"""How many samples have the field."""


@dataclass(frozen=True)
class Column:
    """One figure of a task and cell, and of a cell over its tasks."""

    name: str
    """Column of summary.csv."""
    field: str
    """Field of a record."""
    reduction: Reduction = MEAN
    header: str = ""
    """Column of the table of budgets, with its unit; empty: not in it."""
    form: str = ".1f"
    """How the number is formatted there."""
    factor: float = 1.0
    """From the record's unit to the header's."""
    place: int = 0
    """Where it stands in that table; equal ones in the order of summary.csv."""
    brackets: tuple[str, str] | None = None
    """Columns of the smallest and largest value, shown in brackets."""
    terminal: tuple[str, str] | None = None
    """Label and format in the comparison that a run prints; None: not in it."""
    overview: bool = False
    """Whether the table of several runs has it."""

    def text(self, value: float) -> str:
        """Return a value as the tables show it; empty for NaN."""
        return "" if np.isnan(value) else format(self.factor * value, self.form)

    def over_tasks(self, values: Sequence[float]) -> float:
        """Return one number for the tasks of a cell; those that have none are left out."""
        known = [value for value in values if not np.isnan(value)]
        return float(self.reduction.tasks(known)) if known else np.nan


_MIB = 2.0**-20

COLUMNS = (
    Column(
        "budget_achieved_mean",
        "budget_achieved",
        header="achieved budget",
        form=".4f",
        brackets=("budget_achieved_min", "budget_achieved_max"),
        terminal=("achieved budget", ".3f"),
        overview=True,
    ),
    Column("budget_achieved_min", "budget_achieved", SMALLEST),
    Column("budget_achieved_max", "budget_achieved", LARGEST),
    Column("kv_bytes", "kv_bytes", header="KV MiB", form=".2f", factor=_MIB, place=3, overview=True),
    Column("kv_bytes_full", "kv_bytes_full", header="full KV MiB", form=".2f", factor=_MIB, place=4),
    Column(
        "kl_to_full",
        "kl_to_full",
        header="KL to full",
        form=".4f",
        place=5,
        terminal=("KL to full (nats)", ".4f"),
        overview=True,
    ),
    Column("top1_agreement", "top1_agreement", header="top-1 agreement %", factor=100, place=5),
    Column("fidelity_n", "kl_to_full", SAMPLES),
    Column("prompt_tokens_mean", "prompt_tokens", header="prompt tokens", place=2),
    Column("generated_tokens_mean", "generated_tokens"),
    Column("kept_entries_mean", "kept_entries", header="entries kept", place=1),
    Column("kept_entries_min", "kept_entries_min", SMALLEST),
    Column("kept_entries_max", "kept_entries_max", LARGEST),
    Column("read_entries", "read_entries", header="entries read", place=1),
    Column(
        "size_bytes",
        "size_bytes",
        header="beside KV MiB",
        form=".3f",
        factor=_MIB,
        place=3,
        overview=True,
    ),
    Column("merged_tokens", "merged_tokens", header="merged", place=1),
    Column("evicted_tokens", "evicted_tokens", header="evicted", place=1),
    Column("prefill_seconds", "prefill_seconds"),
    # Of the batch that all cells of a sample share: in no table, where it would read as the cell's own.
    Column("decode_seconds", "decode_seconds"),
)
"""In the order of summary.csv."""

TABLE = tuple(sorted((c for c in COLUMNS if c.header), key=lambda column: column.place))
"""Those of the table of budgets, in its order."""


def figures(records: Sequence[Record]) -> dict[str, float]:
    """Return every figure of a task and cell, by column name."""
    return {column.name: column.reduction.records(records, column.field) for column in COLUMNS}
