"""Values as JSON gives them, held against the annotations of what they are read into."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from benchmarks.rows import TEXT, Kind, shown


class Misfit(ValueError):
    """JSON that was read whole, and whose values are not of the types that are needed."""


class Shape(NamedTuple):
    """What a value must be: in words, and as tests."""

    words: str
    fits: Callable[[Any], bool]
    misfits: Callable[[str, Any], Sequence[str]]
    """From a value's place and the value to what does not fit, a sentence's part each."""


@dataclass(frozen=True)
class Between:
    """Bounds of a number, to stand in `Annotated`; both may be met."""

    low: float
    high: float = math.inf

    @property
    def words(self) -> str:
        """The bounds as a message names them."""
        return f"{self.low:g} or more" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


Count = Annotated[int, Between(0)]
Positive = Annotated[float, Between(0)]
"""A float of 0 or more."""
Share = Annotated[float, Between(0, 1)]

_NAMED = 5
"""Faults of one line that a message names."""
_LARGEST = 2**63
"""Whole numbers beyond it overflow in numpy, and where `datasets` reads them."""


def _is_whole(value: Any) -> bool:
    return type(value) is int and -_LARGEST <= value < _LARGEST  # a bool is an int to isinstance


def _is_number(value: Any) -> bool:
    return math.isfinite(value) if type(value) is float else _is_whole(value)


_KINDS = {
    str: TEXT,
    int: Kind("a whole number of 64 bits", _is_whole),
    float: Kind("a finite number", _is_number),
    NoneType: Kind("null", lambda value: value is None),
    Any: Kind("anything", lambda value: True),
}
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def shape_of(annotation: Any) -> Shape:
    """Return what a value must be to be read into an annotation.

    Understood are texts, numbers, `None`, `Any`, literal texts and unions of them, lists and tuples of
    one type, mappings, `TypedDict`, and numbers with `Between`.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_typeddict(annotation):
        return _object(annotation)
    if origin is Annotated:
        return _bounded(shape_of(arguments[0]), arguments[1])
    if origin in (Union, UnionType):
        return _either([shape_of(each) for each in arguments])
    if origin is Literal:
        return _plain(Kind(" or ".join(map(repr, arguments)), lambda value: value in arguments))
    if origin in (list, tuple):
        return _list(shape_of(arguments[0]))
    if origin is Mapping:
        return _mapping(*map(shape_of, arguments))
    return _plain(_KINDS[annotation])


def _plain(kind: Kind) -> Shape:
    def misfits(place: str, value: Any) -> Sequence[str]:
        return () if kind.fits(value) else (f"{place} must be {kind.words}, got {shown(value)}",)

    return Shape(kind.words, kind.fits, misfits)


def _bounded(shape: Shape, bounds: Between) -> Shape:
    def fits(value: Any) -> bool:
        return shape.fits(value) and bounds.low <= value <= bounds.high

    return _plain(Kind(f"{shape.words}, {bounds.words}", fits))


def _either(shapes: Sequence[Shape]) -> Shape:
    def fits(value: Any) -> bool:
        return any(shape.fits(value) for shape in shapes)

    return _plain(Kind(" or ".join(shape.words for shape in shapes), fits))


def _list(each: Shape) -> Shape:
    whole = _plain(Kind("a list", lambda value: isinstance(value, list)))

    def fits(value: Any) -> bool:
        return whole.fits(value) and all(map(each.fits, value))

    def misfits(place: str, value: Any) -> Sequence[str]:
        return whole.misfits(place, value) or [
            wrong for i, one in enumerate(value) for wrong in each.misfits(f"{place}[{i}]", one)
        ]

    return Shape(whole.words, fits, misfits)


def _mapping(key: Shape, each: Shape) -> Shape:
    whole = _plain(_OBJECT)

    def misfits(place: str, value: Any) -> Sequence[str]:
        return whole.misfits(place, value) or [
            wrong
            for name, one in value.items()
            for wrong in (
                *key.misfits(f"a name in {place}", name),
                *each.misfits(f"{place}.{name}", one),
            )
        ]

    return Shape(_OBJECT.words, lambda value: not misfits("", value), misfits)


def _object(annotation: Any) -> Shape:
    whole = _plain(_OBJECT)
    hints = get_type_hints(annotation, include_extras=True)
    shapes = {name: shape_of(hint) for name, hint in hints.items()}

    def of_field(place: str, name: str, value: Mapping[str, Any]) -> Sequence[str]:
        if name in value:
            return shapes[name].misfits(place, value[name])
        return (f"{place} is missing",) if name in annotation.__required_keys__ else ()

    def misfits(place: str, value: Any) -> Sequence[str]:
        below = f"{place}." if place else ""
        return whole.misfits(place, value) or [
            wrong for name in shapes for wrong in of_field(below + name, name, value)
        ]

    return Shape(_OBJECT.words, lambda value: not misfits("", value), misfits)


def parse_object(data: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises `ValueError` saying why it is none."""
    try:
        value = json.loads(data.decode("utf-8") if isinstance(data, bytes) else data)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("lists or objects too deep in each other") from error
    if not isinstance(value, dict):
        raise ValueError(f"an object is needed, not {type(value).__name__}")
    return value


def parse_fields(data: str | bytes, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Parse a JSON object that has every one of some keys, and no other.

    Raises `ValueError` where it is none or lacks a key; `Misfit` naming the first `_NAMED` faults.
    """
    row = parse_object(data)
    missing = [name for name in shapes if name not in row]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    wrong = [f"{name} is no field" for name in row if name not in shapes]
    wrong += [why for name, shape in shapes.items() for why in shape.misfits(name, row[name])]
    if wrong:
        raise Misfit("; ".join(wrong[:_NAMED]))
    return row


class Line:
    """A dataclass that is one line of JSON: each of its fields is a key, and no other is one."""

    def to_json(self) -> str:
        """Return it as one line of JSON, without newline."""
        return json.dumps(asdict(self), ensure_ascii=False)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read one line back. Raises `ValueError` where it is none, `Misfit` naming what is wrong."""
        return cls(**parse_fields(line, _shapes_of(cls)))  # type: ignore[arg-type]


@cache
def _shapes_of(kind: type) -> dict[str, Shape]:
    return {name: shape_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
