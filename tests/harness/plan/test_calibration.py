from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harness.plan import calibration
from harness.plan.calibration import Calibration, Point, fit, keep, kept
from harness.plan.speed import Batch
from kvmerge.cells import parse_cell
from kvmerge.models import ModelSpec
from tests.tiny_run import compose

KNOWN = Calibration(
    loading=2.0,
    resident=3e8,
    prefilling=[0.1, 2e-3, 1e-6],
    storing=1e-5,
    decoding=[0.02, 3e-3, 1e-3, 2e-5],
    replaying=[1e-3, 1e-6],
    compressing={"h2o": [0.04, 1.0], "kvmerger": [0.4, 2.0]},
    reference=2000,
    error=0.0,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return compose("model=tiny-random").model


def measured(tokens: int, batch: Batch, answer: int = 5) -> Point:
    """What a machine of `KNOWN`'s speed would be measured with, a step at a time."""
    once, row, call, entry = KNOWN.decoding
    decode, read = 0.0, batch.entries
    for _ in range(answer - 1):
        read += batch.rows
        decode += once + row * batch.rows + call * batch.groups + entry * read
    point = Point(tokens, batch, answer, 0.0, decode, 0.0)
    prefill = 0.1 + 2e-3 * tokens + 1e-6 * tokens**2 + 1e-5 * batch.entries
    return replace(point, prefill=prefill, replay=KNOWN.replay(point.grown, answer - 1))


POINTS = [
    measured(tokens, Batch(rows, groups, tokens * rows / 2))
    for tokens in (100, 400, 1000)
    for rows, groups in ((1, 1), (8, 1), (8, 8))
]


def test_a_fit_finds_the_speed_that_points_were_made_with() -> None:
    methods = {"h2o": ((1000, 0.02), (2000, 0.04)), "kvmerger": ((1000, 0.1), (2000, 0.4))}
    found = fit(POINTS, methods, loading=2.0, resident=3e8)
    for name, wanted in asdict(KNOWN).items():
        value = asdict(found)[name]
        if name == "compressing":
            assert {key: pytest.approx(wanted[key]) for key in wanted} == value
        else:
            assert value == pytest.approx(wanted, rel=1e-4, abs=1e-9), name


def test_a_fit_says_how_far_off_it_is() -> None:
    slow = [replace(POINTS[0], prefill=POINTS[0].prefill * 2), *POINTS[1:]]
    assert fit(slow, {}, 0, 0).error > 0.1


def test_no_time_is_negative_however_odd_the_readings() -> None:
    odd = [replace(each, prefill=1 / each.tokens, replay=0.0) for each in POINTS]
    found = fit(odd, {}, 0, 0)
    assert min(*found.prefilling, found.storing, *found.decoding, *found.replaying) >= 0


def test_a_method_grows_with_the_prompt_as_it_was_measured_to() -> None:
    assert KNOWN.compress(parse_cell("kvmerger@0.5"), 1000) == pytest.approx(0.1)
    assert KNOWN.compress(parse_cell("h2o@0.35"), 1000) == pytest.approx(0.02)
    assert KNOWN.compress(parse_cell("full@1"), 1000) == 0
    assert KNOWN.compress(parse_cell("h2o@1000"), 900) == 0  # nothing is left out


def test_a_method_that_was_not_measured_takes_the_mean_of_the_others() -> None:
    cell = parse_cell("snapkv@0.5")
    assert not KNOWN.knows(cell)
    assert KNOWN.compress(cell, 2000) == pytest.approx(0.22)
    assert KNOWN.knows(parse_cell("kvmerger:sigma=3@0.5"))


def test_a_slower_machine_takes_longer_for_everything() -> None:
    slow, batch = KNOWN.slower(0.5), Batch(3, 2, 500)
    for ask in (
        lambda of: of.loading,
        lambda of: of.prefill(700),
        lambda of: of.store(100),
        lambda of: of.step(batch),
        lambda of: of.replay(batch, 9),
        lambda of: of.compress(parse_cell("kvmerger@0.5"), 700),
    ):
        assert ask(slow) == pytest.approx(1.5 * ask(KNOWN))


def test_what_is_kept_is_read_again_beside_that_of_others(spec: ModelSpec) -> None:
    assert kept(spec) is None
    other = replace(spec, dtype="bfloat16")
    path = keep(spec, KNOWN)
    keep(other, KNOWN.slower(1))
    assert kept(spec) == KNOWN
    assert kept(other) == KNOWN.slower(1)
    assert path.name == "speed.json"


@pytest.mark.parametrize(
    "changed", [{"dtype": "float16"}, {"name": "another"}, {"context": 99, "pack_weights": False}]
)
def test_another_model_has_no_calibration(spec: ModelSpec, changed: dict[str, object]) -> None:
    keep(spec, KNOWN)
    assert kept(replace(spec, **changed)) is None


def test_another_machine_has_no_calibration(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(spec, KNOWN)
    monkeypatch.setattr(calibration, "machine", lambda: "another, 1 threads")
    assert kept(spec) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"prefilling": [1, 2, 3]}', "WHOLE but of one number"]
)
def test_a_file_of_something_else_is_no_calibration(spec: ModelSpec, cache: Path, content: str) -> None:
    path = keep(spec, replace(KNOWN, decoding=[1.0]) if "WHOLE" in content else KNOWN)
    if "WHOLE" not in content:
        path.write_text(content)
    assert kept(spec) is None
    keep(spec, KNOWN)  # and is replaced
    assert kept(spec) == KNOWN
