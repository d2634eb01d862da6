"""Records of another run are told by their prompts."""

from __future__ import annotations

from pathlib import Path

from harness.foreign import foreign_records
from harness.prompts import Prompt, prompt_path
from harness.records import append_record, prediction_path
from tests.synthetic_run import record, write_run


def folder(tmp_path: Path, other: str = "beef") -> Path:
    own, strange = record("a", 0.5), record("b", 0.5, prompt_hash=other)
    cells = {"full@1": {"qa": [own, record("b", 0.5)]}, "h2o@0.5": {"qa": [own, strange]}}
    return write_run(tmp_path, {"qa": "qa_f1"}, cells)


def add_prompt(run: Path, sample: str, prompt_hash: str = "cafe") -> None:
    prompt = Prompt(id=sample, prompt_hash=prompt_hash, prompt_tokens=3, head="x", tail="")
    append_record(prompt_path(run, "qa"), prompt)


def test_a_run_of_one_prompt_a_sample_has_none(tmp_path: Path) -> None:
    assert foreign_records(folder(tmp_path, "cafe")) == []


def test_the_prompt_that_was_written_down_is_the_runs_own(tmp_path: Path) -> None:
    run = folder(tmp_path)
    add_prompt(run, "b")
    (found,) = foreign_records(run)
    assert (found.path, found.numbers) == (prediction_path(run, "qa", "h2o@0.5"), (2,))
    assert str(found).endswith(
        "line 2: sample 'b' was made with the prompt beef, and this run's is cafe: of another run"
    )


def test_where_nothing_tells_both_sides_are_named(tmp_path: Path) -> None:
    run = folder(tmp_path)
    assert {(one.prompt_hash, one.own) for one in foreign_records(run)} == {
        ("cafe", None),
        ("beef", None),
    }
    add_prompt(run, "b")
    add_prompt(run, "b", "beef")
    assert len(foreign_records(run)) == 2


def test_what_else_is_wrong_with_a_file_hides_nothing(tmp_path: Path) -> None:
    run = folder(tmp_path)
    add_prompt(run, "b")
    with prediction_path(run, "qa", "h2o@0.5").open("a") as file:
        file.write("garbage\n{")
    assert [one.numbers for one in foreign_records(run)] == [(2,)]
