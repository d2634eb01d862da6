"""Which way this processor multiplies faster: measured once, and kept for the machine.

oneDNN's float32 product is twice as fast as torch's on some processors with AVX-512 and slower on
others (docs/performance.md), and nothing that a processor says of itself tells which. So both are
timed on the attention of one prompt, in turn, and the answer is kept in the cache folder under the
processor's name, the number of threads and torch's version. Results of the two are equal up to float32
rounding.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvmerge.errors import UserError, unknown
from kvmerge.files import cache_dir, write_atomically

logger = logging.getLogger(__name__)

WAYS = ("torch", "onednn")
VARIABLE = "KVMERGE_CPU_PRODUCTS"
"""Environment variable that names the way instead of a measurement."""
FILE = "cpu_products.json"
_ROUNDS = 4
_MARGIN = 0.95
"""Share of torch's time that oneDNN must stay below: where the two are level, torch it is."""


def fastest(run: Callable[[str], None]) -> str:
    """Return the way that is faster here, one of `WAYS`.

    Args:
        run: multiplies as the caller does, by the way that it is given; called only where nothing is
            kept for this machine yet.

    Raises:
        UserError: if the environment variable names something else.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return _kept_or_measured(torch.get_num_threads(), run)
    if given not in WAYS:
        raise unknown(VARIABLE, given, WAYS)
    return given


def chosen() -> str | None:
    """Return the way that `fastest` gives on this machine, None where it has not been measured yet."""
    with contextlib.suppress(UserError):
        given = os.environ.get(VARIABLE)
        return given or _read(cache_dir() / FILE).get(_machine(torch.get_num_threads()))
    return None


def processor() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _machine(threads: int) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {capability}, {threads} threads, torch {torch.__version__}"


@functools.cache
def _kept_or_measured(threads: int, run: Callable[[str], None]) -> str:
    path, machine = cache_dir() / FILE, _machine(threads)
    kept = _read(path).get(machine)
    if kept in WAYS:
        return kept
    seconds = _measure(run)
    way = "onednn" if seconds["onednn"] < _MARGIN * seconds["torch"] else "torch"
    logger.info(
        "large products by %s on this machine (torch %.1f ms, onednn %.1f ms; kept in %s)",
        way,
        1e3 * seconds["torch"],
        1e3 * seconds["onednn"],
        path,
    )
    # A folder that cannot be written costs the next process a measurement, nothing else.
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(_read(path) | {machine: way}, indent=1) + "\n")
    return way


def _measure(run: Callable[[str], None]) -> dict[str, float]:
    """Return the least seconds of each way, in turn, after a round that does not count."""
    seconds = dict.fromkeys(WAYS, float("inf"))
    for count in range(_ROUNDS + 1):
        for way in WAYS:
            started = time.perf_counter()
            run(way)
            if count:
                seconds[way] = min(seconds[way], time.perf_counter() - started)
    return seconds


def _read(path: Path) -> dict[str, str]:
    """Return what is kept; {} for a file that is not there or holds something else."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
