"""What a setting may hold, read from the annotations of what takes it: one check for all of them.

Settings arrive as plain data (numbers, texts, lists, mappings). A class states by its annotations what
each may be; nothing is converted, so that no text becomes a number unseen.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kvmerge.errors import UserError, unknown

T = TypeVar("T")
MISSING = "???"
"""What stands for a setting that has no default, as OmegaConf has it."""
_LONGEST = 200
"""Characters of a value that a message shows."""
_PLAIN: Mapping[Any, tuple[str, ...]] = {
    bool: ("true", "false"),
    int: ("a whole number",),
    float: ("a number",),
    str: ("a text",),
    NoneType: ("null",),
}


@dataclasses.dataclass(frozen=True)
class Within:
    """Bounds of a whole number, for use in `Annotated[int, Within(1)]`."""

    least: int
    most: int | None = None

    def __contains__(self, value: int) -> bool:
        return self.least <= value and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f"of {self.least} or more" if self.most is None else f"from {self.least} to {self.most}"


def construct(target: Callable[..., T], settings: Mapping[str, Any], section: str = "") -> T:
    """Call a target with settings that it has and can use.

    Args:
        target: a class or function; its annotations say what a setting may hold.
        settings: one for each argument that is to be given.
        section: how the command line calls the target, e.g. `model`, for messages; may be empty.

    Raises:
        UserError: naming the setting that does not exist, is missing, or holds what it may not.
    """
    name = section or f"{target.__module__}.{target.__qualname__}"
    kinds = _kinds(target)
    known = _parameters(target)
    for key, value in settings.items():
        if known is not None and key not in known:
            raise unknown(f"setting of {name}", str(key), known)
        if key in kinds and not fits(value, kinds[key]):
            raise _refusal(f"{section}.{key}" if section else key, value, kinds[key])
    missing = [key for key, default in (known or {}).items() if default is inspect.Parameter.empty]
    if lacking := [key for key in missing if key not in settings]:
        raise UserError(f"{name} needs {', '.join(lacking)}.")
    try:
        return target(**settings)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot take {_shown(dict(settings))}: {error}") from error


def defaults(target: type) -> dict[str, Any]:
    """Return what a class is called with where nothing is given, as plain data, in its own order.

    An argument without a default is `MISSING`. One whose default is no plain data is left out, and so
    keeps it.
    """
    made = {
        each.name: each.default_factory()
        for each in (dataclasses.fields(target) if dataclasses.is_dataclass(target) else ())
        if each.default_factory is not dataclasses.MISSING
    }
    found = {name: made.get(name, default) for name, default in (_parameters(target) or {}).items()}
    return {
        name: MISSING if value is inspect.Parameter.empty else _plain(value)
        for name, value in found.items()
        if value is inspect.Parameter.empty or is_plain(value)
    }


def is_plain(value: Any) -> bool:
    """Return whether a value is what a configuration file can hold."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    return type(value) in _PLAIN


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of an annotated kind; whole numbers are numbers, booleans are not."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inside)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inside)
    if bounds := getattr(kind, "__metadata__", None):
        return fits(value, inside[0]) and all(value in each for each in bounds)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool) and value == value
    if kind is bool or kind is str or kind is NoneType:
        return isinstance(value, kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if origin is not None:  # of texts or numbers, in any number
        return isinstance(value, list | tuple) and all(fits(each, inside[0]) for each in value)
    return not isinstance(kind, type) or isinstance(value, kind)


def words(kind: Any) -> list[str]:
    """Return what an annotated kind allows, in words."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return [word for each in inside for word in words(each)]
    if origin is Literal:
        return [str(each) for each in inside]
    if bounds := getattr(kind, "__metadata__", None):
        return [f"{' '.join(words(inside[0]))} {bounds[0]}"]
    if kind in _PLAIN:
        return list(_PLAIN[kind])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return ["a mapping {name: value, ...}"]
    if origin is not None:
        return ["a list" if inside[0] is Any else f"a list, each entry {listed(words(inside[0]))}"]
    return [f"settings of a {getattr(kind, '__name__', kind)}"]


def listed(names: list[str]) -> str:
    """Return names as a sentence lists them."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _refusal(name: str, value: Any, kind: Any) -> UserError:
    message = f"{name}={_shown(value)} must be {listed(words(kind))}."
    if fits(str(value), kind) and isinstance(value, bool | int | float):
        message += f" A text that looks like something else needs quotes: \"{name}='{value}'\"."
    return UserError(message)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _kinds(target: Any) -> dict[str, Any]:
    """Return the annotations of what a target is called with."""
    of_init = isinstance(target, type) and not dataclasses.is_dataclass(target)
    return get_type_hints(target.__init__ if of_init else target, include_extras=True)


def _parameters(target: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the names that a target is called with and their defaults; None if it takes any."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a builtin
        return None
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return None
    return {
        name: each.default
        for name, each in parameters.items()
        if each.kind is not inspect.Parameter.VAR_POSITIONAL
    }
