from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.plan.calibration import kept
from kvmerge.places import choices
from scripts import calibrate_speed
from tests.tiny_run import compose


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate_speed, "_LONGEST", 120)
    monkeypatch.setattr(calibrate_speed, "_ROUNDS", 1)
    return tmp_path


def test_a_machine_is_measured_with_a_model_and_its_methods(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = "cells=[full@1,'kvmerger:sigma=3@0.5']"
    assert calibrate_speed.main(["model=tiny-random", cells]) == 0
    assert f"Kept in {cache / 'speed.json'}" in capsys.readouterr().out
    found = kept(compose("model=tiny-random").model)
    assert found is not None
    assert found.prefill(1000) > 0
    assert found.prefill(1000) >= found.prefill(10) >= 0, "the pass itself may be all"
    assert found.loading > 0
    assert found.resident > 1e7
    own_prefill = {"full", "h2o_sim_prefill"}
    assert set(found.compressing) <= {*choices("method"), "kvmerger:sigma=3"} - own_prefill
    assert {"kvmerger", "kvmerger:sigma=3", "h2o", "cam"} <= set(found.compressing)
    assert len(json.loads((cache / "speed.json").read_text())) == 1


def test_a_model_that_takes_too_little_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate_speed.main(["model=tiny-random", "model.max_length=60"]) == 2
    assert "takes 48 tokens, too few" in capsys.readouterr().err
