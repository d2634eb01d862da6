"""From a choice's name to what it describes: the one dynamic import of the project.

A method is a class and a file `method/<name>.yaml` that names it under `_target_` and lists every
setting with its value. The folders (`kvmerge.places`) are the list of methods; there is no registry
beside them. A file that differs from another in a few settings names that one under `defaults`, as
Hydra has it. A class without a file, by an entry point or its dotted name, has its arguments' defaults.
"""

from __future__ import annotations

import functools
import pkgutil
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvmerge.errors import UserError, first_line, unknown
from kvmerge.places import choices, files, find, target_of, where
from kvmerge.schema import MISSING, construct, defaults

if TYPE_CHECKING:
    from kvmerge.method import Method

_TARGET = "_target_"


def settings_of(group: str, name: str) -> dict[str, Any]:
    """Return the settings of a choice, `_target_` included; those without a default are `???`.

    Raises:
        UserError: if there is no such choice, it is in two places, or it cannot be read or loaded.
    """
    place = find(group, name)
    if isinstance(place, Path):
        return dict(_read(group, place))
    found = load_object(group, name, place, choices(group))
    target = target_of(place)
    if not isinstance(found, type):
        raise UserError(f"{group} {name!r}: {target} is no class.")
    return {_TARGET: target} | defaults(found)


def load_object(group: str, name: str, place: EntryPoint | str, known: Iterable[str]) -> Any:
    """Import what an entry point or a dotted name names.

    Raises:
        UserError: if it cannot be loaded, saying where it was announced or, of a name that was typed,
            what is `known`.
    """
    try:
        return _locate(target_of(place))
    except UserError as error:
        typed = isinstance(place, str)
        hint = f"Choices by name: {', '.join(sorted(known))}." if typed else where(place)
        raise UserError(f"{group} {name!r}: {error} {hint}") from error


def method_settings(name: str) -> dict[str, Any]:
    """Return the settings of a method, `_target_` included; those without a default are `???`.

    Raises:
        UserError: if there is no such method, it is in two places, or it cannot be read or loaded.
    """
    return settings_of("method", name)


def _read(group: str, path: Path) -> Mapping[str, Any]:
    """Read a file and those that its `defaults` name; later ones win, `_self_` last.

    Hydra composes the same from the same file; this is for callers that may be inside a Hydra app of
    their own, whose global state Hydra's compose would take.
    """
    own = dict(_load(path))
    merged: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        if base == "_self_":
            continue
        found = files(group, str(base))
        if not found:
            raise UserError(f"{path} starts from {base!r}, and no {group} is called that.")
        merged |= _read(group, found[0])
    return merged | {str(key): value for key, value in own.items()}


@functools.cache
def _load(path: Path) -> Mapping[Any, Any]:
    """Read one file, once a process."""
    try:
        own = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}.") from error
    if not isinstance(own, dict):
        raise UserError(f"{path} must list settings, a name and a value a line.")
    return own


def load_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Build the method `name` with some of its settings changed.

    Raises:
        UserError: if there is no such method or setting, or a value is not allowed.
    """
    from kvmerge.method import Method  # late, as it imports torch: metrics are found without

    resolved = method_settings(name)
    for key, value in (settings or {}).items():
        if key not in resolved or key == _TARGET:
            raise unknown(f"setting of {name}", key, set(resolved) - {_TARGET})
        resolved[key] = value
    method = build({key: value for key, value in resolved.items() if value != MISSING})
    if not (isinstance(method, Method) and is_dataclass(method)):
        raise UserError(
            f"{resolved[_TARGET]} is no method: a method is a frozen dataclass that derives from "
            "kvmerge.Method (docs/add_a_method.md)."
        )
    return method


def build(config: Any, section: str = "") -> Any:
    """Build the object that a configuration describes, and those inside it.

    Args:
        config: settings with a `_target_`, plain or composed by Hydra.
        section: how the command line calls it, e.g. `model`, for messages; empty: by its target.

    Raises:
        UserError: what the target raises, and for settings that it does not have or cannot use.
    """
    is_composed = OmegaConf.is_config(config)
    plain: Any = OmegaConf.to_container(config, resolve=True) if is_composed else config
    if _TARGET not in plain:
        raise UserError(f"{section or 'the choice'} names no class: its file needs a {_TARGET}.")
    settings = {
        key: build(value, f"{section}.{key}" if section else key) if _describes(value) else value
        for key, value in plain.items()
        if key != _TARGET
    }
    target = _locate(plain[_TARGET])
    if not callable(target):
        raise UserError(f"{plain[_TARGET]} is no class.")
    return construct(target, settings, section)


def _describes(value: Any) -> bool:
    return isinstance(value, Mapping) and _TARGET in value


def _locate(name: str) -> Any:
    """Return what a dotted name names."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f"{name} cannot be loaded: {first_line(error)}.") from error
    except Exception as error:  # of the module itself, which runs as it is imported
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{name} cannot be loaded: {type(error).__name__}: {first_line(error)} "
            f"({last.filename}, line {last.lineno})."
        ) from error
