"""A run that dies by SIGKILL at a line of its own code, counted, so that any line can be chosen.

    python -m tests.killing SETTINGS LAST COUNTED

carries out pickled settings in a process of its own: SETTINGS and COUNTED are files, LAST a number or
`none`.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from harness.runner import run
from harness.settings import Settings

POINTS = int(os.environ.get("KVMERGE_KILLS", "3"))
"""Points that a test tries: 30 take minutes."""
WATCHED = (
    *("/harness/runner.py", "/harness/results.py", "/harness/records.py", "/harness/ordering.py"),
    *("/harness/failures.py", "/harness/prompts.py", "/kvmerge/files.py"),
    *("/harness/executors/pool.py", "/harness/executors/on_ray.py"),
)
"""Modules that decide what lies on the disk: between any two of their lines a run may be killed."""


def run_until(settings: Settings, last: int | None, counted: Path) -> None:
    """Carry out a run, and kill this process at the line of this number.

    Lines are counted from 0, and their number is written to a file at the end.
    """
    lines = 0

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line":
            if lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
            lines += 1
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.endswith(WATCHED) else None

    sys.settrace(on_call)
    run(settings)
    sys.settrace(None)
    counted.write_text(str(lines))


if __name__ == "__main__":
    given, place, path = sys.argv[1:]
    run_until(
        pickle.loads(Path(given).read_bytes()), None if place == "none" else int(place), Path(path)
    )
