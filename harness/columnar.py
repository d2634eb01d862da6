"""The records of a file as columns, read in one go where nothing at all is wrong with the file.

A folder may hold some hundred thousand records. As columns they are read, checked and held many times
faster and smaller than as objects. What is odd in a file is for `harness.records` to judge, line by
line: whatever is not plainly right here is read there.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Set
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import json as arrow_json

from harness.records import PART, REQUIRED, SHAPES, Record, read_records

_OF_SAMPLE = ("id", "prompt_hash", "answers")
"""Fields that all cells of a task have alike, and that take up room."""
_ROWS = 64
"""Rows that are objects at a time while records are gone through one by one."""
_BRACKETS = 1_000
"""Opening brackets and braces of one line, those of its texts among them."""
_APART = np.uint8(ord("{") ^ ord("["))
"""The one bit in which a brace differs from a bracket."""
_EXACT = 2**53
"""Whole numbers beyond it may not come through a column of floats."""


class Records(Sequence[Record]):
    """Records in the order of their file: columns, and objects behind them that were added later.

    Going through them one by one makes each record anew; `numbers` and `values` are the fast ways.
    """

    def __init__(self, added: Iterable[Record] = (), table: pa.Table | None = None) -> None:
        self.table = table
        self._added = list(added)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Records:
        """Return records as they are where they are some already."""
        return records if isinstance(records, Records) else cls(records)

    def numbers(self, field: str) -> NDArray[np.float64]:
        """Return a field or a metric's part of every record, `(records,)`; NaN where there is none.

        `TypeError` or `ValueError` where that is no number.
        """
        table = self.table
        added = [_value(record, field) for record in self._added]
        later = np.array([np.nan if value is None else value for value in added], dtype=np.float64)
        if table is None:
            return later
        if field not in table.column_names:
            return np.concatenate([np.full(len(table), np.nan), later])
        column = pc.cast(table[field], pa.float64()).combine_chunks()
        return np.concatenate([column.to_numpy(zero_copy_only=False), later])

    def values(self, field: str) -> list[Any]:
        """Return a field, or what else its line held, of every record; None where there is none."""
        held: list[Any] = [None] * self.held
        if self.table is not None and field in self.table.column_names:
            held = self.table[field].to_pylist()
        return held + [_value(record, field) for record in self._added]

    def extremes(self, field: str) -> tuple[float, float]:
        """Return the least and the greatest of a field's numbers; NaN where no record has one."""
        known = [value for record in self._added if (value := _value(record, field)) is not None]
        if self.table is not None and field in self.table.column_names:
            ends = pc.min_max(self.table[field]).as_py().values()
            known += [value for value in ends if value is not None]
        return (min(known), max(known)) if known else (np.nan, np.nan)

    def samples(self) -> tuple[list[str], NDArray[np.intp]]:
        """Return the ids, each once in the order of the first ones, and every record's place there."""
        if self.table is not None and not self._added:
            ids = self.table["id"].combine_chunks().dictionary_encode()
            return ids.dictionary.to_pylist(), ids.indices.to_numpy().astype(np.intp)
        names = self.values("id")
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        return list(places), np.array([places[name] for name in names], dtype=np.intp)

    def distinct(self, *names: str) -> set[tuple[Any, ...]]:
        """Return what some fields hold together in any record; None where there is none."""
        held = []
        if self.table is not None:
            held = self.table.select(names).group_by(names).aggregate([]).to_pylist()
        found = {tuple(row.values()) for row in held}
        return found | {tuple(_value(record, name) for name in names) for record in self._added}

    def having(self, field: str) -> Records:
        """Return those that have a field; these records themselves where that is all."""
        table = self.table
        if not self._added and (table is None or not table[field].null_count):
            return self
        added = [record for record in self._added if _value(record, field) is not None]
        return Records(added, None if table is None else table.filter(pc.is_valid(table[field])))

    def where(self, field: str, value: object) -> Records:
        """Return those that have a field of some value."""
        table = self.table
        added = [record for record in self._added if _value(record, field) == value]
        return Records(added, None if table is None else table.filter(pc.equal(table[field], value)))

    def only(self, ids: Set[str]) -> Records:
        """Return those of some samples; these records themselves where that is all."""
        table = self.table
        if set(self.values("id")) <= ids:
            return self
        added = [record for record in self._added if record.id in ids]
        if table is not None:
            table = table.filter(pa.array([name in ids for name in table["id"].to_pylist()]))
        return Records(added, table)

    def append(self, record: Record) -> None:
        """Add one that was written behind the others."""
        self._added.append(record)

    def sort(self, key: Callable[[Record], Any]) -> None:
        """Put them in an order, as their file was."""
        self._added, self.table = sorted(self, key=key), None

    def __len__(self) -> int:
        return self.held + len(self._added)

    @property
    def held(self) -> int:
        """How many are columns."""
        return 0 if self.table is None else len(self.table)

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, self.held, _ROWS):
            yield from self._rows(start, _ROWS)
        yield from self._added

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._rows(place, 1)[0] if place < self.held else self._added[place - self.held]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def _rows(self, start: int, count: int) -> list[Record]:
        assert self.table is not None
        return [_record(row) for row in self.table.slice(start, count).to_pylist()]


