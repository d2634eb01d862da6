"""Metrics: how one answer is marked, and how a task's score comes from the marks of its samples.

Each metric is one `Metric`, defined beside the function that it is made of; `benchmarks.metrics` lists
them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import shown
from kvmerge.errors import UserError

Array = NDArray[np.float64]
Marks = Mapping[str, float]
"""What one sample gets: `score`, and the parts that its task's score is made of."""


def percent(means: Array) -> Array:
    """Return the only part's mean in percent."""
    return 100 * means[..., 0]


def plain(means: Array) -> Array:
    """Return the only part's mean as it is."""
    return means[..., 0]


@dataclass(frozen=True)
class Metric:
    """One metric, from a sample's answer to a task's score."""

    name: str
    """What results and settings call it."""
    sample: Callable[..., Marks]
    """From a prediction, its gold answers and the task's label set (or None) to the sample's marks,
    0 to 1; of a continuation, from its negative log-likelihood and its number of tokens."""
    parts: tuple[str, ...] = ("score",)
    """Keys of a record line, averaged over seeds and then samples."""
    score: Callable[[Array], Array] = percent
    """From means of the parts, `(..., parts)`, to scores as published, `(...)`."""
    higher_is_better: bool = True
    averaged: bool = True
    """Whether the score is one of 0 to 100 that has a place in an average over tasks."""
    continuation: bool = False
    """Whether it weighs a continuation that is given, and not an answer."""

    @property
    def is_linear(self) -> bool:
        """Whether the difference of two scores is the score of the difference."""
        return self.score in (percent, plain)

    def __reduce__(self) -> tuple[Callable[[str], Metric], tuple[str]]:
        """Pickle it as its name, by which it is found again: its functions may be closures."""
        from benchmarks.metrics import find_metric  # which lists this module's

        return find_metric, (self.name,)

    def check_answers(
        self, answers: Sequence[str], all_classes: Sequence[str] | None, place: str
    ) -> None:
        """Refuse a row that would fail at scoring, hours into a run.

        Raises:
            UserError: naming `place`, if no prediction can be marked against the answers.
        """
        try:
            self.sample("", answers, all_classes)
        except Exception as error:
            raise UserError(
                f"{place}: metric {self.name} cannot score against answers {shown(answers)} "
                f"with all_classes {shown(all_classes)} ({type(error).__name__}: {error})."
            ) from error


def best_of(
    compare: Callable[[str, str], float], *, without: float | None = None
) -> Callable[..., Marks]:
    """Return the sample rule that takes the best over the answers.

    Args:
        compare: from a prediction and one answer to 0 to 1.
        without: what a sample without answers gets; None makes it a ValueError.
    """

    def sample(
        prediction: str, answers: Iterable[str], all_classes: Sequence[str] | None = None
    ) -> Marks:
        scores = [compare(prediction, answer) for answer in answers]
        return {"score": max(scores) if scores or without is None else without}

    return sample


UNSCORED = Metric(
    "unscored",
    lambda prediction, answers, all_classes=None: {"score": math.nan},
    parts=(),
    score=lambda means: np.full(means.shape[:-1], np.nan),
    averaged=False,
)
"""Answers are withheld: nothing is scored."""
