"""How long a worker may be at a unit before it is taken to hang."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from harness.executors.units import Unit

Timeout: TypeAlias = float | Literal["auto"] | None
"""Seconds for every unit; `auto`: by what the run's other units took; None: as long as it takes."""

_TIMES = 20
"""Of the slowest pace so far: for a machine that others use too, and for answers of any length."""
_LEAST = 600.0
"""Seconds that any unit may take."""
_CHARACTERS = 4
"""Of a token, about."""


@dataclass
class TimeLimit:
    """A time limit for units, learnt from those that came back where none is given.

    A run's own units tell more than an estimate does: they were answered by these workers, on their
    machines, whose speed the machine that hands them out need not know. Until one is back there is no
    limit, as nothing tells a worker that hangs from one that is slow.
    """

    timeout: Timeout
    _pace: float | None = field(default=None, init=False)
    """Seconds for each piece of `work`, of the slowest unit so far."""

    def learn(self, unit: Unit, seconds: float) -> None:
        """Take note of what a unit took."""
        self._pace = max(self._pace or 0.0, seconds / work(unit))

    def of(self, unit: Unit) -> float | None:
        """Return the seconds that a unit may take; None where there is no limit."""
        if self.timeout != "auto":
            return self.timeout
        return None if self._pace is None else max(_LEAST, _TIMES * self._pace * work(unit))


def work(unit: Unit) -> int:
    """Return a measure of the work of a unit: characters of its prompts, and answers, for all cells."""
    longest = _CHARACTERS * unit.task.max_new_tokens
    return sum((len(job.sample.prompt) + longest) * len(job.missing) for job in unit.jobs)
