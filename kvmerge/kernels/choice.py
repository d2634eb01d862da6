"""Which way this processor multiplies faster: measured once, and kept for the machine.

oneDNN's float32 product is twice as fast as torch's on some processors with AVX-512 and slower on
others (docs/performance.md), and nothing that a processor says of itself tells which. So both are
timed on the attention of one prompt, in turn, and the answer is kept in the cache folder under the
processor's name, the number of threads and torch's version. It is measured on heads of 64 dimensions
and holds for all. Results of the two are equal up to float32 rounding.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from kvmerge.errors import unknown
from kvmerge.files import cache_dir, read_object, write_atomically

logger = logging.getLogger(__name__)

WAYS = ("torch", "onednn")
VARIABLE = "KVMERGE_CPU_PRODUCTS"
"""Environment variable that names the way instead of a measurement."""
FILE = "cpu_products.json"
_ROUNDS = 6
_MARGIN = 0.9
"""Share of torch's time that oneDNN must stay below: where the two are level, torch it is."""

_taken: dict[str, str] = {}
"""The answer of this process by machine: one run takes one way, whatever happens to the file."""


_named: ContextVar[str | None] = ContextVar("named", default=None)


@contextlib.contextmanager
def products_by(way: str | None) -> Iterator[None]:
    """Name the way inside the block, before environment and measurement; None leaves it to them."""
    token = _named.set(way)
    try:
        yield
    finally:
        _named.reset(token)


def fastest(run: Callable[[str], None]) -> str:
    """Return the way that is faster here, one of `WAYS`.

    Args:
        run: multiplies as the caller does, by the way that it is given; called only where nothing is
            kept for this machine yet.

    Raises:
        UserError: if the environment variable names something else.
    """
    given = _named.get() or os.environ.get(VARIABLE)
    if given:
        if given not in WAYS:
            raise unknown(VARIABLE, given, WAYS)
        return given
    here = machine()
    if here not in _taken:
        _taken[here] = _kept(here) or _measured(here, run)
    return _taken[here]


def chosen() -> str | None:
    """Return the way that `fastest` gives on this machine, None where it has not been measured yet."""
    here = machine()
    return _named.get() or os.environ.get(VARIABLE) or _taken.get(here) or _kept(here)


@functools.cache
def processor() -> str:
    """Return the processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def machine() -> str:
    """Return what a measurement holds for: processor, instructions, threads and torch's version."""
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{processor()}, {capability}, {threads} threads, torch {torch.__version__}"


def _kept(machine: str) -> str | None:
    way = read_object(cache_dir() / FILE).get(machine)
    return way if way in WAYS else None


def _measured(machine: str, run: Callable[[str], None]) -> str:
    """Return the faster way and keep it, or what another process has kept in the meantime."""
    seconds = _least_seconds(run)
    way = "onednn" if seconds["onednn"] < _MARGIN * seconds["torch"] else "torch"
    way = _kept(machine) or way
    path = cache_dir() / FILE
    # A folder that cannot be written costs the next process a measurement, nothing else.
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(read_object(path) | {machine: way}, indent=1) + "\n")
    logger.info(
        "large products by %s on this machine (torch %.1f ms, onednn %.1f ms; kept in %s)",
        way,
        1e3 * seconds["torch"],
        1e3 * seconds["onednn"],
        path,
    )
    return way


def _least_seconds(run: Callable[[str], None]) -> dict[str, float]:
    """Return the least seconds of each way, in turn, after a round that does not count.

    The least, because other work on the machine can only add to a reading.
    """
    seconds = dict.fromkeys(WAYS, float("inf"))
    for attempt in range(_ROUNDS + 1):
        for way in WAYS:
            started = time.perf_counter()
            run(way)
            if attempt:
                seconds[way] = min(seconds[way], time.perf_counter() - started)
    return seconds
