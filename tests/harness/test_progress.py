"""One count of a run's samples: what is done already, a bar or lines, and what is left."""

from __future__ import annotations

import logging
import re

import pytest

from harness import progress
from harness.progress import Progress, Step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that it is."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "harness.progress")
    return caplog


def test_lines_count_the_samples_of_the_whole_run_and_foretell_by_this_one(
    clock: list[float], told: pytest.LogCaptureFixture
) -> None:
    with Progress(84, 140) as shown:
        shown.begin("trec")
        for _ in range(28):
            clock[0] += 5
            shown.step(Step("trec"))
        shown.begin("lcc")
        for _ in range(28):
            clock[0] += 1
            shown.step(Step("lcc"))
    assert told.messages == [
        "84 of 140 samples are done already; 56 are left",
        "trec: 84 of 140 samples, 0:00 elapsed",
        "trec: 96 of 140 samples, 1:00 elapsed, about 3:40 left",
        "trec: 108 of 140 samples, 2:00 elapsed, about 2:40 left",
        "lcc: 112 of 140 samples, 2:20 elapsed, about 2:20 left",
        "lcc: 140 of 140 samples, 2:48 elapsed",
    ]


def test_a_new_run_has_nothing_done_to_tell_of(told: pytest.LogCaptureFixture) -> None:
    with Progress(0, 1) as shown:
        shown.begin("trec")
    assert told.messages[0] == "trec: 0 of 1 samples, 0:00 elapsed"


def test_a_run_that_ends_in_an_error_claims_no_end(told: pytest.LogCaptureFixture) -> None:
    shown = Progress(0, 2)
    shown.begin("trec")
    shown.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert len(told.messages) == 1


def test_a_terminal_gets_a_bar_with_the_same_count_the_workers_the_pace_and_the_scores(
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress(3, 6, workers=2, scores=lambda: "h2o@0.5 81.0") as shown:
        for _ in range(2):
            clock[0] += 10
            shown.step(Step("trec", tokens=500))
    drawn = re.sub(r"\x1b\[[?\d;]*\w", "", capsys.readouterr().err)
    assert "h2o@0.5 81.0" in drawn
    words = "5 of 6 samples, 2 workers, 50 tokens/s, 0:20 elapsed, about 0:10 left"
    assert re.search(rf"trec .* {words}", drawn)
    assert told.messages == ["3 of 6 samples are done already; 3 are left"]


def test_long_times_have_hours() -> None:
    assert progress.clock(59.6) == "1:00"
    assert progress.clock(3661) == "1:01:01"
