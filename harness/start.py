"""Where a command begins: what must be settled before torch is imported, which takes seconds.

OpenMP reads its environment once, when torch loads it. By default its threads spin at a barrier for
longer than a scheduler's time slice: beside another busy process each waits for one that does not
run. Spinning for a short while and sleeping then costs nothing on an idle machine, where the others
come at once (docs/reliability.md has the figures).
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

SPINS = "10000"
"""Turns that a thread waits for the others before it sleeps; libgomp's own number is 300,000."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def main() -> None:
    """Run the command line: entry point of `run.py` and of the `kvmerge` command."""
    if "--version" in sys.argv[1:]:
        print(f"kvmerge {version('kvmerge')}")
        return
    settle_threads()
    see_working_directory()
    # at once, as the imports alone take seconds; to stderr, which is no part of what --cfg prints
    print("kvmerge: loading torch and transformers", file=sys.stderr, flush=True)
    try:
        from harness import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


def see_working_directory() -> None:
    """Let modules that lie in the working directory be imported, whichever way the command was started.

    Last, so that a file there hides nothing that is installed. What Python is told (`-P`) stays.
    """
    if not sys.flags.safe_path and str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))


def settle_threads(cores: int | None = None) -> None:
    """Ask for a thread for each processor that this process may use, and for short waits.

    To be called before torch is imported. What the user says otherwise, by OpenMP's own variables,
    stays, but where a worker is given cores: as many threads then.

    Args:
        cores: that a worker was given; None: all that the process may use.
    """
    if cores is not None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores))
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_processors()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def usable_processors(quota: Path = _QUOTA) -> int:
    """Return how many processors the affinity and the control group leave to this process."""
    usable = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        allowed, period = quota.read_text(encoding="ascii").split()
        usable = min(usable, max(1, int(allowed) // int(period)))  # ValueError for `max`
    return usable
