"""What the report judges by: what it may hold, and its defaults."""

from __future__ import annotations

import math

import pytest

from harness.judgement import FlipRule, Judgement, judgement_from
from kvmerge.errors import UserError


@pytest.mark.parametrize("margin", [0, -1, math.nan, math.inf])
def test_a_margin_is_above_0(margin: float) -> None:
    with pytest.raises(UserError, match=r"margin=.* must be a number of points above 0"):
        Judgement(margin)


@pytest.mark.parametrize("points", [0, -1, 100.5, math.nan])
@pytest.mark.parametrize("name", ["well", "drop"])
def test_points_of_a_flip_are_above_0_and_at_most_100(name: str, points: float) -> None:
    with pytest.raises(UserError, match=rf"flips\.{name}=.* must be above 0 and at most 100"):
        FlipRule(**{name: points})


def test_what_an_earlier_version_did_not_record_is_the_default() -> None:
    assert judgement_from({}) == Judgement(1, FlipRule(50, 50))
    assert judgement_from({"margin": 2.5}) == Judgement(2.5, FlipRule(50, 50))
    assert judgement_from({"flips": {"drop": 10}}) == Judgement(1, FlipRule(50, 10))


def test_what_is_given_takes_the_place_of_what_is_recorded() -> None:
    recorded = Judgement(2, FlipRule(80, 40))
    assert recorded.but() == recorded
    assert recorded.but(margin=3) == Judgement(3, FlipRule(80, 40))
    assert recorded.but(well=70) == Judgement(2, FlipRule(70, 40))
    assert recorded.but(drop=70) == Judgement(2, FlipRule(80, 70))
