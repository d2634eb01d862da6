"""How far a run is: one count of its samples, those of earlier runs in the folder among them."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

logger = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds between two lines of a task, where there is no terminal to draw a bar on."""


@dataclass(frozen=True)
class Step:
    """One more sample that is done with."""

    task: str
    tokens: int = 0
    """Tokens of its prompt, and those that its cells generated."""


class Progress:
    """Shows how many of a run's samples are done: a bar on a terminal, else a line now and then.

    What is left is foretold by the pace of this run alone.
    """

    def __init__(
        self,
        done: int,
        taken: int,
        workers: int = 1,
        scores: Callable[[], RenderableType] | None = None,
    ) -> None:
        """Begin, and say what is done already.

        Args:
            done: samples that are finished.
            taken: samples that the run takes in all, those among them.
            workers: how many answer.
            scores: returns what is shown above a bar: the scores so far.
        """
        self.done, self.taken, self.workers = done, taken, workers
        self._scores = scores
        self._begun = self._told = time.monotonic()
        self._first = done
        self._task = ""
        self._tokens = 0
        if done:
            logger.info("%d of %d samples are done already; %d are left", done, taken, taken - done)
        self._shown = contextlib.ExitStack()
        self._live: Live | None = None
        self._table: RenderableType = ""

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            live = Live(get_renderable=self._drawn, console=Console(stderr=True), refresh_per_second=1)
            before = sys.stderr
            self._live = self._shown.enter_context(live)
            _redirect_log(before)  # so that lines come above the bar, not into it
            self._shown.callback(_redirect_log, sys.stderr, before)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown.close()
        if self._live is None and kind is None:
            self._tell()

    def begin(self, task: str) -> None:
        """Say which task the next samples are of."""
        self._task = task
        if self._live is None:
            self._tell()

    def step(self, step: Step) -> None:
        """Count one more sample."""
        if step.task != self._task:
            self.begin(step.task)
        self.done += 1
        self._tokens += step.tokens
        if self._live is not None and self._scores is not None:
            self._table = self._scores()  # here: bars are drawn by another thread
        elif self._live is None and time.monotonic() - self._told >= EVERY:
            self._tell()

    @property
    def _left(self) -> float | None:
        """Seconds that are left; None where nothing tells."""
        if self.done == self._first or self.done >= self.taken:
            return None
        pace = (time.monotonic() - self._begun) / (self.done - self._first)
        return pace * (self.taken - self.done)

    def _tell(self) -> None:
        self._told = time.monotonic()
        ahead = "" if self._left is None else f", about {clock(self._left)} left"
        logger.info(
            "%s: %d of %d samples, %s elapsed%s",
            self._task,
            self.done,
            self.taken,
            clock(self._told - self._begun),
            ahead,
        )

    def _drawn(self) -> RenderableType:
        """Return what a terminal shows: the scores so far, and the bar."""
        passed = time.monotonic() - self._begun
        parts = [
            f"{self.done} of {self.taken} samples",
            f"{self.workers} worker{'s' if self.workers > 1 else ''}",
            f"{self._tokens / max(passed, 1e-9):.0f} tokens/s",
            f"{clock(passed)} elapsed",
            *([] if self._left is None else [f"about {clock(self._left)} left"]),
        ]
        line = Table.grid(padding=(0, 1))
        line.add_row(self._task, ProgressBar(self.taken, self.done, width=20), ", ".join(parts))
        return Group(self._table, line) if self._table else line


def _redirect_log(before: object, now: object = None) -> None:
    """Let the log's handlers that write to one stream write to another; None: to what stderr is now."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(now or sys.stderr)


def clock(seconds: float) -> str:
    """Return seconds as `m:ss`, or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
