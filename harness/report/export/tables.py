"""The files of a table."""

from __future__ import annotations

from pathlib import Path

from harness.report.export.latex import latex
from harness.report.export.markdown import markdown
from harness.report.summary import to_csv
from harness.report.tables.table import Table
from kvmerge.files import write_atomically


def write_table(table: Table, folder: Path) -> None:
    """Write a table as `<name>.md`, `<name>.tex` and, unrounded, `<name>.csv`.

    One that has a column for each cell, with intervals, is there as `<name>_intervals.tex` too:
    `<name>.tex` leaves them out.
    """
    write_atomically(folder / f"{table.name}.md", markdown(table))
    write_atomically(folder / f"{table.name}.csv", to_csv(table.data))
    write_atomically(folder / f"{table.name}.tex", latex(table, intervals=not table.cells))
    if table.cells and any("\n" in text for row in table.rows for text in row):
        write_atomically(folder / f"{table.name}_intervals.tex", latex(table))
