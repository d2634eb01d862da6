"""`python -m scripts.records`: everything that is wrong is said at once, and nothing is made up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.failures import FILE, Failure
from harness.lock import only_writer
from harness.prompts import Prompt, prompt_path
from harness.records import append_record, prediction_path, read_records
from harness.results import Results
from scripts.records import check, main, repair
from tests.synthetic_run import record, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sound lines, and one of every fault."""
    qa = [record("a", 0.5), record("b", 0.25), record("c", 1.0)]
    write_run(tmp_path / "run", {"qa": "qa_f1", "trec": "qa_f1"}, {"full@1": {"qa": qa, "trec": qa}})
    path = prediction_path(tmp_path / "run", "qa", "full@1")
    path.write_bytes(
        b"\n".join(
            (
                *path.read_bytes().splitlines(),
                record("a", 0.5, decode_seconds=3.0).to_json().encode(),  # line 4
                record("b", 0.75).to_json().encode(),
                b'{"id": "d", "se',
                record("d", 0.5).to_json().replace("1000", '"1000"').encode(),
                b'{"id": "e", "seed": 4',
            )
        )
    )
    return tmp_path / "run"


def test_a_sound_folder_is_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prediction_path(folder, "qa", "full@1").unlink()
    assert main(["check", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder} is sound.\n"


def test_check_says_all_that_is_wrong_and_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    (folder / "run.json").write_text("[]")
    assert main(["check", str(folder)]) == 1
    printed = capsys.readouterr().err
    for text in (
        "run.json: an object is needed, not list",
        "line 6 is not a record: Unterminated string",
        "line 7 is not a record: kv_bytes must be",
        "lines 2, 5 are all of sample 'b' with seed 42, and differ in score",
        "line 8 is half-written",
        "line 4 repeats an earlier one, of sample 'a' with seed 42",
    ):
        assert re.search(text, printed), text
    assert printed.count("wrong: ") == 6
    for path, content in before.items():
        assert path.name == "run.json" or path.read_bytes() == content


def test_lines_of_failures_are_looked_at_too(tmp_path: Path) -> None:
    write_run(tmp_path, {"qa": "qa_f1"}, {"full@1": {"qa": [record("a", 0.5)]}})
    failure = Failure(task="qa", id="z", cells=["full@1"], error="E", traceback="E", time="now")
    path = tmp_path / FILE
    path.write_text(f'{{}}\n{failure.to_json()}\n{{"task": "q')
    assert list(check(tmp_path)) == [
        f"{path}, line 1 is not a record: missing task, id, cells, error, traceback, time",
        f"{path}, line 3 is half-written; it is ignored",
    ]
    assert len(list(repair(tmp_path))) == 1
    assert path.read_text() == failure.to_json() + "\n"
    assert not list(check(tmp_path))


def test_check_says_what_only_the_whole_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(folder, {"trec": "qa_f1"}, {})
    prediction_path(folder, "qa", "full@1").write_text(record("a", 7.0).to_json() + "\n")
    assert main(["check", str(folder)]) == 1
    assert "qa belongs to a task that run.json does not list" in capsys.readouterr().err


def test_repair_leaves_what_is_sound_and_keeps_the_file_beside(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prediction_path(folder, "qa", "full@1")
    before = path.read_bytes()
    assert main(["repair", str(folder)]) == 0
    kept = path.with_name("full@1.jsonl.damaged")
    assert capsys.readouterr().out == (
        f"{path}: took out lines 2, 4, 5, 6, 7, 8; kept 2 of 8. As it was: {kept}\n{folder} is sound.\n"
    )
    assert kept.read_bytes() == before
    assert [one.id for one in read_records(path)] == ["a", "c"]
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[::2][:2])
    assert not (folder / ".writer").exists()


def test_an_earlier_repairs_copy_stays_and_a_file_of_no_sound_line_goes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prediction_path(folder, "qa", "full@1")
    assert main(["repair", str(folder)]) == 0
    path.write_text("{}")
    assert main(["repair", str(folder)]) == 0
    assert not path.exists()
    assert path.with_name("full@1.jsonl.damaged.2").read_text() == "{}"
    assert "took out lines 1; kept 0 of 1" in capsys.readouterr().out


def test_repair_waits_for_no_writer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = prediction_path(folder, "qa", "full@1").read_bytes()
    with only_writer(folder):
        assert main(["repair", str(folder)]) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert prediction_path(folder, "qa", "full@1").read_bytes() == before


def test_shards_are_looked_at_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder.parent / "sharded" / "shards" / "0-of-1"
    shard.parent.mkdir(parents=True)
    folder.rename(shard)
    assert main(["repair", str(shard.parents[1])]) == 1
    printed = capsys.readouterr()
    assert f"{shard}/predictions/qa/full@1.jsonl: took out" in printed.out
    assert "says shard None of None" in printed.err, "what a repair cannot mend is still said"


def test_a_folder_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", str(tmp_path / "nowhere")]) == 2
    assert "is not an output_dir of a run" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_records_of_another_run_are_taken_out_where_the_prompt_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, strange = record("a", 0.5), record("b", 0.5, prompt_hash="beef")
    write_run(tmp_path, {"qa": "qa_f1"}, {"full@1": {"qa": [own, strange]}})
    path = prediction_path(tmp_path, "qa", "full@1")
    prompt = Prompt(id="b", prompt_hash="cafe", prompt_tokens=3, head="x", tail="")
    append_record(prompt_path(tmp_path, "qa"), prompt)
    assert main(["check", str(tmp_path)]) == 1
    assert f"{path}, line 2: sample 'b' was made with the prompt beef" in capsys.readouterr().err
    assert main(["repair", str(tmp_path)]) == 0
    assert read_records(path) == [own]


def test_records_that_nothing_tells_apart_are_named_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {cell: {"qa": [record("a", 0.5, prompt_hash=cell)]} for cell in ("full@1", "h2o@0.5")}
    write_run(tmp_path, {"qa": "qa_f1"}, both)
    assert main(["repair", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("nothing tells which is of this run") == 2
    assert not list(tmp_path.rglob("*.damaged"))


WRITTEN = [record(name, 0.5, prediction=f"{name}\n") for name in "abcd"]
LINES = [one.to_json().encode() + b"\n" for one in WRITTEN]


@st.composite
def damages(draw: st.DrawFn) -> bytes:
    """A file of `LINES` after what a kill, a disk or a hand may do."""
    lines = list(LINES)
    for kind in draw(st.lists(st.sampled_from(["cut", "again", "swap", "garbage"]), max_size=3)):
        at = draw(st.integers(0, max(0, len(lines) - 1)))
        if kind == "again" and lines:
            lines.insert(draw(st.integers(0, len(lines))), lines[at])
        elif kind == "swap" and lines:
            lines[0], lines[at] = lines[at], lines[0]
        elif kind == "garbage":
            lines.insert(at, draw(st.binary(max_size=6) | st.sampled_from([b"\n", b"{}\n", b'{"id'])))
        elif kind == "cut":
            content = b"".join(lines)
            lines = content[: draw(st.integers(0, len(content)))].splitlines(keepends=True)
    return b"".join(lines)


@given(damaged=damages())
def test_after_any_damage_a_repaired_run_ends_with_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, damaged: bytes
) -> None:
    folder = write_run(tmp_path_factory.mktemp("run"), {"qa": "qa_f1"}, {"full@1": {"qa": WRITTEN}})
    path = prediction_path(folder, "qa", "full@1")
    path.write_bytes(damaged)
    whole = [line for line in damaged.split(b"\n") if line + b"\n" in LINES]
    found = list(check(folder))
    is_sound = damaged[-1:] in (b"", b"\n") and sorted(set(whole)) == sorted(damaged.split(b"\n")[:-1])
    assert bool(found) != is_sound
    list(repair(folder))
    assert not list(check(folder)), "nothing is left that is wrong"
    results = Results(folder)
    kept = [one.id for one in results.records("qa", "full@1")]
    assert {json.loads(line)["id"] for line in damaged.split(b"\n")[:-1] if line in whole} <= set(kept)
    for one in WRITTEN:  # as a run answers what has no line
        if one.id not in kept:
            results.add("qa", "full@1", one)
    assert sorted(path.read_bytes().splitlines(keepends=True)) == LINES