def _value(record: Record, field: str) -> Any:
    return getattr(record, field) if field in _FIELDS else record.extra.get(field)


def _record(row: dict[str, Any]) -> Record:
    others = {name: row.pop(name) for name in tuple(row) if name not in _FIELDS}
    extra = {name: value for name, value in others.items() if value is not None}
    return Record(**row | {"answers": tuple(row["answers"])}, extra=extra)


def joined(parts: Sequence[Records]) -> Records:
    """Return the records of several files, one file after the other."""
    if len(parts) == 1:
        return parts[0]
    if any(len(part) > part.held for part in parts):
        return Records(chain.from_iterable(parts))
    tables = [part.table for part in parts if part.held]
    return Records(table=pa.concat_tables(tables, promote_options="default") if tables else None)


def read_columns(path: Path, like: Records | None = None, without: Container[str] = ()) -> Records:
    """Read a prediction file; a missing one has no records.

    Args:
        path: the file.
        like: records of the same task: columns that are the same there are held once.
        without: fields to check but not to hold, where the file is read as columns.

    Raises:
        UserError: as `read_records` does, which reads the file where anything is odd.
    """
    found = sound_records(path, like, without)
    return Records(read_records(path)) if found is None else found


def sound_records(
    path: Path, like: Records | None = None, without: Container[str] = ()
) -> Records | None:
    """Return the records of a file with which nothing is wrong; None of any other, and of none."""
    table = _sound(path)
    if table is None:
        return None
    held = table.select([name for name in table.column_names if name not in without])
    return Records(table=_sharing(held, like))


def _sharing(table: pa.Table, like: Records | None) -> pa.Table:
    other = None if like is None else like.table
    if other is None or len(other) != len(table):
        return table
    for name in _OF_SAMPLE:
        if other[name].equals(table[name]):
            table = table.set_column(table.column_names.index(name), name, other[name])
    return table


def _sound(path: Path) -> pa.Table | None:
    """Return the columns of a file in which every line is a record and no two are of one sample."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw == ord("\n"))
    # In JSON, a brace can be parted from the next by a line's end alone only between two objects.
    apart = (raw[ends - 1] == ord("}")).all() and (raw[ends[:-1] + 1] == ord("{")).all()
    if not (data.startswith(b"{") and data.endswith(b"}\n") and apart):
        return None
    # Arrow's parser calls itself for every level, until the stack is full and the process dies.
    opened = np.flatnonzero(raw & ~_APART == ord("["))
    if np.diff(np.searchsorted(opened, ends), prepend=0).max() > _BRACKETS:
        return None
    try:
        data.decode()  # Arrow takes names of any bytes
        table = arrow_json.read_json(
            pa.BufferReader(data),
            arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            arrow_json.ParseOptions(explicit_schema=_SCHEMA),
            memory_pool=pa.system_memory_pool(),  # which keeps less of what it got than Arrow's own
        )
    except (ValueError, OverflowError, pa.ArrowException):
        return None
    keys = zip(table["id"].to_pylist(), table["seed"].to_pylist(), strict=True)
    known = len(table) == len(ends) and all(_fits(name, table[name]) for name in table.column_names)
    return table if known and len(set(keys)) == len(ends) else None


def _fits(name: str, column: pa.ChunkedArray) -> bool:
    """Return whether all values of a column are what the key may hold; a doubtful one is not."""
    if column.null_count and (name in REQUIRED or name not in _FIELDS):
        return False  # null, or not there at all: no column tells which
    fits = SHAPES.get(name, PART).fits
    if pa.types.is_list(column.type):
        flat = pc.list_flatten(column)
        return not flat.null_count and (
            pa.types.is_string(flat.type) or _all_fit(flat, lambda x: fits([x]))
        )
    if name in _TEXTS:
        return True
    return _all_fit(column, fits)


def _all_fit(column: pa.ChunkedArray, fits: Callable[[Any], bool]) -> bool:
    """Return whether a test that holds of two numbers, and so of all between, holds of a column."""
    if pa.types.is_string(column.type):
        column = column.unique()
    if not pa.types.is_floating(column.type) and not pa.types.is_integer(column.type):
        return all(map(fits, column.drop_null().to_pylist()))
    low, high = pc.min_max(column).as_py().values()
    if low is None:
        return True
    finite = pc.all(pc.is_finite(column)).as_py()
    return finite and fits(low) and fits(high) and max(-low, high) < _EXACT


def _type_of(annotation: Any) -> pa.DataType:
    """Return the type of a column for the values of an annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_of(arguments[0])
    if origin in (Union, UnionType):
        return _type_of(next(each for each in arguments if each is not NoneType))
    if origin in (list, tuple):
        return pa.list_(_type_of(arguments[0]))
    return {int: pa.int64(), float: pa.float64()}.get(annotation, pa.string())


_SCHEMA = pa.schema(
    [
        (name, _type_of(hint))
        for name, hint in get_type_hints(Record, include_extras=True).items()
        if name != "extra"
    ]
)
_FIELDS = frozenset(_SCHEMA.names)
_TEXTS = {name for name, hint in get_type_hints(Record).items() if hint in (str, str | None)}
"""Fields that may hold any text."""
