"""Signals that end a run: the first lets it finish what it is at, the second ends it at once."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[int, Any], Any] | signal.Handlers
_OF_SCHEDULERS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal that ends the run, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stop:
    """Whether the run is to end, and by which signal."""

    number: int | None = None

    def is_asked(self) -> bool:
        """Return whether a signal came."""
        return self.number is not None

    def take(self, number: int, frame: object) -> None:
        """Handle a signal: note the first; raise `Stopped` for any other."""
        if self.is_asked():
            raise Stopped(number)
        self.number = number
        logger.warning(
            "%s: finishing the samples at hand; once more ends it at once", signal.Signals(number).name
        )


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Take the signals of schedulers as Ctrl-C inside the block: they raise `Stopped`."""
    with _handled(_OF_SCHEDULERS, _stop, instead_of=[signal.SIG_DFL]):
        yield


@contextlib.contextmanager
def finishing() -> Iterator[Stop]:
    """Hold back the first signal inside the block, which looks for it between two pieces of work.

    Raises:
        Stopped: at the end of the block, if a signal came; at once, if another did.
    """
    stop = Stop()
    ends = (signal.SIGINT, *_OF_SCHEDULERS)
    with _handled(ends, stop.take, instead_of=[signal.default_int_handler, _stop]):
        yield stop
    if stop.number is not None:
        raise Stopped(stop.number)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def _handled(
    numbers: Sequence[signal.Signals], handler: Handler, instead_of: Sequence[Handler]
) -> Iterator[None]:
    """Let signals be handled inside the block, but those that somebody else handles or ignores.

    So `nohup` goes on meaning what it says, and so does a launcher that has its jobs queued again.
    """
    if threading.current_thread() is not threading.main_thread():  # where alone it can be done
        numbers = ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {number: was for number, was in handlers.items() if was in instead_of}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
