"""Where the project keeps what it need not make twice, and how a file is replaced whole."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from pathlib import Path
from typing import IO

import psutil

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\..+\.(\d+)")
"""Name of a file that is being written: the file's own and the number of the process."""


def cache_dir() -> Path:
    """Return where converted models and measurements are kept; `KVMERGE_CACHE` moves it."""
    base = os.environ.get("KVMERGE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvmerge"


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
