"""A results folder: each of its files is read once, and what is in memory is on the disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness import results as module
from harness.columnar import Records, read_columns
from harness.records import Record, prediction_path
from harness.results import Results
from kvmerge.errors import UserError
from tests.synthetic_run import record

KEY = ("trec", "h2o@0.5")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each prediction file was read."""
    counts: Counter[Path] = Counter()

    def counted(path: Path, *arguments: Any) -> Records:
        counts[path] += 1
        return read_columns(path, *arguments)

    monkeypatch.setattr(module, "read_columns", counted)
    return counts


def test_a_prediction_file_is_read_once(tmp_path: Path, read: Counter[Path]) -> None:
    Results(tmp_path).add(*KEY, record("1", 0.1))
    read.clear()
    results = Results(tmp_path)
    assert [one.id for one in results.records(*KEY)] == ["1"]
    assert [one.id for one in results.records(*KEY)] == ["1"]
    assert results.records("trec", "full@1") == results.records("trec", "full@1") == []
    assert read == {prediction_path(tmp_path, *KEY): 1, prediction_path(tmp_path, "trec", "full@1"): 1}


def test_a_record_joins_those_that_were_read(tmp_path: Path, read: Counter[Path]) -> None:
    Results(tmp_path).add(*KEY, record("1", 0.1))
    read.clear()
    results = Results(tmp_path)
    earlier = results.records(*KEY)
    results.add(*KEY, record("2", 0.2))
    results.add("lcc", "h2o@0.5", record("3", 0.3))
    assert [one.id for one in results.records(*KEY)] == ["1", "2"]
    assert results.records(*KEY) is earlier, "who holds the list sees what is added"
    assert [one.id for one in results.records("lcc", "h2o@0.5")] == ["3"]
    assert set(read.values()) == {1}


def test_a_record_added_first_does_not_hide_those_on_the_disk(tmp_path: Path) -> None:
    Results(tmp_path).add(*KEY, record("1", 0.1))
    results = Results(tmp_path)
    results.add(*KEY, record("2", 0.2))
    assert [one.id for one in results.records(*KEY)] == ["1", "2"]
    assert Results(tmp_path).records(*KEY) == results.records(*KEY)


def test_a_record_is_on_the_disk_before_it_is_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path)
    listed_when_written: list[int] = []
    append = module.append_record

    def watched(path: Path, new: Record) -> None:
        append(path, new)
        listed_when_written.append(len(results.records(*KEY)))

    monkeypatch.setattr(module, "append_record", watched)
    results.add(*KEY, record("1", 0.1))
    assert listed_when_written == [0]
    assert len(results.records(*KEY)) == 1


def test_a_record_that_could_not_be_written_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, new: Record) -> None:
        raise UserError("the disk is full")

    results = Results(tmp_path)
    monkeypatch.setattr(module, "append_record", full)
    with pytest.raises(UserError, match="the disk is full"):
        results.add(*KEY, record("1", 0.1))
    assert results.records(*KEY) == []


def test_run_json_is_read_once_and_follows_what_is_written(tmp_path: Path) -> None:
    Results(tmp_path).write_info({"seed": 0, "model": "Brücke"})
    results = Results(tmp_path)
    assert results.info == {"seed": 0, "model": "Brücke"}
    results.run_file.write_text("{}")
    assert results.info["seed"] == 0, "read once"
    results.write_info({"seed": 1})
    assert results.info == Results(tmp_path).info == {"seed": 1}


def test_a_folder_without_run_json_says_nothing(tmp_path: Path) -> None:
    assert Results(tmp_path).info == {}
    assert Results(tmp_path / "nowhere").info == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_a_run_json_that_cannot_be_read_is_named_with_a_way_out(tmp_path: Path, content: bytes) -> None:
    results = Results(tmp_path)
    results.run_file.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read {results.run_file}: .*Choose another output_dir"):
        _ = results.info


def test_a_run_json_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*run\.json: "):
        _ = Results(tmp_path).info


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"cells": "full@1"}', "cells must be a list, got 'full@1'"),
        ('{"tasks": {"trec": {"samples": 3}}}', "tasks.trec.metric is missing"),
        ('{"tasks": {"trec": []}}', r"tasks.trec must be an object, got \[\]"),
        ('{"runs": [{"seconds": "3"}]}', r"runs\[0\].seconds must be a finite number or null, got '3'"),
        ('{"fingerprint": {"data": []}}', "fingerprint.data must be an object"),
        ('{"model": 1, "shard": -1}', "model must be .*, got 1; shard must be .* 0 or more, got -1"),
        ('{"notes": ["\\ud800"]}', "surrogates not allowed"),
    ],
)
def test_a_run_json_of_another_shape_is_named_with_the_place(
    tmp_path: Path, content: str, why: str
) -> None:
    results = Results(tmp_path)
    results.run_file.write_text(content)
    with pytest.raises(UserError, match=f"cannot read {results.run_file}: .*{why}"):
        _ = results.info


def test_predictions_count_as_such_whatever_task_they_are_of(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert not results.has_predictions()
    (tmp_path / "predictions").mkdir()
    assert not results.has_predictions()
    results.add(*KEY, record("1", 0.1))
    assert results.has_predictions()
