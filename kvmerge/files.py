"""Where the project keeps what it need not make twice, and how a file is replaced whole."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import IO, Any

import psutil

from kvmerge.errors import UserError

logger = logging.getLogger(__name__)

_LONGEST = 200
"""Bytes of a name: file systems allow 255, and what is added to names takes some."""

_LONGEST_ANYWHERE = 255
"""Bytes of a name that any file system takes at most."""

_PARTIAL = re.compile(r"\..+\.(\d+)")
"""Name of a file that is being written: the file's own and the number of the process."""


def cache_dir() -> Path:
    """Return where converted models and measurements are kept; `KVMERGE_CACHE` moves it."""
    own = os.environ.get("KVMERGE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvmerge"


def check_name(setting: str, name: str) -> None:
    """Refuse a name that no file or folder can have. Raises `UserError`."""
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode()) > _LONGEST:
        shown = name if len(name) <= _LONGEST else f"{name[:40]}... ({len(name)} characters)"
        raise UserError(
            f"{setting}={shown!r} must name a file: without /, and of at most {_LONGEST} bytes."
        )


def is_folder(path: Path) -> bool:
    """Return whether there is such a folder; no folder has a name that the file system cannot hold."""
    try:
        return path.is_dir()
    except OSError:
        return False


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; {} where it is not there or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_regular(path: Path) -> bytes:
    """Return what a file holds. Raises `OSError`, also for a pipe or device, which might never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path.read_bytes()


def try_to_write(folder: Path) -> None:
    """Raise the `OSError` that making a folder and a file in it would end with; leave nothing behind.

    The file has no name, or is gone at once, in the nearest folder that is there already.
    """
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            break
    if not place.is_dir():
        number = errno.EEXIST if place == folder else errno.ENOTDIR
        raise OSError(number, os.strerror(number), str(place))
    if any(len(os.fsencode(part)) > _LONGEST_ANYWHERE for part in folder.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(folder))
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"x")
        file.flush()


def hold(path: Path) -> IO[str]:
    """Return a lock file, open and held; waits for another process that holds it.

    The lock is the kernel's: it goes when the file is closed or the process ends, however it does.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that holds %s", path)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that no reader and no crash ever meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what `write_atomically` had begun in processes that were killed, and return it.

    Looks into a folder and those directly below it.
    """
    removed = []
    for path in (*folder.glob(".*"), *folder.glob("*/.*")):
        match = _PARTIAL.fullmatch(path.name)
        if match and path.is_file() and not psutil.pid_exists(int(match[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
