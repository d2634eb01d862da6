import json

import pytest

from benchmarks.rows import TEXT, TEXTS, TEXTS_OR_NULL, parse_rows, read_bytes, sha256
from kvmerge.errors import UserError

FIELDS = {"_id": TEXT, "context": TEXT, "answers": TEXTS, "all_classes": TEXTS_OR_NULL}


def row(**changes):
    return {"_id": "a", "context": "c", "answers": ["x"], "all_classes": None} | changes


def encode(*rows):
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()


def parse(data):
    return parse_rows(data, "dir/t.jsonl", FIELDS, id_field="_id")


def test_values_come_through_unchanged():
    context = "a\r\nb\rc\u2028d\x85e\ufffdf\x0b" + "长" * 200_000
    rows = [row(context=context, extra=1), row(_id="b", answers=[], all_classes=["p"])]
    assert parse(encode(*rows)) == [
        ("dir/t.jsonl, line 1", rows[0]),
        ("dir/t.jsonl, line 2", rows[1]),
    ]


def test_blank_lines_and_crlf_ends_keep_the_line_numbers():
    data = encode(row()) + b"\r\n\n" + encode(row(_id="b")) + b"\n"
    assert [place for place, _ in parse(data)] == ["dir/t.jsonl, line 1", "dir/t.jsonl, line 3"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", r"expected a JSON object, got \[1\]"),
        (b'{"_id": "\xff"}', "not UTF-8"),
        (encode({"_id": "b"}), "missing field context, answers, all_classes.*found: _id"),
        (encode(row(_id=3)), "field _id must be a string of valid Unicode, got 3"),
        (encode(row(_id="b", answers="x")), "field answers must be a list of strings, got 'x'"),
        (encode(row(_id="b", answers=[1])), r"field answers must be a list of strings, got \[1\]"),
        (encode(row(_id="b", all_classes=[None])), "field all_classes must be .* or null"),
        (json.dumps(row(_id="b", context="\ud800")).encode(), "field context must be"),
        (encode(row()), "_id 'a' is already that of line 1"),
    ],
)
def test_a_bad_row_is_named(bad, words):
    with pytest.raises(UserError, match=f"^dir/t.jsonl, line 3: .*{words}"):
        parse(encode(row()) + b"\n\n" + bad)


def test_ids_may_repeat_where_the_benchmark_says_so():
    places = [place for place, _ in parse_rows(encode(row(), row()), "t", FIELDS, id_field=None)]
    assert places == ["t, line 1", "t, line 2"]


def test_long_values_are_shortened_in_messages():
    with pytest.raises(UserError) as caught:
        parse(encode(row(answers="x" * 100_000)))
    assert len(str(caught.value)) < 200


def test_a_file_without_rows_is_refused():
    with pytest.raises(UserError, match=r"dir/t\.jsonl holds no rows"):
        parse(b"\n\n")


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nope\.jsonl: No such file"):
        read_bytes(tmp_path / "nope.jsonl")


def test_a_digest_is_sha256_in_hex():
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
