"""Where a command begins: what must be settled before torch is imported, which takes seconds.

OpenMP reads its environment once, when torch loads it. How threads wait at a barrier is left to it:
waiting passively helps beside another busy process and costs a fifth on an idle machine
(docs/reliability.md has the figures).
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def main() -> None:
    """Run the command line: entry point of `run.py` and of the `kvmerge` command."""
    settle_threads()
    try:
        from harness import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


def settle_threads() -> None:
    """Ask for a thread for each processor that this process may use, unless the user says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_processors()))


def usable_processors(quota: Path = _QUOTA) -> int:
    """Return how many processors the affinity and the control group leave to this process."""
    usable = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        allowed, period = quota.read_text(encoding="ascii").split()
        usable = min(usable, max(1, int(allowed) // int(period)))  # ValueError for `max`
    return usable
