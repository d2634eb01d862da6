"""Where the project keeps what it need not make twice, and how a file is replaced whole."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return where converted models and measurements are kept; `KVMERGE_CACHE` moves it."""
    base = os.environ.get("KVMERGE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvmerge"


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
