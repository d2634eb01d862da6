"""A worker as Ray runs it: in a process of its own, on this machine or on another.

Nothing here imports torch at once, so that threads are settled first.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from harness.start import settle_threads

if TYPE_CHECKING:
    from harness.executors.units import Outcome, Unit
    from harness.executors.worker import Worker
    from harness.settings import Settings

T = TypeVar("T")


class Place(NamedTuple):
    """Where a worker is."""

    host: str
    process: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.process}"


class Loaded(NamedTuple):
    """What a worker says of itself when it has loaded the model."""

    place: Place
    notes: Sequence[str]


class Reply(NamedTuple, Generic[T]):
    """What a worker sends back, and the warnings that it would have shown in a terminal."""

    value: T
    warnings: Sequence[str]


class Actor:
    """Holds a worker, and answers one unit after the other."""

    def __init__(self, cores: int) -> None:
        """Take so many threads; what brings torch with it comes with later calls."""
        settle_threads(cores)
        self._cores = cores
        self._worker: Worker | None = None
        self._warnings = _Warnings()
        logging.getLogger().addHandler(self._warnings)

    def load(self, settings: Settings) -> Reply[Loaded]:
        """Load the model of a run. Raises `UserError` as `Worker.load` does."""
        from harness.executors.worker import Worker

        self._worker = Worker.load(settings, cores=self._cores)
        return self._reply(Loaded(Place(socket.gethostname(), os.getpid()), self._worker.notes))

    def answer(self, unit: Unit) -> Reply[Sequence[Outcome]]:
        """Answer a unit, once the model is loaded. Raises `UserError` as `Worker.answer` does."""
        assert self._worker is not None
        return self._reply(list(self._worker.answer(unit)))

    def _reply(self, value: T) -> Reply[T]:
        return Reply(value, self._warnings.taken())


class _Warnings(logging.Handler):
    """Gathers what the project and its libraries warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(record.getMessage())

    def taken(self) -> list[str]:
        """Return what was gathered since the last call."""
        told, self._told = self._told, []
        return told
