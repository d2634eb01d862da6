"""What cells store in bytes: at one budget as many entries, but not always as many bytes.

Set sizes and logit biases stand beside keys and values, a few bytes an entry: 8 of 512 are 1.6%.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from harness.columnar import Records
from harness.report.bootstrap import Samples, by_sample
from harness.report.run import Run

TOLERANCE = 0.01
"""Share by which the bytes of two cells may differ and still count as equal."""


def stored(run: Run, task: str, cell: str, ids: Iterable[str]) -> float:
    """Return the bytes that a cell stores of a sample, K, V and what stands beside, the mean over some.

    NaN where an earlier version did not record what stands beside.
    """

    def samples() -> Samples:
        records = Records.of(run.records[task, cell])
        bytes_of = records.numbers("kv_bytes") + records.numbers("size_bytes")
        return replace(by_sample(records, [bytes_of]), ids=run.samples[task, cell].ids)

    return float(run.once(f"stored {task} {cell}", samples).only(ids).parts.mean())


def is_unequal(ratio: float) -> bool:
    """Return whether a ratio of bytes is known and not about 1."""
    return abs(ratio - 1) > TOLERANCE


def unequal_text(ratio: float) -> str:
    """Say how the bytes of A are to those of B, e.g. `A uses 1.6% more bytes`."""
    return f"A uses {100 * abs(ratio - 1):.1f}% {'more' if ratio > 1 else 'fewer'} bytes"


def beside_notes(run: Run) -> list[str]:
    """Name the cells whose sizes and biases are more than `TOLERANCE` of their keys and values."""
    by_share: dict[str, list[str]] = {}
    for cell in run.cells:
        records = [Records.of(run.of(task, cell)) for task in run.tasks]
        beside = sum(np.nansum(each.numbers("size_bytes")) for each in records)
        share = beside / max(1, sum(each.numbers("kv_bytes").sum() for each in records))
        if share > TOLERANCE:
            by_share.setdefault(f"{100 * share:.1f}%", []).append(cell)
    if not by_share:
        return []
    listed = "; ".join(f"{share} in {', '.join(cells)}" for share, cells in by_share.items())
    return [f"Budgets count entries. Sizes and biases beside them take further bytes: {listed}."]
