"""The executor of one process: this one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.executors.executor import Loaded
from harness.executors.units import Outcome, Unit
from harness.executors.worker import Worker
from harness.settings import Settings
from kvmerge.models import Outline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Local:
    """Answers unit after unit in this process."""

    @contextlib.contextmanager
    def start(self, settings: Settings, known: Outline | None, loaded: Loaded | None) -> Iterator[_One]:
        """Load the model, unless it is there (see `harness.executors.executor.Executor`)."""
        if loaded is None:
            logger.info("loading %s", settings.model.name)
        yield _One(Worker(settings, *loaded) if loaded else Worker.load(settings, known))


class _One:
    count = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.notes = worker.notes

    def answer(self, units: Sequence[Unit], is_stopping: Callable[[], bool]) -> Iterator[Outcome]:
        for unit in units:
            if is_stopping():
                return
            yield from self.worker.answer(unit)
