"""Hands units to workers of Ray, and takes their outcomes back; a worker that is lost is replaced."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from harness.executors.actor import Loaded, Place, Reply
from harness.executors.time_limit import TimeLimit
from harness.executors.units import Outcome, Unit
from harness.settings import Settings
from kvmerge.errors import UserError, is_of_storage, summary

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Units that a worker has: the one that it is at, and the next, so that it waits for nobody."""
_TICK = 0.5
"""Seconds between two looks at what no worker tells: signals, time-outs, nodes that are gone."""
_PATIENCE = 60.0
"""Seconds without any worker after which that is said, again and again."""


@dataclass
class Errand:
    """A unit, and how the workers ended that were lost with it."""

    unit: Unit
    losses: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        first, *others = (repr(job.sample.id) for job in self.unit.jobs)
        samples = f"samples {first} to {others[-1]}" if others else f"sample {first}"
        return f"task {self.unit.task.name}, {samples}"


class Member:
    """A worker, and what it was handed."""

    def __init__(self, actor: Any, settings: Any) -> None:
        """Let an actor load the model; its settings may be a reference to them."""
        self.actor = actor
        self.loading: Future[Reply[Loaded]] = actor.load.remote(settings).future()
        self.place: Place | None = None
        """Where it is; None until the model is loaded."""
        self.errands: dict[Future[Reply[Sequence[Outcome]]], Errand] = {}
        """By its reply that is to come: the first is at work, the next waits beside it."""
        self.begun = 0.0
        """When the first was begun."""

    def take(self, errand: Errand) -> None:
        """Take one more errand."""
        if not self.errands:
            self.begun = time.monotonic()
        self.errands[self.actor.answer.remote(errand.unit).future()] = errand

    def finish(self, reply: Future[Any]) -> tuple[Errand, float]:
        """Go on with the next errand; return the one that is done, and the seconds that it took."""
        begun, self.begun = self.begun, time.monotonic()
        return self.errands.pop(reply), self.begun - begun

    def put_off(self) -> None:
        """Forget the errand that is not begun."""
        self.errands = dict(list(self.errands.items())[:1])


