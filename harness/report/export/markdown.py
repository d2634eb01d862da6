"""A table as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from harness.report.tables.table import Table


def markdown(table: Table) -> str:
    """Render as a pipe table under its title, with caption and notes."""
    table = table.as_read()
    numeric = [column for column, holds in enumerate(table.numeric) if holds]
    body = markdown_table(table.header, table.rows, numeric)
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"## {table.title}\n\n{table.caption}\n\n{body}" + (f"\n{notes}" if notes else "")


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Collection[int]
) -> str:
    """Render a header and lines of as many cells as a pipe table, the numeric columns to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |\n"

    rule = "".join("| ---: " if i in numeric else "| --- " for i in range(len(header))) + "|\n"
    return line(header) + rule + "".join(map(line, rows))
