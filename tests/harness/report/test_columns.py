"""A figure is named once, and is then everywhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from harness.report import columns, run, summary, terminal
from harness.report.columns import COLUMNS, LARGEST, MEAN, SAMPLES, SMALLEST, Column
from harness.report.tables import budgets
from tests.synthetic_run import record, write_run

ROOT = Path(__file__).resolve().parents[3]


def test_the_example_of_the_documentation_puts_a_figure_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "add_a_figure.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    added = eval(example, vars(columns))
    shown = Column("longest", "decode_seconds", LARGEST, terminal=("longest decode", ".1f"))
    for module in (columns, run, summary, budgets, terminal):
        monkeypatch.setattr(module, "COLUMNS", (*COLUMNS, added, shown))
    monkeypatch.setattr(budgets, "TABLE", (*columns.TABLE, added))
    lines = [record("0", 0.5, decode_seconds=1.0), record("1", 0.5, decode_seconds=3.0)]
    loaded = run.load_run(write_run(tmp_path, {"t": "qa_f1"}, {"full@1": {"t": lines}}))
    assert summary.summarise(loaded)["decode_seconds_max"].tolist() == [3.0]
    table = budgets.budget_table(loaded)
    assert dict(zip(table.header, table.rows[0], strict=True))["longest decode s"] == "3.00"
    assert table.data["decode_seconds_max"].tolist() == [3.0]
    printed = io.StringIO()
    terminal.print_comparison(loaded, Console(file=printed, width=100))
    assert re.search(r"longest decode +3\.0", printed.getvalue())


def test_no_figure_is_named_outside_columns_and_records() -> None:
    """The plots, which each draw one, are in a folder of their own; some work a figure out anew."""
    names = {column.field for column in COLUMNS if column.field not in ("prompt_tokens", "kv_bytes")}
    for path in (ROOT / "harness" / "report").glob("*.py"):
        if path.name not in ("columns.py", "divergence.py", "lengths.py", "memory.py", "missed.py"):
            text = path.read_text(encoding="utf-8")
            assert [name for name in names if f'"{name}"' in text] == [], path


def test_every_column_reads_a_field_of_records() -> None:
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    for column in COLUMNS:
        assert hasattr(record("0", 0.5), column.field)
        assert all(name in {c.name for c in COLUMNS} for name in column.brackets or ())


@pytest.mark.parametrize(
    ("reduction", "over_records", "over_tasks"),
    [(MEAN, 2.5, 2.0), (SMALLEST, 1.0, 1.0), (LARGEST, 4.0, 3.0), (SAMPLES, 2.0, 4.0)],
)
def test_reductions_by_hand(
    reduction: columns.Reduction, over_records: float, over_tasks: float
) -> None:
    # Sample 0 has two seeds, so its mean of 2 counts once beside sample 1's 3; sample 2 has none.
    lines = [
        record("0", 0.5, seed=0, decode_seconds=1.0),
        record("0", 0.5, seed=1, decode_seconds=3.0),
        record("1", 0.5, decode_seconds=3.0 if reduction is MEAN else 4.0),
        record("2", 0.5, decode_seconds=None),
    ]
    column = Column("x", "decode_seconds", reduction)
    assert reduction.records(lines, "decode_seconds") == over_records
    assert column.over_tasks([1.0, np.nan, 3.0]) == over_tasks
    assert np.isnan(column.over_tasks([np.nan]))


def test_a_figure_that_no_record_has_is_said_to_be_not_recorded(tmp_path: Path) -> None:
    lines = [record("0", 0.5, kl_to_full=None)]
    loaded = run.load_run(write_run(tmp_path, {"t": "qa_f1"}, {"h2o@0.5": {"t": lines}}))
    table = budgets.budget_table(loaded)
    assert "KL to full" not in table.header
    (note,) = [note for note in table.notes if note.startswith("Not recorded: ")]
    assert "KL to full" in note
    frame = pd.read_csv(io.StringIO(summary.to_csv(summary.summarise(loaded))))
    assert frame["kl_to_full"].isna().all()
