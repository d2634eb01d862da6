"""A table as LaTeX that compiles as it stands and fits a page of A4 or letter with margins of an inch.

Nothing is shrunk to fit: a table is set at 9 points, else at 8; texts wrap; where that is too wide, one
with a column for each cell is split by budgets and any other is turned; a long one runs over pages.
Widths are measured in LaTeX's default font. The packages that a file needs are named in its first line.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, repeat

from harness.report.export.latex_text import breakable, escape, lines, numeric, pieces, width
from harness.report.names import budget_groups, cell_label, method_label
from harness.report.ranks import MARKS_NOTE, Mark
from harness.report.tables.table import Table
from kvmerge.names import parse_name

_PORTRAIT = (451.0, 620.0)
"""Width and height in points that A4 and letter both have within margins of an inch."""
_LANDSCAPE = (648.0, 440.0)
_SIZES = (9, 8)
"""Points of the table's text; intervals and notes are a point or two smaller, never below 7."""
_GAP = {9: 4.0, 8: 3.0}
"""Points on either side of a column."""
_NARROWEST = 58.0
"""Points that a column of texts has at least before a table is turned instead."""
_LINES = 4
"""Lines that a text has at most, likewise."""
_WORD = 64.0
"""Points from which on a word of a header breaks after its marks, or anywhere."""
_SMALL = 7
_SMALL_FONT = rf"\fontsize{{{_SMALL}}}{{{_SMALL + 1}}}\selectfont "
_BELOW = (
    r"\providecommand{\kvbelow}[3]{\begin{tabular}[t]{@{}#1@{}}#2\\"
    rf"{_SMALL_FONT}#3\end{{tabular}}}}"
)
"""A command of the file's own: a number, and its interval below it."""
_MARKS = {Mark.BEST: r"\textbf", Mark.SECOND: r"\underline"}


@dataclass(frozen=True)
class _Column:
    """One printed column: texts by row, of one line or, with an interval below, of two."""

    header: str
    texts: tuple[str, ...]
    group: str = ""
    """What stands over it, together with its neighbours of the same group."""
    is_cell: bool = False
    is_numeric: bool = False
    marks: Mapping[int, Mark] = field(default_factory=dict)
    """By row."""
    wrap: float | None = None
    """Points that its texts wrap in; None: they stay on their lines."""


@dataclass(frozen=True)
class _Page:
    size: int
    turned: bool

    @property
    def area(self) -> tuple[float, float]:
        """Width and height in points."""
        return _LANDSCAPE if self.turned else _PORTRAIT


def latex(table: Table, *, intervals: bool = True) -> str:
    """Render as LaTeX.

    Args:
        table: what is printed; columns without any text are left out.
        intervals: whether each number of a cell has its interval below it.
    """
    columns = _columns(table, intervals)
    page, blocks = _laid_out(columns)
    label = _label(table, intervals)
    note = _note(table, intervals)
    first = len(table.rows) - len(table.averages)
    rule = first if table.averages and min(table.averages) == first else 0
    printed = [
        _environment(
            block,
            page,
            caption=_caption(table, block if len(blocks) > 1 else ()),
            label=label if place == 0 else f"{label}-{place + 1}",
            note=note if place == 0 else rf"See the note of Table~\ref{{{label}}}.",
            rule=rule,
        )
        for place, block in enumerate(blocks)
    ]
    body = "\n".join(printed)
    needed = ["booktabs"] + [
        package
        for package, sign in (
            ("array", r"\arraybackslash"),
            ("longtable", r"\begin{longtable}"),
            ("pdflscape", r"\begin{landscape}"),
            ("rotating", r"\begin{sidewaystable}"),
        )
        if sign in body
    ]
    return "\n".join(
        [
            f"% \\usepackage{{{','.join(needed)}}}",
            *([_BELOW] if r"\kvbelow" in body else []),
            body,
        ]
    )


# Columns


