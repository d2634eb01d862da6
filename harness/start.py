"""Where a command begins: what must be settled before torch is imported, which takes seconds.

OpenMP reads its environment once, when torch loads it. Threads that wait at a barrier spin by default,
and with another busy process on the machine they spin away the time that the others need
(docs/reliability.md has the figures); waiting passively costs nothing on an idle one.
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
    """Let threads wait passively, one for each processor that this process may use.

    What the user's environment already says is left as it is.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_processors()))


def usable_processors(quota: Path = _QUOTA) -> int:
    """Return how many processors the affinity and the control group leave to this process."""
    usable = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        allowed, period = quota.read_text(encoding="ascii").split()
        usable = min(usable, max(1, int(allowed) // int(period)))  # ValueError for `max`
    return usable
