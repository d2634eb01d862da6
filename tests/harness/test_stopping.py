"""Who handles which signal, and when."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from harness.stopping import Stopped, finishing, stopped_by_signals


@pytest.fixture(params=[signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "handled"])
def others(request: pytest.FixtureRequest) -> Iterator[object]:
    """What somebody else has SIGHUP do."""
    before = signal.signal(signal.SIGHUP, request.param)
    yield request.param
    signal.signal(signal.SIGHUP, before)


def test_what_nohup_or_a_launcher_says_of_a_signal_stays(others: object) -> None:
    with stopped_by_signals(), finishing() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is others
    assert not stop.is_asked()


def go_on(number: signal.Signals, times: int, reached: list[str]) -> None:
    """Work that a signal comes upon."""
    with stopped_by_signals(), finishing() as stop:
        for _ in range(times):
            signal.raise_signal(number)
        assert stop.is_asked()
        reached.append("the end of the block")
    reached.append("what follows it")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_the_first_signal_is_raised_at_the_end_of_the_block_and_the_second_at_once(
    number: signal.Signals, times: int
) -> None:
    reached: list[str] = []
    with pytest.raises(Stopped) as stopped:
        go_on(number, times, reached)
    assert stopped.value.number == number
    assert reached == (["the end of the block"] if times == 1 else [])
