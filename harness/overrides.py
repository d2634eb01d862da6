"""The words of a command line, before and while Hydra composes them.

Paths are taken as the shell hands them over, what cannot be meant is refused with what can, and what
Hydra and OmegaConf raise becomes a sentence.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from harness.given import Given
from kvmerge.errors import UserError, causes, first_line, unknown
from kvmerge.places import OF_CLASSES, find, is_dotted
from kvmerge.resolve import settings_of

GROUPS = ("model", "method", "benchmark", "executor", "experiment")
_SECTIONS = {"selfcheck": "selfcheck", "observe": "observations", "vary": "noise"}
"""Options that one kind of run has, and the experiment that sets it."""
MULTIRUN = frozenset({"-m", "--multirun"})
PATHS = (
    "output_dir",
    "noise",
    "model.path",
    "method.thresholds",
    "benchmark.data_dir",
    "benchmark.dataset",
    "benchmark.template",
    "benchmark.source",
)
"""Settings that hold a path, or a name that looks like one."""
_OF_HYDRA = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper", "hydra.verbose")
"""What of Hydra's own settings is the user's: how a sweep runs, and what Hydra logs."""
_PATH = re.compile(rf"(\+{{0,2}}(?:{'|'.join(map(re.escape, PATHS))})=)(.*)", re.DOTALL)
_TARGET = re.compile(rf"({'|'.join(OF_CLASSES)})\._target_=(.*)", re.DOTALL)
_QUOTED = re.compile(r"(['\"])(?:(?!\1)[^\\]|\\.)*\1", re.DOTALL)
_SWEEP = re.compile(r"(choice|glob|range|shuffle|sort|interval|tag)\(")
_UNENCODED = re.compile("[\ud800-\udfff]")
"""What Python makes of a byte on the command line that is no UTF-8."""


def read_overrides(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with its paths quoted as Hydra needs it.

    Raises:
        UserError: for a choice or a setting that does not exist, with the nearest that does, and for
            what may not be set at all.
    """
    is_sweep = bool(MULTIRUN & set(words))
    words = _choosing_classes(words)
    return [_read(word, is_sweep) if _is_override(word) else word for word in words]


def _choosing_classes(words: Sequence[str]) -> list[str]:
    """Write `method._target_=a_package.AClass` as the choice that it is, `method=a_package.AClass`.

    Raises:
        UserError: for what names no class, and beside another choice of the group.
    """
    written = list(words)
    for number, word in enumerate(words):
        target = _TARGET.fullmatch(word)
        if target is None:
            continue
        group, names = target.groups()
        if not all(map(is_dotted, names.split(","))):
            raise UserError(f"{word} must name a class with its module, e.g. my_package.MyClass.")
        if clash := [other for other in words if other.startswith(f"{group}=")]:
            raise UserError(f"{clash[0]} and {word} both say which {group}. Leave one of them out.")
        written[number] = f"{group}={names}"
    return written


def _is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def _read(word: str, is_sweep: bool) -> str:
    if _UNENCODED.search(word):
        raise UserError(f"{word!a} holds bytes that are no UTF-8, which results cannot name.")
    _check_cells(word)
    path = _PATH.fullmatch(word)
    read = path[1] + _quote(path[2], is_sweep) if path else word
    try:
        override = OverridesParser.create().parse_override(read)
    except (HydraException, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {_short(word)}: {first_line(error)}. A value with special characters needs "
            "quotes inside the shell's: \"key='value'\"."
        ) from error
    _check(word, override)
    return read


def _check_cells(word: str) -> None:
    """Refuse what Hydra's grammar refuses without saying how to write it: a cell's options unquoted."""
    key, _, value = word.partition("=")
    if key == "cells" and "=" in value and not set("'\"") & set(value):
        raise UserError(
            f"{word}: a cell with options needs quotes, as in "
            "\"cells=[full@1,'kvmerger:sigma=3@0.35']\"."
        )


def _quote(path: str, is_sweep: bool) -> str:
    """Quote a path for Hydra, whatever it holds; a sweep lists several, divided by commas."""
    if not path or path.lower() == "null" or _QUOTED.fullmatch(path):
        return path
    if is_sweep and (_SWEEP.match(path) or set("'\"") & set(path)):
        return path
    return ",".join(map(_quoted, path.split(",") if is_sweep else [path]))


def _quoted(path: str) -> str:
    # To Hydra a backslash is special before a quote only.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), path)
    return f"'{escaped}'"


def _check(word: str, override: Override) -> None:
    key = override.key_or_group
    top, *inner = re.split(r"[./]", key)
    if override.is_delete():
        raise UserError(f"{word}: a setting cannot be taken away; give it a value, or null.")
    if top == "hydra":
        if not key.startswith(_OF_HYDRA):
            raise UserError(
                f"{word}: this setting of Hydra is fixed here. Where results go is output_dir; "
                f"of Hydra's own there are {', '.join(_OF_HYDRA)}."
            )
        if "/" in key and not isinstance(override.value(), str):
            raise UserError(f"{word}: {key} takes a name, e.g. hydra/launcher=joblib.")
        return
    known = {each.name for each in fields(Given)} | set(GROUPS)
    if top not in known:
        raise unknown("setting", top, known)
    if any(part.startswith("_") for part in inner):
        raise UserError(f"{word}: {key} is not a setting.")
    if key in GROUPS:
        _check_choices(key, word.partition("=")[2])
    elif key in PATHS:
        _check_home(key, override)


def _check_choices(group: str, given: str) -> None:
    for name in given.split(","):
        plain = name.strip("'\"")
        if not isinstance(find(group, plain), Path):
            settings_of(group, plain)  # loads the class


def _check_home(key: str, override: Override) -> None:
    """Refuse `~name` where there is no such user."""
    path = str(override.value())
    try:
        Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={path}: {first_line(error)} ./{path} means a name with ~.") from error


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise inside the block into a sentence.

    Raises:
        UserError: naming the argument, or the setting, that cannot be used.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _sentence(error) from error
    except yaml.YAMLError as error:
        raise UserError(
            f"cannot read a file of configurations: {' '.join(str(error).split())}."
        ) from error
    except RecursionError as error:
        raise UserError("a setting refers to itself, or its value is nested too deeply.") from error


def _sentence(error: Exception) -> UserError:
    first = causes(error)[-1]
    node = getattr(first, "parent_node", None)
    if isinstance(first, ConfigKeyError | ConfigAttributeError) and isinstance(node, DictConfig):
        section = node._get_full_key(None)
        known = [str(key) for key in node if not str(key).startswith("_")]
        if section in _SECTIONS and not known:
            return UserError(
                f"{section}.{first.key} belongs to another kind of run. Give "
                f"experiment={_SECTIONS[section]} as well."
            )
        return unknown(f"setting of {section}" if section else "setting", str(first.key), known)
    key = getattr(first, "full_key", None)
    parts = [f"{key} cannot be used"] if key else []
    parts += dict.fromkeys(_short(first_line(each)).rstrip(".") for each in (error, first))
    return UserError(f"{': '.join(parts)}.")


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."
