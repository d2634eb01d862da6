"""What a sweep leaves at its end: one report of all points, and the list of those that failed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from harness.sweep import Failed, Points, current_points, report_points, sweep
from tests.synthetic_run import record, write_run
from tests.tiny_run import compose


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, undrawn: None) -> None:
    """Be in an empty folder, and draw nothing."""
    monkeypatch.chdir(tmp_path)


def point(points: Points, number: int, folder: str, *cells: str, **info: Any) -> None:
    """Let a point have answered a full cache and some cells."""
    found = {cell: {"t": [record(str(i), 0.5) for i in range(3)]} for cell in ("full@1", *cells)}
    write_run(Path(folder), {"t": "qa_f1"}, found, **info)
    settings = compose("model=tiny-random", f"output_dir={folder}")
    points.note_done(number, replace(settings, num_shards=info.get("num_shards", 1)))


def told(points: Points) -> str:
    """What is printed of a sweep's points, on one line."""
    console = Console(width=200, record=True)
    report_points(points, console)
    return " ".join(console.export_text().split())


def test_points_of_a_sweep_leave_word_through_the_environment() -> None:
    assert current_points() is None
    with sweep() as points:
        here = current_points()
        assert here == points
        assert here is not None
        here.note_failed(1, "seed=1: broken")
        here.note_failed(0, "seed=0: 1 sample failed", by_samples=True)
        assert points.failed == [
            Failed("seed=0: 1 sample failed", by_samples=True),
            Failed("seed=1: broken"),
        ]
    assert current_points() is None
    assert not points.folder.exists()
    assert not [name for name in os.environ if "SWEEP" in name]


def test_a_point_outlives_the_command_that_began_its_sweep(tmp_path: Path) -> None:
    with sweep(tmp_path / "shared") as points:
        points.note_failed(0, "broken")
        assert points.failed == [Failed("broken")]
        assert points.folder.is_relative_to(tmp_path / "shared")
    points.note_failed(1, "broken too")
    points.note_done(2, compose("model=tiny-random"))


def test_a_point_that_answers_nothing_is_no_part_of_the_report() -> None:
    with sweep() as points:
        points.note_done(0, compose("model=tiny-random", "dry_run=true"))
        points.note_done(1, compose("model=tiny-random", "experiment=observations"))
        points.note_done(2, compose("model=tiny-random", "experiment=noise"))
        assert points.compared == {}
        assert told(points) == ""
    assert list(Path().iterdir()) == []


def test_cells_of_several_points_come_into_one_table() -> None:
    with sweep() as points:
        point(points, 0, "one", "h2o@0.5")
        point(points, 1, "two", "cam@0.5")
        point(points, 2, "three", "h2o@0.5", benchmark="other")
        text = told(points)
    assert text.endswith("all points together: results/report/report.html")
    assert "h2o cam" in text, "a table that no point has printed"
    folders = {path.parent.name for path in Path("results/report/tables").glob("*/scores.csv")}
    assert folders == {"toy-toy-1m", "other-toy-1m"}
    scores = pd.read_csv("results/report/tables/toy-toy-1m/scores.csv")
    assert set(scores["method"]) == {"full", "h2o", "cam"}


def test_points_that_do_not_compare_get_tables_of_their_own() -> None:
    with sweep() as points:
        point(points, 0, "one", "h2o@0.5", fingerprint={"seed": 0})
        point(points, 1, "two", "h2o@0.5", fingerprint={"seed": 1})
        text = told(points)
    assert "tables apart: one and two differ in seed (0 against 1)" in text
    assert len(list(Path("results/report/tables").glob("*/scores.csv"))) == 2


def test_points_of_one_folder_are_together_already() -> None:
    with sweep() as points:
        point(points, 0, "one", "h2o@0.5")
        point(points, 1, "one", "h2o@0.5", "cam@0.5")
        assert told(points) == "all points together: one/report.html"
    assert not Path("one/report.html").exists(), "a point has written it; here there was none"


@pytest.mark.parametrize("shards", [1, 2])
def test_points_that_are_shards_are_joined_where_all_are_there(shards: int) -> None:
    with sweep() as points:
        for k in range(shards):
            lines = {"full@1": {"t": [record(str(k), 0.5)]}}
            info = {"shard": k, "num_shards": 2}
            write_run(Path("one/shards", f"{k}-of-2"), {"t": "qa_f1"}, lines, **info)
            settings = compose("model=tiny-random", "output_dir=one", f"shard={k}", "num_shards=2")
            points.note_done(k, settings)
        text = told(points)
    if shards == 2:
        assert text.endswith("all points together: one/report.html")
        assert "n = 2 samples a task" in text
        assert len(pd.read_csv("one/summary.csv")) == 1
    else:
        assert "not in the report of all points: one/shards lacks 1-of-2" in text
        assert "all points together" not in text
