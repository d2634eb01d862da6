"""When a worker is taken to hang."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.executors.time_limit import TimeLimit, work
from harness.executors.units import Unit, units
from harness.runner import left
from harness.settings import Settings
from tests.tiny_run import compose

Tiny = Callable[..., Settings]


@pytest.fixture
def few(tiny: Tiny) -> list[Unit]:
    """Units of one sample each."""
    return list(units(left(tiny("benchmark.tasks=[trec,lcc]", "batch_size=1")).jobs))


@pytest.mark.parametrize("given", [7.5, None])
def test_what_is_given_holds_for_every_unit(given: float | None, few: list[Unit]) -> None:
    limit = TimeLimit(given)
    limit.learn(few[0], 1e6)
    assert {limit.of(unit) for unit in few} == {given}


def test_without_one_the_slowest_unit_so_far_tells_what_others_may_take(few: list[Unit]) -> None:
    first, second, *_, last = few
    limit = TimeLimit("auto")
    assert limit.of(first) is None, "nothing is known before a unit is back"
    limit.learn(first, 100)
    limit.learn(second, 1)
    assert limit.of(last) == pytest.approx(20 * 100 * work(last) / work(first))
    assert limit.of(first) == 2000


def test_no_unit_has_less_than_ten_minutes(few: list[Unit]) -> None:
    limit = TimeLimit("auto")
    limit.learn(few[0], 0.01)
    assert limit.of(few[-1]) == 600


def test_a_unit_is_the_more_work_the_more_cells_it_lacks(tiny: Tiny) -> None:
    one, three = (
        next(units(left(tiny("benchmark.tasks=[trec]", "batch_size=1", f"cells=[{cells}]")).jobs))
        for cells in ("full@1", "full@1,h2o@0.5,h2o@0.35")
    )
    assert work(three) == 3 * work(one)


@pytest.mark.parametrize(
    ("word", "value"), [("executor.timeout=null", None), ("", "auto"), ("executor.timeout=60", 60)]
)
def test_the_setting_is_seconds_auto_or_null(word: str, value: object) -> None:
    settings = compose("executor=ray", *filter(None, [word]))
    assert settings.executor.timeout == value


def test_another_word_is_refused() -> None:
    from kvmerge.errors import UserError

    with pytest.raises(UserError, match=r"executor\.timeout='soon'.*auto"):
        compose("executor=ray", "executor.timeout=soon")
