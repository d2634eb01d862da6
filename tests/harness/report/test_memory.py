"""Equal entries that are not equal bytes are told, in the table of budgets and in every contrast."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from harness.records import Record
from harness.report.contrasts import AVERAGE, Contrast, contrasts
from harness.report.divergence import KL
from harness.report.run import Run, load_run
from harness.report.tables.budgets import budget_table
from harness.report.tables.contrasts import contrast_table, verdict_text
from tests.synthetic_run import record, write_run

FULL, A, B = "full@1", "kvmerger@0.5", "h2o@0.5"


def lines(score: float, stored: int, beside: int | None) -> list[Record]:
    """Two samples, the second three times as long."""
    return [
        record(
            str(i),
            score,
            kv_bytes=times * stored,
            size_bytes=None if beside is None else times * beside,
            kl_to_full=score,
        )
        for i, times in enumerate((1, 3))
    ]


def run_of(folder: Path, stored: int, beside: int | None) -> Run:
    """B stores 1,000 bytes of a sample, and the full cache 2,000."""
    cells = {FULL: lines(1, 2000, 0), A: lines(0.5, stored, beside), B: lines(0.25, 1000, 0)}
    by_task = {cell: {"t": of, "u": of} for cell, of in cells.items()}
    return load_run(write_run(folder, {"t": "qa_f1", "u": "qa_f1"}, by_task))


def of(run: Run, task: str = AVERAGE, second: str = B) -> Contrast:
    (one,) = [c for c in contrasts(run) if (c.task, c.first, c.second) == (task, A, second)]
    return one


@pytest.mark.parametrize(
    ("stored", "beside", "ratio", "said"),
    [
        (1000, 0, 1.0, ""),
        (1000, 9, 1.009, ""),
        (1000, 16, 1.016, "A uses 1.6% more bytes"),
        (900, 50, 0.95, "A uses 5.0% fewer bytes"),
    ],
)
@pytest.mark.parametrize("task", [AVERAGE, KL])
def test_a_verdict_says_by_how_many_bytes_one_budget_differs(
    tmp_path: Path, stored: int, beside: int, ratio: float, said: str, task: str
) -> None:
    one = of(run_of(tmp_path, stored, beside), task)
    assert one.bytes_ratio == pytest.approx(ratio)
    text = verdict_text(one, 1.0)
    assert said in text
    assert ("bytes" in text) == bool(said)


def test_fewer_bytes_than_the_full_cache_has_are_no_unequal_ones(tmp_path: Path) -> None:
    one = of(run_of(tmp_path, 1000, 16), second=FULL)
    assert one.bytes_ratio == pytest.approx(0.508)
    assert not one.is_unequal
    assert "bytes" not in verdict_text(one, 1.0)


def test_bytes_that_were_not_recorded_are_blank(tmp_path: Path) -> None:
    run = run_of(tmp_path, 1000, None)
    assert math.isnan(of(run).bytes_ratio)
    assert not of(run).is_unequal
    table = contrast_table(run, 1.0)
    assert table is not None
    assert table.rows[0][table.header.index("bytes A/B")] == ""


def test_tables_have_the_bytes_beside_those_of_keys_and_values(tmp_path: Path) -> None:
    run = run_of(tmp_path, 2**20, 2**15)
    budgets = budget_table(run)
    at = budgets.header.index("KV MiB")
    assert budgets.header[at + 1] == "beside KV MiB"
    assert budgets.rows[1][at : at + 2] == ("2.00", "0.062")
    said = "beside them take further bytes: 3.1% in kvmerger@0.5."
    assert any(note.endswith(said) for note in budgets.notes)
    table = contrast_table(run, 1.0)
    assert table is not None
    assert any(note.endswith(said) for note in table.notes)
    assert table.data["bytes_ratio"].notna().all()
