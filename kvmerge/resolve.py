"""From a method's name to the method: the one dynamic import of the project.

A method is a class and a file `configs/method/<name>.yaml` that names it under `_target_` and lists
every setting with its value. The folder is the list of methods; there is no registry beside it. A file
that differs from another in a few settings names that one under `defaults`, as Hydra has it.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kvmerge.errors import UserError, first_line, unknown
from kvmerge.method import Method
from kvmerge.schema import construct

_TARGET = "_target_"
_PACKAGE = Path(__file__).resolve().parent


@functools.cache
def config_dir() -> Path:
    """Return the folder of the configuration groups: inside an installed wheel, beside a checkout.

    Raises:
        UserError: if it is in neither place.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"{_PACKAGE} has no configs/ in or beside it: install kvmerge again.")


def choices(group: str) -> list[str]:
    """Return the names of a configuration group; files that begin with `_` serve the others."""
    names = (path.stem for path in (config_dir() / group).glob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def method_settings(name: str) -> dict[str, Any]:
    """Return the settings of a method as its YAML file gives them, `_target_` included.

    Raises:
        UserError: if there is no such method.
    """
    if name not in choices("method"):
        raise unknown("method", name, choices("method"))
    return dict(_read(config_dir() / "method" / f"{name}.yaml"))


@functools.cache
def _read(path: Path) -> Mapping[str, Any]:
    """Read a file and those that its `defaults` name, once a process; later ones win, `_self_` last.

    Hydra composes the same from the same file; this is for callers that may be inside a Hydra app of
    their own, whose global state Hydra's compose would take.
    """
    own = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(own, dict)
    merged: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        if base != "_self_":
            merged |= _read(path.with_name(f"{base}.yaml"))
    return merged | {str(key): value for key, value in own.items()}


def load_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Build the method `name` with some of its settings changed.

    Raises:
        UserError: if there is no such method or setting, or a value is not allowed.
    """
    resolved = method_settings(name)
    for key, value in (settings or {}).items():
        if key not in resolved or key == _TARGET:
            raise unknown(f"setting of {name}", key, set(resolved) - {_TARGET})
        resolved[key] = value
    method = build(resolved)
    assert isinstance(method, Method)
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
    settings = {
        key: build(value, f"{section}.{key}" if section else key) if _describes(value) else value
        for key, value in plain.items()
        if key != _TARGET
    }
    return construct(_locate(plain[_TARGET]), settings, section)


def _describes(value: Any) -> bool:
    return isinstance(value, Mapping) and _TARGET in value


def _locate(name: str) -> Any:
    """Return what a dotted name names; it must be something that can be called."""
    try:
        target = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded: {first_line(error)}.") from error
    if not callable(target):
        raise UserError(f"{name} is no class.")
    return target
