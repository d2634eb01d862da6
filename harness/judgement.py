"""What the report judges by: no prediction depends on it, and a finished run can be judged anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmerge.errors import UserError
from kvmerge.schema import construct

MARGIN = 1.0
POINTS = 50.0
"""Of a flip: of the good answer, and of how far the bad one is below it."""


def check_margin(margin: float, name: str = "margin=") -> None:
    """Raise `UserError` unless a margin is a finite number above 0."""
    if not 0 < margin < math.inf:
        raise UserError(
            f"{name}{margin:g} must be a number of points above 0: two scores that differ by less "
            f"count as equivalent. Leave it out for {MARGIN:g}."
        )


def check_flip_points(points: float, name: str) -> None:
    """Raise `UserError` unless points of a rule for flips are above 0 and at most 100."""
    if not 0 < points <= 100:
        raise UserError(
            f"{name}{points:g} must be above 0 and at most 100: scores are points of 0 to 100, and a "
            "flip is a sample answered well that another cell answers worse. Leave it out for "
            f"{POINTS:g}."
        )


@dataclass(frozen=True)
class FlipRule:
    """When a sample counts as lost or gained, in points of scores 0 to 100.

    Raises `UserError` unless both are above 0 and at most 100.
    """

    well: float = POINTS
    """A sample is answered well from this score on."""
    drop: float = POINTS
    """One that was answered well is lost where the score is lower by at least this much."""

    def __post_init__(self) -> None:
        check_flip_points(self.well, "flips.well=")
        check_flip_points(self.drop, "flips.drop=")

    @property
    def sentence(self) -> str:
        """Return the rule as tables and figures state it."""
        return f"A good answer has {self.well:g} points or more, a bad one {self.drop:g} or more less."


@dataclass(frozen=True)
class Judgement:
    """Which differences count. Raises `UserError` unless the margin is a finite number above 0."""

    margin: float = MARGIN
    """Points within which two scores are equivalent."""
    flips: FlipRule = FlipRule()
    noise: str | None = None
    """Folder of a run of `kind=noise`; None: where one of the same model and benchmark writes."""

    def __post_init__(self) -> None:
        check_margin(self.margin)

    def but(
        self,
        margin: float | None = None,
        well: float | None = None,
        drop: float | None = None,
        noise: str | None = None,
    ) -> Judgement:
        """Return it with what is given in place of its own."""
        return Judgement(
            self.margin if margin is None else margin,
            FlipRule(
                self.flips.well if well is None else well, self.flips.drop if drop is None else drop
            ),
            self.noise if noise is None else noise,
        )


def judgement_from(config: Mapping[str, Any]) -> Judgement:
    """Read it from a configuration, which lacks what a version did not know yet.

    Raises:
        UserError: naming the setting that is not allowed.
    """
    given = {name: config[name] for name in ("margin", "flips", "noise") if name in config}
    if isinstance(given.get("flips"), Mapping):
        given["flips"] = construct(FlipRule, given["flips"], "flips")
    return construct(Judgement, given)
