"""A table as Markdown, LaTeX and CSV."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from harness.report.summary import to_csv
from harness.report.tables.table import Table
from kvmerge.files import write_atomically

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?( to \d+|\n.*)?$")


def markdown(table: Table) -> str:
    """Render as a pipe table under its title, with caption and notes."""
    numeric = [column for column in _columns(table) if is_numeric(table, column)]
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


def latex(table: Table) -> str:
    """Render as a table environment; it needs the packages booktabs and graphicx."""

    def line(cells: tuple[str, ...]) -> str:
        return " & ".join(_escape(cell.replace("\n", " ")) for cell in cells) + r" \\"

    align = "".join("r" if is_numeric(table, i) else "l" for i in _columns(table))
    notes = " ".join((table.caption, *table.notes))
    return "\n".join(
        [
            "% needs \\usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape(table.title)}. {_escape(notes)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            line(table.header),
            r"\midrule",
            *map(line, table.rows),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def write_table(table: Table, folder: Path) -> None:
    """Write a table as `<name>.md`, `<name>.tex` and, unrounded, `<name>.csv`."""
    write_atomically(folder / f"{table.name}.md", markdown(table))
    write_atomically(folder / f"{table.name}.tex", latex(table))
    write_atomically(folder / f"{table.name}.csv", to_csv(table.data))


def _columns(table: Table) -> range:
    return range(len(table.header))


def is_numeric(table: Table, column: int) -> bool:
    """Return whether a column holds numbers, to be aligned right; blank cells do not count."""
    filled = [row[column] for row in table.rows if row[column]]
    return all(_NUMBER.match(text) for text in filled)


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
