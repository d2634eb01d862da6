"""LongBench-E: its files, its rows and its length buckets."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import longbench
from benchmarks.longbench import tasks
from benchmarks.longbench_e import ROWS, TASKS, LongBenchE, bucket
from kvmerge.errors import UserError


def row(dataset: str = "qasper", **changes: Any) -> dict[str, Any]:
    fields = {
        "input": "Which?",
        "context": "A text.",
        "answers": ["this one"],
        "length": 4000,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": "0",
    }
    return fields | changes


def write(folder: Path, name: str, *rows: dict[str, Any]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def test_tasks_are_thirteen_of_longbench_unchanged() -> None:
    assert [task.name for task in TASKS] == [
        *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec"),
        *("triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
    ]
    assert set(TASKS) <= set(tasks.TASKS)
    assert sum(ROWS.values()) == 10 * 300 + 150 + 224 + 294


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (10**9, "8k+")],
)
def test_a_length_at_the_end_of_a_bucket_begins_the_next(length: int, expected: str) -> None:
    assert bucket(length) == expected


@given(st.lists(st.integers(0, 20_000), max_size=30))
def test_buckets_are_those_of_a_histogram(lengths: list[int]) -> None:
    counted = [sum(bucket(n) == name for n in lengths) for name in ("0-4k", "4-8k", "8k+")]
    assert counted == np.histogram(lengths, [0, 4000, 8000, np.inf])[0].tolist()


@pytest.mark.parametrize("dataset", ["qasper", "qasper_e"])
def test_rows_are_longbenchs_with_their_bucket(tmp_path: Path, dataset: str) -> None:
    write(tmp_path, "qasper_e", row(dataset), row(dataset, _id="1", length=8000))
    benchmark = LongBenchE(str(tmp_path), ["qasper"])
    (task,) = benchmark.tasks
    first, second = benchmark.samples(task)
    assert (first.task, first.groups, second.groups) == (
        "qasper",
        {"length": "4-8k"},
        {"length": "8k+"},
    )
    assert first.prompt == longbench.prompt(row("qasper"))
    assert benchmark.score(first, task, "this one") == {"score": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": "4000"}, "field length must be a whole number of 0 or more, got '4000'"),
        ({"length": 4000.0}, "field length must be a whole number"),
        ({"length": True}, "field length must be a whole number"),
        ({"length": -1}, "field length must be a whole number"),
        ({"dataset": "hotpotqa"}, "dataset is 'hotpotqa', expected 'qasper'"),
        ({"dataset": "qasper_x"}, "dataset is 'qasper_x', expected 'qasper'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(tmp_path, "qasper_e", row(), row(_id="1", **changes))
    benchmark = LongBenchE(str(tmp_path), ["qasper"])
    with pytest.raises(UserError, match=rf"qasper_e\.jsonl, line 2: {words}"):
        benchmark.samples(benchmark.tasks[0])


def test_a_row_without_a_length_is_refused(tmp_path: Path) -> None:
    bad = row()
    del bad["length"]
    write(tmp_path, "qasper_e", bad)
    benchmark = LongBenchE(str(tmp_path), ["qasper"])
    with pytest.raises(UserError, match="line 1: missing field length"):
        benchmark.samples(benchmark.tasks[0])


def test_longbenchs_own_files_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path, "qasper", row())
    with pytest.raises(UserError, match=r"has no qasper_e\.jsonl"):
        LongBenchE(str(tmp_path), ["qasper"])


def test_the_official_archive_holds_its_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "qasper_e", row("qasper"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", "not this one")
        archive.write(path, "data/qasper_e.jsonl")
    monkeypatch.setattr("benchmarks.source.fetch", lambda file: tmp_path / file.filename)
    remote, local = LongBenchE(tasks=["qasper"]), LongBenchE(str(tmp_path), ["qasper"])
    assert remote.samples(remote.tasks[0]) == local.samples(local.tasks[0])
    assert remote.fingerprint() == local.fingerprint()


@pytest.mark.parametrize("name", ["narrativeqa", "qasper_e"])
def test_other_tasks_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown LongBench-E task '{name}'"):
        LongBenchE(tasks=[name])
