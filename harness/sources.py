"""What Hydra composes from beside the project's files: the user's, and classes without a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from kvmerge.errors import UserError
from kvmerge.places import OF_CLASSES, choices, find, own_folders
from kvmerge.resolve import settings_of

_PROVIDER = "kvmerge"
_FLAG = re.compile(r"(--config-dir|-cd)(?:=(.*))?", re.DOTALL)


def take_config_dirs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the folders of `--config-dir` out of a command line; return the other words and the folders.

    Hydra's own flag takes one folder and lets the project's files hide those in it, without a word.

    Raises:
        UserError: if a flag has no folder.
    """
    left: list[str] = []
    folders: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag = _FLAG.fullmatch(word)
        if flag is None:
            left.append(word)
            continue
        folder = next(waiting, "") if flag[2] is None else flag[2]
        if not folder:
            raise UserError(f"{flag[1]} names no folder, e.g. {flag[1]} my_choices.")
        folders.append(folder)
    return left, folders


class Classes(ConfigSource):
    """Choices without a file (`kvmerge.places`): the defaults of a class."""

    @staticmethod
    def scheme() -> str:
        """Return what stands before `://` in Hydra's search path."""
        return "class"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the settings of a choice. Raises `UserError` if its class cannot be loaded."""
        group, name = _split(config_path)
        config = OmegaConf.create(settings_of(group, name))
        return ConfigResult(self.provider, self.full_path(), config, {"package": None})

    def available(self) -> bool:
        """Return True: there is no place that could be missing."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Return whether a group has classes."""
        return config_path in OF_CLASSES

    def is_config(self, config_path: str) -> bool:
        """Return whether a class is chosen by this name; a file is found by another source."""
        group, name = _split(config_path)
        if group not in OF_CLASSES:
            return False
        try:
            return not isinstance(find(group, name), Path)
        except UserError:
            return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of a group's choices."""
        is_asked = results_filter in (None, ObjectType.CONFIG) and self.is_group(config_path)
        return choices(config_path) if is_asked else []


def _split(config_path: str) -> tuple[str, str]:
    group, _, name = config_path.removesuffix(".yaml").rpartition("/")
    return group, name


class _Places(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in own_folders():
            search_path.append(_PROVIDER, f"file://{folder}")
        search_path.append(_PROVIDER, "class://")


def register() -> None:
    """Let Hydra compose from these places, in this process."""
    for plugin in (Classes, _Places):
        Plugins.instance().register(plugin)
