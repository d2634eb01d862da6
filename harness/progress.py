"""How far a run is: one count of its samples, those of earlier runs in the folder among them."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds between two lines of a task, where there is no terminal to draw a bar on."""


class Progress:
    """Shows how many of a run's samples are done: a bar on a terminal, else a line now and then.

    What is left is foretold by the pace of this run alone.
    """

    def __init__(self, done: int, taken: int) -> None:
        """Begin, and say what is done already.

        Args:
            done: samples that are finished.
            taken: samples that the run takes in all, those among them.
        """
        self.done, self.taken = done, taken
        self._begun = self._told = time.monotonic()
        self._first = done
        self._task = ""
        if done:
            logger.info("%d of %d samples are done already; %d are left", done, taken, taken - done)
        shown = sys.stderr.isatty()
        self._bar = tqdm(total=taken, initial=done, unit="sample", smoothing=0.05) if shown else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._tell()

    def begin(self, task: str) -> None:
        """Say which task the next samples are of."""
        self._task = task
        if self._bar is not None:
            self._bar.set_description_str(task)
        else:
            self._tell()

    def step(self, task: str) -> None:
        """Count one more sample of a task."""
        if task != self._task:
            self.begin(task)
        self.done += 1
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._told >= EVERY:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        passed = self._told - self._begun
        pace = passed / (self.done - self._first) if self.done > self._first else None
        left = self.taken - self.done
        ahead = f", about {_clock(pace * left)} left" if pace is not None and left else ""
        logger.info(
            "%s: %d of %d samples, %s elapsed%s",
            self._task,
            self.done,
            self.taken,
            _clock(passed),
            ahead,
        )


def _clock(seconds: float) -> str:
    """Return seconds as `m:ss`, or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
