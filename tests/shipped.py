"""What the project ships, told apart from what somebody put beside it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def shipped_models() -> list[str]:
    """The models whose files are committed; those that are there, where this is no checkout."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "configs/model"], capture_output=True, text=True
    )
    found = listed.stdout.split() if listed.returncode == 0 else []
    paths = [Path(name) for name in found] or sorted((ROOT / "configs" / "model").glob("*.yaml"))
    return sorted(path.stem for path in paths if not path.stem.startswith("_"))
