"""Where the choices of a configuration group are found.

A choice is a file `<group>/<name>.yaml`, in the project's own folder or in one that the user names; an
entry point of an installed package; or a class by its dotted name, which needs neither. What is in two
places is refused: results name a choice by its name alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeAlias

from kvmerge.errors import UserError, unknown

FOLDERS = "KVMERGE_CONFIG_DIR"
"""Environment variable: folders of the user's own choices, divided as those of PATH are. The processes
of a sweep inherit it."""
ENTRY_POINTS = {
    "method": "kvmerge.methods",
    "benchmark": "kvmerge.benchmarks",
    "metric": "kvmerge.metrics",
}
"""By group: under which name installed packages announce their classes, or metrics."""
OF_CLASSES = ("method", "benchmark", "model")
"""Groups whose choices are classes, so that a class may be named itself."""
_PACKAGE = Path(__file__).resolve().parent

Place: TypeAlias = Path | EntryPoint | str
"""A file, an entry point, or a class by its dotted name."""


@functools.cache
def config_dir() -> Path:
    """Return the folder of the project's own groups: inside an installed wheel, beside a checkout.

    Raises:
        UserError: if it is in neither place.
    """
    for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"{_PACKAGE} has no configs/ in or beside it: install kvmerge again.")


@contextlib.contextmanager
def config_dirs(added: Sequence[str]) -> Iterator[None]:
    """Look for choices in these folders too inside the block, in this process and those that it starts.

    Raises:
        UserError: for what is no folder, or holds no group.
    """
    before = os.environ.get(FOLDERS)
    named = [before, *map(_absolute, added)] if before else [*map(_absolute, added)]
    os.environ[FOLDERS] = os.pathsep.join(dict.fromkeys(named))
    try:
        own_folders()
        yield
    finally:
        if before is None:
            del os.environ[FOLDERS]
        else:
            os.environ[FOLDERS] = before


def _absolute(given: str) -> str:
    if os.pathsep in given:
        raise UserError(f"--config-dir={given} holds {os.pathsep!r}: give each folder by itself.")
    try:
        return str(Path(given).expanduser().absolute())
    except RuntimeError as error:
        raise UserError(f"--config-dir={given}: {error} ./{given} means a name with ~.") from error


def own_folders() -> list[Path]:
    """Return the folders that the user names, absolute.

    Raises:
        UserError: for what is no folder, holds no group, or holds a file that another folder has too.
    """
    named = filter(None, os.environ.get(FOLDERS, "").split(os.pathsep))
    folders = [Path(_absolute(name)) for name in named]
    for number, folder in enumerate(folders):
        files = _files(folder)
        for other in (config_dir(), *folders[:number]):
            for file in files:
                if (other / file).exists():
                    raise in_two_places(str(file), str(other / file), str(folder / file))
    return folders


def _files(folder: Path) -> list[Path]:
    """Return what a folder holds that can be chosen or started from, relative to it."""
    groups = sorted(path.name for path in config_dir().iterdir() if any(path.glob("*.yaml")))
    if not folder.is_dir():
        raise UserError(f"{folder}, given by --config-dir or {FOLDERS}, is not a folder.")
    found = [path for group in [*groups, "hydra/*"] for path in folder.glob(f"{group}/*.yaml")]
    if not found:
        raise UserError(
            f"{folder}, given by --config-dir or {FOLDERS}, holds no choices: these are files "
            f"<name>.yaml in folders {', '.join(f'{group}/' for group in groups)} below it."
        )
    return [path.relative_to(folder) for path in [*found, *folder.glob("*.yaml")]]


def choices(group: str) -> list[str]:
    """Return the names of a group's choices; files that begin with `_` serve the others."""
    folders = (config_dir(), *own_folders())
    names = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    return sorted({name for name in names if not name.startswith("_")} | set(_announced(group)))


def find(group: str, name: str) -> Place:
    """Return where a choice is found; a class that is named itself is not imported yet.

    Raises:
        UserError: if it is nowhere, or in two places.
    """
    found: list[Place] = [*files(group, name), *_announced(group).get(name, ())]
    if len(found) > 1:
        raise in_two_places(f"{group} {name}", *map(where, found[:2]))
    if found and not name.startswith("_"):
        return found[0]
    if group in (*OF_CLASSES, "metric") and is_dotted(name):
        return name
    raise unknown(group, name, choices(group))


def files(group: str, name: str) -> list[Path]:
    """Return the files of a name in a group, those that serve others included."""
    folders = (config_dir(), *own_folders())
    paths = (path for folder in folders for path in (folder / group).glob("*.yaml"))
    return [path for path in paths if path.stem == name]


def is_dotted(name: str) -> bool:
    """Return whether a name can be that of a class in a module."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def where(place: Place) -> str:
    """Say where a choice is found."""
    if not isinstance(place, EntryPoint):
        return str(place)
    package = place.dist.name if place.dist else "an installed package"
    return f"{place.value} (entry point {place.name} of {package})"


def target_of(place: EntryPoint | str) -> str:
    """Return the dotted name of what an entry point announces, or of a class itself."""
    return place if isinstance(place, str) else place.value.replace(":", ".")


def in_two_places(what: str, *places: str) -> UserError:
    """Build the error for a name that says nothing, as it stands in two places."""
    return UserError(f"{what} is in two places: {' and '.join(places)}. Rename one of them.")


def _announced(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Return the entry points of a group by name, none of them imported."""
    return _entry_points(ENTRY_POINTS.get(group, ""), tuple(sys.path))


@functools.cache
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """Read what is installed; once for each `sys.path`, as it takes tens of milliseconds."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    listed = entry_points(group=group) if group else ()
    for each in sorted(listed, key=lambda each: each.value):
        if each not in found.get(each.name, ()):
            found[each.name] = (*found.get(each.name, ()), each)
    return found
