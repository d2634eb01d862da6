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
            "score must be a finite number or null, got 'high'",
        ),
        (
            record("1", 0.5).to_json().replace('["a", "b"]', '"a"').encode(),
            "answers must be a list, got 'a'",
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


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"id": 3}, "id must be a string of valid Unicode, got 3"),
        ({"answers": ["a", 1]}, r"answers\[1\] must be a string of valid Unicode, got 1"),
        ({"kv_bytes": -1}, "kv_bytes must be a whole number of 64 bits, 0 or more, got -1"),
        ({"kv_bytes": True}, "kv_bytes must be a whole number"),
        ({"kept_entries": 2**63}, "kept_entries must be a finite number"),
        ({"top1_agreement": 1.5}, "top1_agreement must be a finite number, 0 to 1 or null, got 1.5"),
        ({"kept_entries_by_layer": [1, None]}, "kept_entries_by_layer must be a list or null"),
        ({"finish_reason": "end"}, "finish_reason must be 'stop' or 'length' or null, got 'end'"),
        ({"groups": ["4-8k"]}, r"groups must be an object, got \['4-8k'\]"),
        ({"groups": {"length": 0.5}}, r"groups.length must be a .* or a whole number .*, got 0.5"),
        ({"rouge1": "high"}, "rouge1 must be a finite number or null, got 'high'"),
        ({"seed": "0", "kl_to_full": -1}, "seed must be .*; kl_to_full must be"),
    ],
)
def test_a_value_of_another_type_is_named_wherever_it_stands(
    tmp_path: Path, fields: dict[str, object], why: str
) -> None:
    path = tmp_path / "x.jsonl"
    append_record(path, record("1", 0.1))
    line = json.dumps(json.loads(record("2", 0.2).to_json()) | fields) + "\n"
    path.write_text(path.read_text(encoding="utf-8") + line)
    with pytest.raises(UserError, match=f"{path}, line 2 is not a record: {why}"):
        read_records(path)


def test_a_line_of_an_earlier_version_lacks_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = json.loads(record("1", 0.1).to_json())
    path.write_text(json.dumps({name: row[name] for name in CONTRACT[:-3]}) + "\n")
    assert read_records(path) == [record("1", 0.1, kv_bytes_full=None)]


def test_a_line_that_repeats_an_earlier_one_but_for_how_it_was_run_is_refused_by_name(
    tmp_path: Path,
) -> None:
    path = prediction_path(tmp_path, "qa", "full@1")
    first = record("1", math.nan, decode_seconds=1.0)
    again = record(
        "1", math.nan, decode_seconds=2.0, batch_samples=4, threads=2, kernel="flash", kept_entries=50
    )
    for line in (first, again, record("1", 0.5, seed=43), again):
        append_record(path, line)
    with pytest.raises(UserError) as caught:
        read_records(path)
    for number in (2, 4):
        text = f"full@1.jsonl, line {number} repeats an earlier one, of sample '1' with seed 42"
        assert text in str(caught.value)
    assert f"python -m scripts.records repair {tmp_path}" in str(caught.value)


def test_lines_that_differ_are_refused_together_with_the_command_that_repairs(tmp_path: Path) -> None:
    for task, samples in (("qa", "ab"), ("trec", "c")):
        path = prediction_path(tmp_path, task, "full@1")
        for sample in samples:
            append_record(path, record(sample, 0.1))
        for sample in samples:
            append_record(path, record(sample, 0.2, kv_bytes=7))
    with pytest.raises(UserError) as caught:
        read_records(path)
    for sample in ("'a'", "'b'", "'c'"):
        assert f"sample {sample} with seed 42, and differ in score, kv_bytes" in str(caught.value)
    assert "qa/full@1.jsonl, lines 1, 3 are" in str(caught.value)
    assert f"python -m scripts.records repair {tmp_path}" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*x\.jsonl: Is a directory"):
        read_records(tmp_path / "x.jsonl")


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
