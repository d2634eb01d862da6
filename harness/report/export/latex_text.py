"""Text as LaTeX takes it, and how wide it is set."""

from __future__ import annotations

import re
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font

_SPECIAL = {
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
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "†": r"\dag{}",
    "‡": r"\ddag{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
}
_ACCENTED = set("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿŒœŠšŽž")
"""What the default encodings of pdfLaTeX set; of other letters they stop with an error."""

_SCALE = {10: 10.0, 9: 9.25, 8: 8.5, 7: 7.98}
"""Points to scale the 10 pt cut of Computer Modern to, which is drawn wider for smaller sizes."""
_BOLD = 1.17
"""Width of the bold cut over the plain one."""
_WIDE = 0.8
"""Width in ems that few characters exceed."""
_ELSEWHERE = {"\\": 0.5, "<": _WIDE, ">": _WIDE, "|": 0.28, "{": 0.5, "}": 0.5, "_": 0.33}
"""Widths in ems of characters in whose place the font has another."""
_BREAKS = "_/.,:=@-"
"""Marks that a line may end with."""
_PART = re.compile(f"[^{_BREAKS}]*[{_BREAKS}]+|[^{_BREAKS}]+")
_LONGEST = 12
"""Characters of a word without such a mark that stay together."""
_MINUS = 0.45
"""By how many ems a minus is wider than a hyphen."""
_SIGN = re.compile(r"(?<![\w.])[-+](?=\d)")


def escape(text: str) -> str:
    """Return a text for LaTeX; a character that pdfLaTeX cannot set stands as `[U+4E2D]`."""
    return "".join(map(_character, text)).replace("--", "-{}-")


def breakable(text: str) -> str:
    """Return a text for LaTeX whose long words may break over lines: after marks, or anywhere."""
    return " ".join(
        r"\allowbreak{}".join(escape(piece) for piece in pieces(word)) for word in text.split()
    )


def pieces(word: str) -> list[str]:
    """Return what `breakable` keeps together of a word."""
    return [
        part[start : start + _LONGEST]
        for part in _PART.findall(word)
        for start in range(0, len(part), _LONGEST)
    ]


def numeric(text: str) -> str:
    """Return a number or an interval for LaTeX, its signs as long as mathematics has them."""
    return _SIGN.sub(lambda match: f"${match[0]}$", escape(text))


def width(text: str, size: int, *, bold: bool = False) -> float:
    """Return how wide a line is in points, in LaTeX's default font at 7, 8, 9 or 10 points."""
    return _ems(text) * _SCALE[size] * (_BOLD if bold else 1)


@lru_cache(1 << 16)
def _ems(text: str) -> float:
    return sum(_em(character) for character in text) + _MINUS * len(_SIGN.findall(text))


def lines(text: str, size: int, across: float) -> int:
    """Return how many lines `breakable` text fills in a column `across` points wide, at least 1."""
    count, filled = 1, 0.0
    for word in text.split():
        parts = [width(piece, size) for piece in pieces(word)]
        space = width(" ", size) if filled else 0.0
        for part in parts:
            if filled and filled + space + part > across:
                count, filled = count + 1, part
            else:
                filled += space + part
            space = 0.0
    return count


@cache
def _character(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if character.isspace():
        return " "
    if character in _ACCENTED or " " <= character <= "~":
        return character
    return f"[U+{ord(character):04X}]"


@cache
def _em(character: str) -> float:
    if character in _ELSEWHERE:
        return _ELSEWHERE[character]
    shown = _character(character)
    if shown.startswith("[U+"):
        return sum(map(_em, shown))
    letter = ord(unicodedata.normalize("NFD", character)[0])
    font = _font()
    if letter not in font.get_charmap():
        return _WIDE
    return float(font.load_char(letter).linearHoriAdvance) / 65536 / 10


@cache
def _font() -> FT2Font:
    """Return Computer Modern, which matplotlib brings along, at 10 points."""
    font = FT2Font(str(Path(get_data_path()) / "fonts" / "ttf" / "cmr10.ttf"))
    font.set_size(10, 72)
    return font
