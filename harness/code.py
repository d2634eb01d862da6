"""Which source code a part of a run is made of: the modules that it imports, each with its digest.

Results of a cell are its own: they depend on the code that every cell passes through and on that of its
method, and on no other method's. What a module is made of is followed by its `import` statements, so
that nobody keeps a list.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OURS = ("kvmerge", "baselines", "benchmarks")
"""Packages whose code decides what a prediction is."""
DATA = (".txt", ".json")
"""Endings of files beside code that it reads: prompts, digests."""


def digests(roots: Iterable[str], without: Iterable[str] = ()) -> dict[str, str]:
    """Return a digest of every module that some modules are made of, themselves included, by its name.

    Imports are followed within `OURS`, within the packages of the roots themselves, and to what lies
    beside these where they are not installed: a user's own modules. They are not followed into the
    harness, which records and reports. The files of `DATA` in a package below `OURS`, or in any other,
    count too, as one.

    Args:
        roots: names of modules.
        without: names of what is left out, as it is compared elsewhere.
    """
    roots = list(roots)
    packages = {name.partition(".")[0] for name in roots} - {"harness"}
    beside = {folder for name in packages.difference(OURS) if (folder := _own_folder(name))}

    def is_followed(name: str) -> bool:
        package = name.partition(".")[0]
        if package == "harness" or package in packages.union(OURS):
            return package != "harness"
        return bool(beside) and _own_folder(package) in beside

    found: dict[str, str] = {}
    waiting = [part for name in roots for part in _with_parents(name)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _path(name)
        found[name] = "unknown" if path is None else digest(path)
        if path is None:
            continue
        if path.name == "__init__.py" and name not in (*OURS, "harness"):
            found |= _data(name, path.parent)
        waiting += [
            part
            for imported in _imports(name, path)
            if is_followed(imported)
            for part in _with_parents(imported)
        ]
    left_out = set(without)
    return {name: found[name] for name in sorted(found) if name not in left_out}


def homes(part: object) -> set[str]:
    """Return the modules that define an object and, where it is a dataclass, the objects in it."""
    found = {type(part).__module__}
    if is_dataclass(part):
        for each in fields(part):
            value: Any = getattr(part, each.name)
            if is_dataclass(value) and not isinstance(value, type):
                found |= homes(value)
    return found


def _with_parents(name: str) -> list[str]:
    """Return a module and the packages that importing it runs."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


@functools.cache
def _own_folder(package: str) -> Path | None:
    """Return the folder that a package or module of the user's own lies in; None for one installed."""
    spec = _spec(package)
    places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
    path = Path(places[0] or "") if places else Path()
    is_own = path.is_absolute() and not {"site-packages", "dist-packages"} & set(path.parts)
    return path.parent if is_own else None


@functools.cache
def _path(name: str) -> Path | None:
    """Return the file of a module; None where there is none, as of one that was typed in."""
    spec = _spec(name)
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def digest(path: Path) -> str:
    """Return a short digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@functools.cache
def _data(name: str, folder: Path) -> dict[str, str]:
    """Return one digest of the data files of a package, by a name of its own; {} if it has none."""
    content = hashlib.sha256()
    paths = sorted(path for path in folder.rglob("*") if path.suffix in DATA)
    for path in paths:
        content.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {f"{name} data": content.hexdigest()[:12]} if paths else {}


@functools.cache
def _imports(name: str, path: Path) -> tuple[str, ...]:
    """Return the modules that a module imports, in functions too; not what is for types alone."""
    if path.suffix != ".py":
        return ()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return tuple(_named(_statements(ast.parse(path.read_bytes())), package))


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    children = node.orelse if isinstance(node, ast.If) and for_types else ast.iter_child_nodes(node)
    for child in children:
        yield from _statements(child)


def _named(statements: Iterable[ast.Import | ast.ImportFrom], package: str) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        base = statement.module or ""
        if statement.level:
            above = package.split(".")[: len(package.split(".")) - statement.level + 1]
            base = ".".join([*above, *filter(None, [base])])
        yield base
        # `from package import module`: a name that is no module has no file
        yield from (inner for alias in statement.names if _path(inner := f"{base}.{alias.name}"))
