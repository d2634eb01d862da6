"""Records as columns: what is read fast is what is read line by line, and nothing else is read fast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.columnar import Records, joined, read_columns, sound_records
from harness.records import Record, append_record, scan
from tests.synthetic_run import record

PARTS: dict[str, Any] = {"rouge1": 0.5, "groups": {"length": "4-8k", "depth": 50}}
WRITTEN = [
    record("a", 0.1, kept_entries_by_layer=[1.5, 2.0], finish_reason="stop", extra=PARTS),
    record("b", 1.0, kl_to_full=0.25, kept_entries_by_layer=None, extra=PARTS),
    record("b", 0.30000000000000004, seed=43, prediction="“Grüße”\n\\ 😀", answers=(), extra=PARTS),
]
SOUND = b"".join(one.to_json().encode() + b"\n" for one in WRITTEN)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "predictions" / "t" / "full@1.jsonl"
    found.parent.mkdir(parents=True)
    found.write_bytes(SOUND)
    return found


def test_a_sound_file_is_read_as_it_was_written(path: Path) -> None:
    records = sound_records(path)
    assert records is not None
    assert list(records) == WRITTEN
    assert records[1] == WRITTEN[1]
    assert records[-1] == WRITTEN[-1]
    assert records[:2] == WRITTEN[:2]
    assert [one.to_json() for one in records] == [one.to_json() for one in WRITTEN]


def test_fields_that_are_left_out_are_checked_all_the_same(path: Path) -> None:
    left_out = ("kept_entries_by_layer",)
    records = read_columns(path, without=left_out)
    assert list(records) == [replace(one, kept_entries_by_layer=None) for one in WRITTEN]
    path.write_bytes(SOUND.replace(b"[1.5, 2.0]", b"[1.5, -2.0]"))
    assert sound_records(path, without=left_out) is None


def test_columns_hold_what_records_do_whether_read_or_added(path: Path) -> None:
    records = read_columns(path)
    records.append(record("c", 0.5, kl_to_full=1.0))
    np.testing.assert_array_equal(records.numbers("kl_to_full"), [np.nan, 0.25, np.nan, 1.0])
    np.testing.assert_array_equal(records.numbers("rouge1"), [0.5, 0.5, 0.5, np.nan])
    assert records.values("groups") == [PARTS["groups"]] * 3 + [None]
    assert records.values("nothing") == [None] * 4
    assert records.distinct("seed", "finish_reason") == {(42, "stop"), (42, None), (43, None)}
    assert [one.id for one in records.having("kl_to_full")] == ["b", "c"]
    assert [one.score for one in records.where("seed", 43)] == [WRITTEN[2].score]
    assert [one.id for one in records.only({"a", "c"})] == ["a", "c"]
    assert records.only({"a", "b", "c", "d"}) is records
    assert records.extremes("score") == (0.1, 1.0)
    assert records.extremes("kl_to_full") == (0.25, 1.0)
    assert np.isnan(records.extremes("nothing")).all()


def test_every_record_has_a_place_among_the_samples_whether_read_or_added(path: Path) -> None:
    records = read_columns(path)
    for more, names, places in (
        ((), ["a", "b"], [0, 1, 1]),
        (["c", "a"], ["a", "b", "c"], [0, 1, 1, 2, 0]),
    ):
        for name in more:
            records.append(record(name, 0.5))
        found = records.samples()
        assert (found[0], found[1].tolist()) == (names, places)


def test_files_of_other_parts_are_joined_in_order(path: Path) -> None:
    other = path.with_name("h2o@0.5.jsonl")
    append_record(other, record("z", 0.0, extra={"nll": 2.5}))
    both = joined([read_columns(path), Records(), read_columns(other)])
    assert list(both) == [*WRITTEN, record("z", 0.0, extra={"nll": 2.5})]


def test_columns_that_all_cells_have_alike_are_held_once(path: Path) -> None:
    first = read_columns(path)
    second = read_columns(path, first)
    assert second.table["answers"] is not None
    held = [records.table["answers"].chunk(0).buffers()[1].address for records in (first, second)]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"seed": 42', b'"seed": 42.0'),
        (b'"seed": 42', b'"seed": true'),
        (b'"score": 1.0', b'"score": NaN'),
        (b'"score": 1.0', b'"score": null'),
        (b'"score": 1.0', b'"score": 1e999'),
        (b'"score": 1.0', b'"score": 99999999999999999999'),
        (b'"kv_bytes": 1000', b'"kv_bytes": -1'),
        (b'"finish_reason": "stop"', b'"finish_reason": "end"'),
        (b'"finish_reason": "stop"', b'"finish_reason": "stop", "rouge1": 0.5'),
        (b'"rouge1": 0.5', b'"rouge1": null'),
        (b'"rouge1": 0.5', b'"rouge1": "2024-01-01"'),
        (b'"depth": 50', b'"depth": null'),
        (b'"depth": 50', b'"dep\xffth": 50'),
        (b'"rouge1": 0.5', b'"rouge1": ' + b"[" * 100_000 + b"]" * 100_000),
        (b'"rouge1": 0.5', b'"rouge1": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        (b"[1.5, 2.0]", b"[1.5, null]"),
        (b"[1.5, 2.0]", b"[1.5, -2.0]"),
        (b'"id": "a"', b'"id": "\\udc00"'),
        (b'"id": "a"', b'"id": "\xff"'),
        (b'"id": "a"', b'"id": "b"'),
        (b'"prompt_hash": "cafe", ', b""),
        (b"}\n{", b"}{"),
        (b"}\n{", b"}\n\n{"),
        (b"}\n{", b"}\r\n{"),
    ],
)
def test_what_is_odd_is_not_read_fast(path: Path, before: bytes, after: bytes) -> None:
    assert before in SOUND
    path.write_bytes(SOUND.replace(before, after, 1))
    assert sound_records(path) is None


@given(data=st.data())
def test_whatever_is_read_fast_is_what_a_look_at_every_line_finds(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed)))
        until = data.draw(st.integers(at, min(at + 3, len(changed))))
        changed[at:until] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"\n", b"}\n{", b"1", b","])
        )
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(changed)
    records = sound_records(path)
    if records is not None:
        found = scan(path)
        assert not [*found.faults(), *found.remarks()]
        assert list(records) == list(found.records.values())


def test_the_type_of_every_field_is_known() -> None:
    made = record("a", 0.5, extra={})
    assert isinstance(Records([made]).values("id"), list)
    assert Records([made]) == [made]
    assert isinstance(made, Record)
