from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path

import pytest

from harness.records import append_record, prediction_path, read_records
from kvmerge.errors import UserError
from tests.synthetic_run import record

CONTRACT = [
    "id",
    "seed",
    "prediction",
    "answers",
    "score",
    "prompt_hash",
    "prompt_tokens",
    "generated_tokens",
    "kept_entries",
    "budget_achieved",
    "kv_bytes",
    "kl_to_full",
    "top1_agreement",
    "fidelity_tokens",
]


def test_a_line_has_the_contracts_keys_first_and_metric_parts_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.jsonl"
    append_record(path, record("1", 0.25, kl_to_full=0.5, extra={"rouge1": 0.3}))
    text = path.read_text(encoding="utf-8")
    row = json.loads(text)
    assert list(row)[: len(CONTRACT)] == CONTRACT
    assert row["rouge1"] == 0.3
    assert "extra" not in row
    assert "Grüße\\n2" in text
    assert text.count("\n") == 1


def test_records_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    written = [
        record("1", 0.0, kl_to_full=0.1, top1_agreement=0.9, fidelity_tokens=7, size_bytes=4),
        record("2\u2028", 1.0, seed=43, answers=(), extra={"nll": 1.5, "tokens": 4}),
    ]
    for line in written:
        append_record(path, line)
    assert read_records(path) == written


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == []


def test_nan_and_infinity_are_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_record(
        path, record("1", math.nan, kl_to_full=math.inf, extra={"nll": -math.inf, "tokens": 3})
    )
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (row["score"], row["kl_to_full"], row["nll"]) == (None, None, None)
    (back,) = read_records(path)
    assert math.isnan(back.score)
    assert back.kl_to_full is None


def test_a_metric_part_cannot_hide_a_field() -> None:
    with pytest.raises(ValueError, match="kv_bytes"):
        record("1", 0.0, extra={"kv_bytes": 1})


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_half_written_last_line_is_ignored_reported_and_replaced(
    tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.jsonl"
    first, second = record("1", 0.1), record("2", 0.2)
    append_record(path, first)
    append_record(path, second)
    path.write_bytes(path.read_bytes()[:-cut])
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == [first]
    assert str(path) in caplog.text
    append_record(path, second)
    assert read_records(path) == [first, second]
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("tail", [b'{"id": "2", "se\n', b"\0\0\0\0\n", b"\xff\n", b"[]\n", b"{}\n"])
def test_a_last_line_that_does_not_parse_is_half_written_too(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "x.jsonl"
    append_record(path, record("1", 0.1))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert [r.id for r in read_records(path)] == ["1"]
    append_record(path, record("2", 0.2))
    assert path.read_bytes().startswith(whole + b'{"id": "2", "seed"')
    assert [r.id for r in read_records(path)] == ["1", "2"]


def test_only_a_half_written_line_leaves_an_empty_start(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "1", "se')
    assert read_records(path) == []
    append_record(path, record("2", 0.2))
    assert [r.id for r in read_records(path)] == ["2"]


def test_repair_finds_the_start_of_a_very_long_last_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    long = record("long", 0.5, prediction="x" * 300_000)
    append_record(path, record("1", 0.1))
    append_record(path, long)
    append_record(path, record("2", 0.2))
    assert [r.id for r in read_records(path)] == ["1", "long", "2"]
    path.write_bytes(path.read_bytes() + long.to_json().encode()[:200_000])
    append_record(path, record("3", 0.3))
    assert [r.id for r in read_records(path)] == ["1", "long", "2", "3"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"not json", "Expecting value"),
        (b'{"id": "1"}', "missing seed, prediction"),
        (
            record("1", 0.5).to_json().replace("0.5,", '"high",', 1).encode(),
            "score must be a number",
        ),
        (
            record("1", 0.5).to_json().replace('["a", "b"]', '"a"').encode(),
            "answers must be a list",
        ),
    ],
)
def test_a_malformed_line_elsewhere_names_file_and_line(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "x.jsonl"
    good = record("1", 0.1).to_json().encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(UserError) as caught:
        read_records(path)
    assert f"{path}, line 2" in str(caught.value)
    assert why in str(caught.value)


def test_a_full_disk_says_what_is_kept_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    append_record(path, record("1", 0.1))
    append_record(path, record("2", 0.2))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*'3'.*2 lines are kept.*resumes"):
        append_record(path, record("3", 0.3))
    assert path.read_bytes() == before


def test_another_os_error_is_not_disguised(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        append_record(tmp_path / "x.jsonl", record("1", 0.1))


def test_the_line_is_on_the_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    seen: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_size))
    append_record(path, record("1", 0.1))
    assert seen == [path.stat().st_size]


def test_prediction_paths_follow_the_contract() -> None:
    assert prediction_path(Path("out"), "trec", "full@1") == Path("out/predictions/trec/full@1.jsonl")
    assert prediction_path(Path("out"), "trec", "kvmerger:sigma=3,pivot=score@0.35").name == (
        "kvmerger-sigma=3-pivot=score@0.35.jsonl"
    )
    assert prediction_path(Path("out"), "trec", "kvmerger:thresholds=a/b.json@0.5").name == (
        "kvmerger-thresholds=a-b.json@0.5.jsonl"
    )


@pytest.mark.parametrize(("task", "cell"), [("../x", "full@1"), ("trec", "../b@1"), ("", "full@1")])
def test_a_name_cannot_leave_its_folder(task: str, cell: str) -> None:
    with pytest.raises(UserError, match="cannot name a results file"):
        prediction_path(Path("out"), task, cell)


def test_records_are_frozen() -> None:
    line = record("1", 0.5)
    with pytest.raises(AttributeError):
        line.score = 1.0  # type: ignore[misc]
    assert line.score == 0.5