def _columns(table: Table, intervals: bool) -> list[_Column]:
    """Return what names a row, then cells: those of one budget together, as budgets appear."""
    columns = [
        _Column(
            header=table.header[place],
            texts=tuple(text and _cell(table, text) for text in texts)
            if place in table.naming
            else texts,
            is_numeric=table.numeric[place],
        )
        for place, texts in enumerate(
            zip(*table.rows, strict=True) if table.rows else repeat((), len(table.header))
        )
        if place not in table.cells and (place == 0 or any(texts))
    ]
    places = {table.header[place]: place for place in table.cells}
    for budget, cells in budget_groups(places).items():
        for cell in cells:
            name = parse_name(cell)
            place = places[cell]
            texts = [row[place] for row in table.rows]
            columns.append(
                _Column(
                    header=method_label(name.variant) + _kept(table, cell),
                    texts=tuple(text if intervals else text.split("\n")[0] for text in texts),
                    group="" if name.method == "full" else budget,
                    is_cell=True,
                    is_numeric=table.numeric[place],
                    marks={row: mark for (row, at), mark in table.marks.items() if at == place},
                )
            )
    return columns


def _cell(table: Table, cell: str) -> str:
    return cell_label(cell) + _kept(table, cell)


def _kept(table: Table, cell: str) -> str:
    """Return what a cell kept, where it missed its budget."""
    return f" ({table.missed[cell]})" if cell in table.missed else ""


def _laid_out(columns: Sequence[_Column]) -> tuple[_Page, list[list[_Column]]]:
    """Choose the page and divide the columns into blocks that fit its width."""
    has_cells = any(column.is_cell for column in columns)
    for turned in (False,) if has_cells else (False, True):
        for page in (_Page(size, turned) for size in _SIZES):
            fitted = _fitted(columns, page)
            if fitted is not None:
                return page, [fitted]
    if has_cells:
        page = _Page(_SIZES[-1], turned=False)
        return page, _split(columns, page)
    page = _Page(_SIZES[-1], turned=True)
    return page, [_fitted(columns, page, narrowest=0, highest=math.inf) or list(columns)]


def _fitted(
    columns: Sequence[_Column], page: _Page, narrowest: float = _NARROWEST, highest: float = _LINES
) -> list[_Column] | None:
    """Return the columns as they fit the page's width, texts wrapped where needed; None if they do not.

    The widest texts wrap first: all that do are equally wide.
    """
    left = page.area[0] - 2 * _GAP[page.size] * len(columns)
    natural = [_natural(column, page.size) for column in columns]
    if sum(natural) <= left:
        return list(columns)
    least = [
        width_
        if column.is_numeric or column.is_cell
        else min(width_, max(narrowest, _longest_piece(column, page.size)))
        for column, width_ in zip(columns, natural, strict=True)
    ]
    if sum(least) > left:
        return None
    low, high = 0.0, max(natural)
    for _ in range(30):
        cap = (low + high) / 2
        total = sum(min(most, max(few, cap)) for most, few in zip(natural, least, strict=True))
        low, high = (cap, high) if total <= left else (low, cap)
    wrapped = [
        replace(column, wrap=max(few, low)) if max(few, low) < most else column
        for column, most, few in zip(columns, natural, least, strict=True)
    ]
    most_lines = max(_lines(column, row, page.size) for column in wrapped for row in _rows(column))
    return wrapped if most_lines <= highest else None


def _split(columns: Sequence[_Column], page: _Page) -> list[list[_Column]]:
    """Divide columns of cells into blocks: whole budgets where one fits, each beside what names a row.

    The full cache, which all are held against, stands in every block.
    """
    stub = [column for column in columns if not column.is_cell or column.group == ""]
    rest = [column for column in columns if column not in stub]
    blocks: list[list[_Column]] = []
    for _, members in groupby(rest, key=lambda column: column.group):
        whole = list(members)
        parts = [whole] if _fitted([*stub, *whole], page) else [[column] for column in whole]
        for part in parts:
            if blocks and _fitted([*stub, *blocks[-1], *part], page):
                blocks[-1] += part
            else:
                blocks.append(part)
    return [_fitted([*stub, *block], page) or [*stub, *block] for block in blocks]


def _natural(column: _Column, size: int) -> float:
    """Return how wide a column is that wraps nothing but its header, between words."""
    words = [width(word, size) for word in _words(column.header, size)]
    shown = [
        width(line, _SMALL) if below else width(line, size, bold=row in column.marks)
        for row, text in enumerate(column.texts)
        for below, line in enumerate(text.split("\n"))
    ]
    return max([*words, *shown, 0.0]) + 0.5


