from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.zero_scrolls.tasks import TASKS
from harness.report.page import write_report
from harness.report.run import load_run
from harness.report.submission import main, report_submissions, submission, write_submissions
from kvmerge.errors import UserError
from tests.synthetic_run import record, write_run

NAMES = [task.name for task in TASKS]
ODD = [
    "",
    "NA",
    "null",
    'a "b", c',
    "one\ntwo",
    "one\r\ntwo",
    "one\rtwo",
    " x ",
    "Grüße 北京\u2028",
    "1.0",
]


def lines(seeds=(0,), count=2, text="{seed} {i}"):
    return [
        record(str(i), math.nan, seed=seed, answers=(), prediction=text.format(seed=seed, i=i))
        for i in range(count)
        for seed in seeds
    ]


def complete_run(
    folder: Path, cells=("full@1",), samples=2, benchmark="zero_scrolls_test", **changes
) -> Path:
    """A complete run, but for the records of `changes` (by task, in every cell)."""
    by_task = {name: lines() for name in NAMES} | changes
    write_run(
        folder, dict.fromkeys(by_task, "unscored"), dict.fromkeys(cells, by_task), benchmark=benchmark
    )
    info = json.loads((folder / "run.json").read_text())
    for spec in info["tasks"].values():
        spec["samples"] = samples
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def read(path: Path) -> pd.DataFrame:
    """As the official checker reads it."""
    return pd.read_csv(path, dtype=object, keep_default_na=False, na_values=["!@#$%^&*()"])


def test_every_sample_of_the_ten_tasks_once_in_the_official_columns(tmp_path):
    run = load_run(complete_run(tmp_path, ["full@1", "kvmerger:sigma=3@0.35"]))
    paths, missing = write_submissions(run)
    assert missing == []
    assert [path.name for path in paths] == ["full@1.csv", "kvmerger-sigma=3@0.35.csv"]
    assert {path.parent for path in paths} == {tmp_path / "submissions"}
    table = read(paths[1])
    assert list(table.columns) == ["Task", "ID", "Prediction"]
    assert table["Task"].drop_duplicates().tolist() == NAMES
    assert len(table) == 20
    assert not table.duplicated(["Task", "ID"]).any()
    assert table["Prediction"].tolist() == ["0 0", "0 1"] * 10


def test_odd_predictions_survive(tmp_path):
    odd = [record(str(i), math.nan, seed=0, prediction=text) for i, text in enumerate(ODD)]
    folder = complete_run(tmp_path, samples=len(ODD), **dict.fromkeys(NAMES, odd))
    ((path,), _) = write_submissions(load_run(folder))
    assert read(path)["Prediction"].tolist() == ODD * 10


def test_the_first_seed_is_submitted(tmp_path):
    folder = complete_run(tmp_path, **dict.fromkeys(NAMES, lines(seeds=(5, 4, 6))))
    ((path,), _) = write_submissions(load_run(folder))
    assert read(path)["Prediction"].tolist() == ["4 0", "4 1"] * 10


def test_what_is_missing_is_named(tmp_path):
    folder = complete_run(tmp_path, qasper=lines(count=1), musique=[])
    run = load_run(folder)
    lacking = r"lacks qasper \(1 of 2 predictions\), musique \(0 of 2 predictions\)\. Run all"
    with pytest.raises(UserError, match=rf"full@1 .* {lacking}"):
        submission(run, "full@1")
    assert write_submissions(run)[0] == []
    assert not (folder / "submissions").exists()


def test_a_task_that_was_never_run_is_named(tmp_path):
    folder = complete_run(tmp_path)
    info = json.loads((folder / "run.json").read_text())
    del info["tasks"]["quality"]
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "predictions" / "quality").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"lacks quality \(not run\)"):
        submission(load_run(folder), "full@1")


def test_an_incomplete_seed_does_not_count_as_complete(tmp_path):
    folder = complete_run(tmp_path, qmsum=[*lines(seeds=(1,)), *lines(seeds=(0,), count=1)])
    with pytest.raises(UserError, match=r"lacks qmsum \(1 of 2 predictions\)"):
        submission(load_run(folder), "full@1")


def test_a_prediction_that_the_checker_takes_for_none_is_refused(tmp_path):
    folder = complete_run(tmp_path, qmsum=lines(text="!@#$%^&*()"))
    with pytest.raises(
        UserError, match=r"task qmsum, sample '0' has the prediction '!@#.* reads as nan"
    ):
        submission(load_run(folder), "full@1")


def test_a_complete_cell_is_written_beside_an_incomplete_one(tmp_path, capsys):
    folder = complete_run(tmp_path, ["full@1", "h2o@0.5"])
    (folder / "predictions" / "gov_report" / "h2o@0.5.jsonl").unlink()
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{folder / 'submissions' / 'full@1.csv'}\n"
    assert "h2o@0.5" in captured.err
    assert "gov_report (0 of 2 predictions)" in captured.err
    assert "Traceback" not in captured.err


def test_the_command_succeeds_on_a_complete_run(tmp_path, capsys):
    assert main([str(complete_run(tmp_path))]) == 0
    assert capsys.readouterr().out.endswith("full@1.csv\n")


def test_another_benchmark_is_refused(tmp_path, capsys):
    assert main([str(complete_run(tmp_path, benchmark="zero_scrolls"))]) == 2
    assert "holds zero_scrolls; a submission is made of zero_scrolls_test" in capsys.readouterr().err


def test_reporting_leaves_other_benchmarks_alone(tmp_path):
    report_submissions(load_run(complete_run(tmp_path, benchmark="zero_scrolls")))
    assert not (tmp_path / "submissions").exists()


def test_the_report_writes_submissions_and_says_what_is_missing(tmp_path, caplog, undrawn):
    folder = complete_run(tmp_path, ["full@1", "h2o@0.5"])
    (folder / "predictions" / "gov_report" / "h2o@0.5.jsonl").unlink()
    with caplog.at_level(logging.INFO, logger="harness"):
        write_report([load_run(folder)])
    assert [path.name for path in (folder / "submissions").iterdir()] == ["full@1.csv"]
    levels = {r.levelname: r.message for r in caplog.records if r.name == "harness.report.submission"}
    assert levels["INFO"].endswith("full@1.csv")
    assert "gov_report (0 of 2 predictions)" in levels["WARNING"]
