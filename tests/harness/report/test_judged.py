"""Which judgement a report uses: the command line's, else the run's, else the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.judgement import FlipRule, Judgement
from harness.report.page import main, write_report
from harness.report.run import Run, load_run
from kvmerge.errors import UserError
from tests.synthetic_run import record, write_run


def a_run(folder: Path, **info: Any) -> Run:
    cells = {
        cell: {"t": [record(str(i), score) for i in range(4)]}
        for cell, score in (("full@1", 1.0), ("h2o@0.5", 0.5))
    }
    return load_run(write_run(folder, {"t": "qa_f1"}, cells, **info))


def test_a_run_is_judged_by_what_it_recorded(tmp_path: Path) -> None:
    assert a_run(tmp_path / "a", config=None).judgement == Judgement()
    recorded = {"margin": 2, "flips": {"well": 80, "drop": 40}}
    assert a_run(tmp_path / "b", config=recorded).judgement == Judgement(2, FlipRule(80, 40))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"margin": -1}, "margin=-1 must be"),
        ({"margin": "x"}, "margin='x' must be a number"),
        ({"flips": 3}, "flips=3 must be"),
        ({"flips": {"well": 0}}, "flips.well=0 must be"),
        ({"flips": {"wel": 1}}, "unknown setting of flips 'wel'"),
    ],
)
def test_what_was_recorded_wrongly_is_refused_by_its_place(
    tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    run = a_run(tmp_path, config=config)
    with pytest.raises(UserError, match=f"{tmp_path}/run.json, config: {why}"):
        _ = run.judgement


@pytest.mark.usefixtures("undrawn")
def test_the_margin_given_is_used_else_the_run_s_else_1(tmp_path: Path) -> None:
    def margins(*words: str, **info: Any) -> set[float]:
        folder = tmp_path / "-".join(["run", *words, *info])
        assert main([str(a_run(folder, **info).output_dir), *words]) == 0
        return set(pd.read_csv(folder / "tables" / "contrasts.csv")["margin"])

    assert margins() == {1}
    assert margins(config={"margin": 2.5}) == {2.5}
    assert margins("--margin", "0.5", config={"margin": 2.5}) == {0.5}


@pytest.mark.usefixtures("undrawn")
def test_each_of_several_runs_is_judged_by_its_own(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / name, config={"margin": margin}) for name, margin in (("a", 2), ("b", 3))]
    write_report(runs, tmp_path / "out")
    found = [pd.read_csv(path) for path in sorted((tmp_path / "out").glob("tables/*/contrasts.csv"))]
    assert [set(frame["margin"]) for frame in found] == [{2}, {3}]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--margin", "0"], "--margin 0 must be"),
        (["--flip-well", "101"], "--flip-well 101 must be above 0 and at most 100"),
        (["--flip-drop", "-5"], "--flip-drop -5 must be above 0 and at most 100"),
    ],
)
def test_the_command_line_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert main([str(tmp_path), *words]) == 2
    assert why in capsys.readouterr().err


def test_what_observes_has_nothing_to_be_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "observations").mkdir()
    (tmp_path / "observations" / "t.jsonl").touch()
    assert main([str(tmp_path), "--flip-drop", "20"]) == 2
    assert "--flip-drop: what observes, or measures noise, compares nothing" in capsys.readouterr().err
