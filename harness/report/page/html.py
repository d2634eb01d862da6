"""The page: its parts as HTML, with style, scripts and pictures inside the one file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import itables.options
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from harness.report.answers import Answer
from harness.report.names import budget_groups
from harness.report.page.samples import TaskSamples, embedded, visible
from harness.report.plots.style import Plot
from harness.report.tables.table import Table

_HERE = Path(__file__).parent
_PRINTED_CELLS = 9
"""Columns of cells that fit beside each other on paper (A4)."""
_LONG = 150
"""Rows from which a table is closed until it is asked for."""
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Part:
    """A group of tables under one heading."""

    slug: str
    title: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Section:
    """What the report shows of one run."""

    slug: str
    """Folder and anchor name; unique within a report."""
    title: str
    about: tuple[str, ...]
    """What was measured on what, a fact each."""
    short: str
    """The answers in one or two sentences."""
    answers: tuple[Answer, ...]
    parts: tuple[Part, ...]
    plots: tuple[Plot, ...]
    undrawn: tuple[str, ...]
    """Why figures that a reader may look for are not there."""
    samples: tuple[TaskSamples, ...]
    browser: object
    """What the sample browser must know, as JSON has it."""
    provenance: tuple[tuple[str, str], ...]

    @property
    def tables(self) -> Iterator[Table]:
        """All tables, in their order."""
        for part in self.parts:
            yield from part.tables


def render_page(title: str, sections: Sequence[Section], overview: Table | None) -> str:
    """Return the whole page."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"breakable": breakable, "embedded": _embedded}
    environment.tests |= {"long": lambda table: len(table.rows) > _LONG}
    script = Markup((_HERE / "page.js").read_text(encoding="utf-8"))
    return environment.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        overview=overview,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        library=_library(),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        blocks=printed_blocks,
        order=_order,
        base64=lambda data: base64.b64encode(data).decode(),
    )


def printed_blocks(table: Table) -> list[list[int]]:
    """Return the columns of a table in blocks that fit on paper, by budget; one block where all do.

    Each block begins with the columns that are no cells.
    """
    if len(table.cells) <= _PRINTED_CELLS:
        return [list(range(len(table.header)))]
    shared = [column for column in range(len(table.header)) if column not in table.cells]
    places = {table.header[column]: column for column in table.cells}
    blocks: list[list[int]] = [[]]
    for cells in budget_groups(places).values():
        for start in range(0, len(cells), _PRINTED_CELLS):
            group = [places[cell] for cell in cells[start : start + _PRINTED_CELLS]]
            if blocks[-1] and len(blocks[-1]) + len(group) > _PRINTED_CELLS:
                blocks.append([])
            blocks[-1] += group
    return [[*shared, *block] for block in blocks]


def breakable(text: str) -> Markup:
    """Return a name that may be broken after its punctuation, and nowhere else."""
    pieces = re.split(r"(?<=[_:,=@/])", visible(text))
    return Markup("<wbr>").join(escape(piece) for piece in pieces)


def _embedded(value: object) -> Markup:
    return Markup(embedded(value))


def _order(text: str) -> str:
    """Return the number that a text begins with, by which a column of numbers is sorted."""
    number = _NUMBER.match(text)
    return number[0] if number else ""


def _library() -> Markup:
    """Return the script of DataTables that `itables` ships, to stand inside a page."""
    text = Path(itables.options.dt_bundle).read_text(encoding="utf-8")
    # As text in a script element, from which the page makes a module: it must not end that element.
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))