def _rows(column: _Column) -> range:
    return range(len(column.texts))


def _lines(column: _Column, row: int, size: int) -> int:
    """Return how many lines a text has, without the one below it that an interval takes."""
    text = column.texts[row].split("\n")[0]
    return lines(text, size, column.wrap) if column.wrap else 1


def _longest_piece(column: _Column, size: int) -> float:
    words = {word for text in column.texts for word in text.split()} | set(column.header.split())
    return max((width(piece, size) for word in words for piece in pieces(word)), default=0.0) + 1


# What is printed


def _environment(
    columns: Sequence[_Column], page: _Page, *, caption: str, label: str, note: str, rule: int
) -> str:
    """Return one float, or a table over pages where it would be too high for one."""
    head = _head(columns, page)
    rows = [_row(columns, row) for row in _rows(columns[0])]
    if rule:
        rows.insert(rule, r"\midrule")
    spec = "".join(map(_alignment, columns))
    style = (
        rf"\fontsize{{{page.size}}}{{{page.size + 2}}}\selectfont"
        rf"\setlength{{\tabcolsep}}{{{_GAP[page.size]:g}pt}}"
    )
    if _height(columns, page, caption, note) > page.area[1]:
        return _over_pages(head, rows, spec, style, page, caption=caption, label=label, note=note)
    name = "sidewaystable" if page.turned else "table"
    return "\n".join(
        [
            rf"\begin{{{name}}}[tbp]" if name == "table" else rf"\begin{{{name}}}[p]",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{{label}}}",
            style,
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            *head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\par\smallskip\parbox{{\linewidth}}{{{_small(note)}}}",
            rf"\end{{{name}}}",
            "",
        ]
    )


def _over_pages(
    head: Sequence[str],
    rows: Sequence[str],
    spec: str,
    style: str,
    page: _Page,
    *,
    caption: str,
    label: str,
    note: str,
) -> str:
    lines = [
        rf"\begingroup{style}\setlength{{\LTcapwidth}}{{\linewidth}}",
        rf"\begin{{longtable}}{{{spec}}}",
        rf"\caption{{{caption}}}\label{{{label}}}\\",
        r"\toprule",
        *head,
        r"\midrule",
        r"\endfirsthead",
        r"\toprule",
        *head,
        r"\midrule",
        r"\endhead",
        r"\bottomrule",
        r"\endfoot",
        *rows,
        r"\end{longtable}",
        rf"\noindent{_small(note)}",
        r"\endgroup",
        "",
    ]
    if page.turned:
        lines = [r"\begin{landscape}", *lines[:-1], r"\end{landscape}", ""]
    return "\n".join(lines)


def _head(columns: Sequence[_Column], page: _Page) -> list[str]:
    """Return the lines of the header: budgets over the cells that they span, then names."""
    lines = []
    if any(column.group for column in columns):
        over, rules, place = [], [], 1
        for group, members in groupby(columns, key=lambda column: column.group):
            count = len(list(members))
            if group:
                over.append(rf"\multicolumn{{{count}}}{{c}}{{{escape(group)}}}")
                rules.append(rf"\cmidrule(lr){{{place}-{place + count - 1}}}")
            else:
                over += [""] * count
            place += count
        lines += [_line(over), "".join(rules)]
    return [*lines, _line([_header(column, page.size) for column in columns])]


def _header(column: _Column, size: int) -> str:
    if column.wrap:
        return breakable(column.header)
    stacked = _stacked(column, size)
    if len(stacked) < 2:
        return escape(column.header)
    side = "r" if column.is_numeric else "l"
    return (
        rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}"
        + r"\\".join(map(escape, stacked))
        + r"\end{tabular}"
    )


def _stacked(column: _Column, size: int) -> list[str]:
    """Return the lines of a header: no wider than what stands below, or than its longest word."""
    below = max(
        [
            width(line, _SMALL if number else size)
            for text in column.texts
            for number, line in enumerate(text.split("\n"))
        ],
        default=0.0,
    )
    words = _words(column.header, size)
    available = max([below, *(width(word, size) for word in words)])
    stacked: list[str] = []
    for word in words:
        if stacked and width(f"{stacked[-1]} {word}", size) <= available:
            stacked[-1] += f" {word}"
        else:
            stacked.append(word)
    return stacked


