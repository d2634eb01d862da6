"""Work in a few threads, for what leaves the interpreter to others: numpy, scipy and Arrow do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from harness.start import usable_processors

R = TypeVar("R")

_MOST = 8
"""Threads: each holds what it works with, and beyond these they wait for the interpreter."""


def in_threads(work: Callable[..., R], *arguments: Iterable[Any]) -> list[R]:
    """Return what `map(work, *arguments)` yields, in as many threads as there is room for."""
    with ThreadPoolExecutor(min(_MOST, usable_processors())) as pool:
        return list(pool.map(work, *arguments))
