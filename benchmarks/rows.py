"""Reading benchmark rows: one JSON object a line, checked before anything is computed from them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvmerge.errors import UserError
from kvmerge.files import read_regular

SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of a character that JSON can escape and no tokenizer can encode."""


class Kind(NamedTuple):
    """What a field may hold: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATE.search(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


ANY: Mapping[str, Kind] = {}
"""No field is asked for."""
TEXT = Kind("a string of valid Unicode", _is_text)
TEXTS = Kind("a list of strings", _are_texts)
TEXTS_OR_NULL = Kind("a list of strings or null", lambda v: v is None or _are_texts(v))


def read_bytes(path: Path) -> bytes:
    """Return what a file holds. Raises UserError naming the file if it cannot be read."""
    try:
        return read_regular(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` as hex digits."""
    return hashlib.sha256(data).hexdigest()


def parse_rows(
    data: bytes, source: str, fields: Mapping[str, Kind], *, id_field: str | None
) -> list[tuple[str, dict[str, Any]]]:
    """Parse JSON lines (UTF-8, blank lines skipped) into pairs of place and row.

    The place names `source` and the line, for messages. Every row must hold `fields`, each of its
    kind; `id_field`, one of them, may not repeat, and None allows repetitions. Further fields are
    passed through. Lines end at `\\n` alone, because U+2028 and its like occur inside strings.
    Raises UserError with the place of the first bad row, or saying that there are none.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        row = _parse_line(line, place)
        _check_fields(row, fields, place)
        if id_field is not None:
            before = first_seen.setdefault(row[id_field], number)
            if before != number:
                raise UserError(
                    f"{place}: {id_field} {row[id_field]!r} is already that of line {before}; "
                    f"every row needs its own. Remove or rename one of the two."
                )
        rows.append((place, row))
    if not rows:
        raise UserError(f"{source} holds no rows; expected one JSON object a line.")
    return rows


def parse_csv(data: bytes, source: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse a CSV file (UTF-8, the first line names the columns) into pairs of place and row.

    Every value is the text that stands there. Raises UserError with the place of a row that has more
    or fewer values than there are columns, and for what is not UTF-8 or names a column twice.
    """
    limit = csv.field_size_limit(max(len(data), 1))  # 131,072 characters by default
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns = next(lines, [])
        if not columns or len(set(columns)) < len(columns):
            raise UserError(f"{source}: its first line must name the columns, each once: {columns}.")
        rows = []
        for values in lines:
            place = f"{source}, line {lines.line_num}"
            if values and len(values) != len(columns):
                raise UserError(
                    f"{place}: {len(values)} values for {len(columns)} columns; commas inside a value "
                    "need double quotes around it."
                )
            if values:
                rows.append((place, dict(zip(columns, values, strict=True))))
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source}, line {number}: not UTF-8 ({error.reason} at byte {error.start})."
        ) from error
    except csv.Error as error:
        raise UserError(f"{source}, line {lines.line_num}: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}).") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, got {shown(row)}.")
    return row


def _check_fields(row: Mapping[str, Any], fields: Mapping[str, Kind], place: str) -> None:
    missing = [name for name in fields if name not in row]
    if missing:
        raise UserError(
            f"{place}: missing field {', '.join(missing)}. "
            f"Needed: {', '.join(fields)}; found: {', '.join(row) or 'none'}."
        )
    for name, kind in fields.items():
        if not kind.fits(row[name]):
            raise UserError(f"{place}: field {name} must be {kind.words}, got {shown(row[name])}.")


def shown(value: Any) -> str:
    """Return a value as a message may show it: in ASCII, at most 80 characters."""
    try:
        text = ascii(value)
    except RecursionError:
        text = "lists or objects too deep in each other"
    return text if len(text) <= 80 else f"{text[:77]}..."
