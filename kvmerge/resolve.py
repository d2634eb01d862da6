"""From a method's name to the method: the one dynamic import of the project.

A method is a class and a file `configs/method/<name>.yaml` that names it under `_target_` and lists
every setting with its value, or one that starts from another (`defaults: [kvmerger]`) and says what
differs. The folder is the list of methods; there is no registry beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from kvmerge.errors import UserError, unknown
from kvmerge.method import Method


def config_dir() -> Path:
    """Return the folder of the configuration groups, in a checkout and in an installed wheel alike."""
    return Path(str(files("configs")))


def choices(group: str) -> list[str]:
    """Return the choices of a configuration group: its files, but those named with a leading `_`."""
    names = (path.stem for path in (config_dir() / group).glob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def method_settings(name: str) -> dict[str, Any]:
    """Return the settings of a method as its YAML file gives them, `_target_` included.

    Raises:
        UserError: if there is no such method.
    """
    if name not in choices("method"):
        raise unknown("method", name, choices("method"))
    settings = OmegaConf.to_container(_composed(config_dir() / "method", name))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


@cache
def _composed(group: Path, name: str) -> DictConfig:
    """Read a file and those of its group that it lists under `defaults`, as Hydra composes them.

    A file's own settings hold over theirs. Hydra itself would do, if it kept no state that is global:
    a method may be named inside somebody else's Hydra application.
    """
    own = OmegaConf.load(group / f"{name}.yaml")
    assert isinstance(own, DictConfig)
    bases = own.pop("defaults", [])
    composed = OmegaConf.merge(*(_composed(group, base) for base in bases if base != "_self_"), own)
    assert isinstance(composed, DictConfig)
    return composed


def load_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Build the method `name` with some of its settings changed; its files are read once a process.

    Raises:
        UserError: if there is no such method or setting, or a value is not allowed.
    """
    resolved = method_settings(name)
    for key, value in (settings or {}).items():
        if key not in resolved or key == "_target_":
            raise unknown(f"setting of {name}", key, set(resolved) - {"_target_"})
        resolved[key] = value
    given = ", ".join(f"{key}={value!r}" for key, value in (settings or {}).items())
    method = build(resolved, f"{name} cannot take {given}" if given else name)
    assert isinstance(method, Method)
    return method


def build(config: Mapping[str, Any] | DictConfig, named: str | None = None) -> Any:
    """Instantiate what a configuration names under `_target_`, with its other keys as arguments.

    Args:
        config: a part of a composed configuration, or the same as plain data.
        named: how a message begins that says why it cannot be built; None: with the `_target_`.

    Raises:
        UserError: if the part refuses its settings, if one is of a type that it cannot use or that
            it does not know, or if there is no such part.
    """
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError | ImportError):
            raise UserError(f"{named or config.get('_target_')}: {cause}") from error
        raise