def _words(header: str, size: int) -> list[str]:
    """Return the words of a header, those that are long in parts."""
    words: list[str] = []
    for word in header.split():
        if width(word, size) <= _WORD:
            words.append(word)
            continue
        parts = [""]
        for piece in pieces(word):
            if parts[-1] and width(parts[-1] + piece, size) > _WORD:
                parts.append("")
            parts[-1] += piece
        words += parts
    return words


def _row(columns: Sequence[_Column], row: int) -> str:
    line = _line([_shown(column, row) for column in columns])
    high = any("\n" in column.texts[row] or column.wrap for column in columns)
    return line + r"\addlinespace[2pt]" if high else line


def _shown(column: _Column, row: int) -> str:
    """Return what stands in a row of a column: its text, and in small below what belongs to that."""
    text, _, below = column.texts[row].partition("\n")
    mark = column.marks.get(row)
    shown = numeric(text) if column.is_numeric else escape(text)
    if column.wrap:
        shown = breakable(text)
        return shown + rf"\newline {{{_SMALL_FONT}{breakable(below)}}}" if below else shown
    shown = rf"{_MARKS[mark]}{{{shown}}}" if mark else shown
    side = "r" if column.is_numeric else "l"
    return rf"\kvbelow{{{side}}}{{{shown}}}{{{numeric(below)}}}" if below else shown


def _line(texts: Sequence[str]) -> str:
    line = " & ".join(texts)
    # After \\ these would be its arguments.
    return ("{}" if line.startswith(("[", "*")) else "") + line + r" \\"


def _alignment(column: _Column) -> str:
    if column.wrap:
        return rf">{{\raggedright\arraybackslash}}p{{{column.wrap:.1f}pt}}"
    return "r" if column.is_numeric else "l"


def _small(note: str) -> str:
    return rf"{{\fontsize{{8}}{{9.5}}\selectfont\raggedright {note}\par}}"


# Words


def _caption(table: Table, block: Iterable[_Column]) -> str:
    """Return the title, what was measured, and in one of several blocks its budgets."""
    groups = list(dict.fromkeys(column.group for column in block if column.group))
    parts = [table.title, *([table.subject] if table.subject else [])]
    budgets = f" ({', '.join(groups)})" if groups else ""
    return f"{breakable(', '.join(parts))}{escape(budgets)}."


def _note(table: Table, intervals: bool) -> str:
    """Return what the caption and the notes of a table say, of intervals only where they stand."""
    caption = table.caption
    if not intervals:
        caption = " ".join(caption.replace(table.brackets, "").split())
    marks = [MARKS_NOTE] if table.marks else []
    text = " ".join((caption, *marks, *table.notes))
    named = [*(table.header[place] for place in table.cells)]
    named += [row[place] for place in table.naming for row in table.rows if row[place]]
    for cell in sorted(set(named), key=len, reverse=True):
        text = text.replace(cell, cell_label(cell)) if cell else text
    return breakable(text)


def _label(table: Table, intervals: bool) -> str:
    name = f"{table.name} {table.subject}" + " intervals" * (intervals and bool(table.cells))
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return "tab:" + "-".join(re.findall(r"[a-z0-9.]+", plain))


def _height(columns: Sequence[_Column], page: _Page, caption: str, note: str) -> float:
    """Return about how high a table is with its caption and note, in points."""
    across = page.area[0]
    rows = sum(
        (page.size + 2) * max(_lines(column, row, page.size) for column in columns)
        + (_SMALL + 3) * any("\n" in column.texts[row] for column in columns)
        + 2
        for row in _rows(columns[0])
    )
    heads = (
        lines(column.header, page.size, column.wrap)
        if column.wrap
        else len(_stacked(column, page.size))
        for column in columns
    )
    head = (max(heads) + 1) * (page.size + 3)
    return rows + head + 10 * (width(note, 8) / across + 4) + 12 * (width(caption, 10) / across + 3)