class Pool:
    """Workers of one run: as many as were asked for, or as are left."""

    def __init__(
        self,
        settings: Settings,
        count: int,
        retries: int,
        limit: TimeLimit,
        *,
        hire: Callable[[], Any],
        has_room: Callable[[], bool],
    ) -> None:
        """Hire workers.

        Args:
            settings: the run.
            count: workers.
            retries: how often a unit is tried again.
            limit: for the time of a unit.
            hire: returns a new `harness.executors.actor.Actor`, which may have to wait for room.
            has_room: returns whether there is room for any worker at all.
        """
        self._settings = ray.put(settings)
        self._hire, self._has_room = hire, has_room
        self._retries, self._limit = retries, limit
        self._lost_loading = 0
        self._told = time.monotonic()
        self.count = count
        self.notes: Sequence[str] = ()
        self._members = [self._new() for _ in range(count)]

    def wait(self) -> None:
        """Wait until the first worker has loaded the model.

        Raises:
            UserError: if it cannot be loaded, workers are lost over it, or there is no room for any.
        """
        while not self._is_ready():
            for reply in self._replies():
                self._take(reply, deque())

    def answer(self, units: Sequence[Unit], is_stopping: Callable[[], bool]) -> Iterator[Outcome]:
        """Answer units, the longest of each task first (see `harness.executors.executor.Workers`).

        A unit counts as it comes back whole; what a lost worker had answered of one is answered again.

        Raises:
            UserError: what holds for the whole run, also that workers were lost with a unit too often,
                or that no room is left for any.
        """
        waiting = deque(map(Errand, longest_first(units)))
        while waiting or any(member.errands for member in self._members):
            if is_stopping():
                waiting.clear()
                for member in self._members:
                    member.put_off()
            self._hand_out(waiting)
            for reply in self._replies():
                yield from self._take(reply, waiting)
            for member, seconds in self._hung():
                self._lose(member, f"no answer within {seconds:.1f} s, by executor.timeout", waiting)

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for member in self._members:
            ray.kill(member.actor)

    def _new(self) -> Member:
        return Member(self._hire(), self._settings)

    def _is_ready(self) -> bool:
        return any(member.place for member in self._members)

    def _hand_out(self, waiting: deque[Errand]) -> None:
        ready = [member for member in self._members if member.place]
        for load in range(IN_FLIGHT):  # each has one before any has two
            for member in ready:
                if waiting and len(member.errands) == load:
                    member.take(waiting.popleft())

    def _replies(self) -> set[Future[Any]]:
        """Return the replies that are there, after a moment at most."""
        expected: list[Future[Any]] = [
            reply
            for member in self._members
            for reply in (member.errands if member.place else [member.loading])
        ]
        # not by `ray.wait`, which makes any exception of a signal's handler a KeyboardInterrupt
        there, _ = wait_for(expected, _TICK, FIRST_COMPLETED)
        if not there and not self._is_ready():
            self._check_room()
        return there

    def _take(self, reply: Future[Any], waiting: deque[Errand]) -> Sequence[Outcome]:
        """Return what a reply brings; where it brings none, its worker is lost."""
        of_reply = (each for each in self._members if reply in (each.loading, *each.errands))
        member = next(of_reply, None)
        if member is None:  # lost with an earlier one
            return ()
        try:
            value, warnings = reply.result()
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, UserError) or is_of_storage(cause) or not member.place:
                raise cause from error
            # an error of a CUDA device, which is over with the process
            self._lose(member, summary(cause), waiting)
            return ()
        except RayError as error:
            self._lose(member, _end(error), waiting)
            return ()
        is_loaded = member.place is not None
        if is_loaded:
            errand, seconds = member.finish(reply)
            self._limit.learn(errand.unit, seconds)
        else:
            member.place, self.notes = value
            self._lost_loading = 0
            logger.info("a worker is ready: %s", member.place)
        for warning in warnings:
            logger.warning("%s: %s", member.place, warning)
        return value if is_loaded else ()

    def _hung(self) -> list[tuple[Member, float]]:
        """Return the workers that are at a unit for longer than it may take, and how long that is."""
        limits = [
            (member, self._limit.of(next(iter(member.errands.values())).unit))
            for member in self._members
            if member.errands
        ]
        now = time.monotonic()
        return [(member, most) for member, most in limits if most and now - member.begun > most]

    def _lose(self, member: Member, cause: str, waiting: deque[Errand]) -> None:
        """Hire another worker instead of one that is gone or is to go, and queue what it had again.

        Raises:
            UserError: if it had a unit that had cost as many workers as may be, or if as many were lost
                while they loaded the model.
        """
        ray.kill(member.actor)
        errands = list(member.errands.values())
        if errands:
            errands[0].losses.append(cause)
        logger.warning(
            "a worker is lost (%s): %s%s",
            *(member.place or "loading the model", cause),
            f". {errands[0]}: to be answered by another" if errands else "",
        )
        if errands and len(errands[0].losses) > self._retries:
            raise UserError(
                f"{errands[0]}: {_counted(len(errands[0].losses))} lost while they answered it, "
                f"which is one more than executor.retries={self._retries}. The last: {cause}. What is "
                "finished is kept; the same command tries it again."
            )
        if member.place is None:
            self._lost_loading += 1
            if self._lost_loading > self._retries:
                raise UserError(
                    f"{_counted(self._lost_loading)} lost while they loaded the model, which is one "
                    f"more than executor.retries={self._retries}. The last: {cause}."
                )
        waiting.extendleft(reversed(errands))
        self._members.remove(member)
        self._members.append(self._new())

    def _check_room(self) -> None:
        """Refuse to wait for a worker where there can be none; say now and then what is waited for."""
        if not self._has_room():
            raise UserError(
                "no worker is left, and Ray has no room for another: its machines are gone, or lack "
                "what executor.gpus_per_worker and executor.cpus_per_worker ask for. What is finished "
                "is kept; the same command resumes."
            )
        if time.monotonic() - self._told > _PATIENCE:
            self._told = time.monotonic()
            logger.info("no worker is ready yet: Ray has no room for one now, or it loads the model")


def longest_first(units: Sequence[Unit]) -> Iterator[Unit]:
    """Yield units task by task, the longest of each first, so that none of them ends a run alone."""
    for _, of_task in groupby(units, key=lambda unit: unit.task):
        yield from sorted(of_task, key=lambda unit: unit.length, reverse=True)


def _counted(workers: int) -> str:
    return "1 worker was" if workers == 1 else f"{workers} workers were"


def _end(error: RayError) -> str:
    """Return how a worker ended, of all that Ray says of it."""
    last = str(error).strip().splitlines()[-1]
    return last.partition(" Some common causes")[0].rstrip(".")
