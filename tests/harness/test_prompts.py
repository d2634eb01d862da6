"""Both ends of each prompt are written once a sample, and survive what records survive."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from harness.prompts import CHARACTERS, Prompt, prompt_path, read_prompts
from harness.report.run import load_run
from harness.results import Results
from harness.runner import run
from harness.settings import Settings
from kvmerge.errors import UserError
from scripts.records import main
from tests.tiny_run import TASKS, read_lines

Tiny = Callable[..., Settings]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    return found


def prompt(sample: str, head: str = "Who?") -> Prompt:
    return Prompt(id=sample, prompt_hash="cafe", prompt_tokens=9, head=head, tail="")


def test_a_short_prompt_is_kept_whole_with_its_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "<s>Who built the mill?\nIn 1801, 水車.</s>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = Prompt.of(tokenizer, "a", "cafe", ids)
    assert (found.head, found.tail, found.prompt_tokens) == (text, "", len(ids))


@pytest.mark.parametrize("words", [400, 20_000])
def test_of_a_long_prompt_both_ends_are_kept(tokenizer: PreTrainedTokenizerBase, words: int) -> None:
    text = "<s>" + " ".join(f"mill {i} stood" for i in range(words))
    found = Prompt.of(tokenizer, "a", "cafe", tokenizer.encode(text, add_special_tokens=False))
    assert found.head == text[:CHARACTERS]
    assert found.tail == text[-CHARACTERS:]


def test_a_run_writes_each_prompt_once_and_a_resumed_one_adds_none(tiny: Tiny) -> None:
    settings = tiny("benchmark.tasks=[qasper,trec]", "cells=[full@1]", "limit=2")
    folder = run(settings).folder
    before = prompt_path(folder, "qasper").read_bytes()
    run(tiny("benchmark.tasks=[qasper,trec]", "cells=[full@1,h2o@0.5]", "limit=2"))
    assert prompt_path(folder, "qasper").read_bytes() == before
    lines = [json.loads(line) for line in before.splitlines()]
    assert [line["id"] for line in lines] == ["qasper-0", "qasper-1"]
    for (task, _, _, sample), record in read_lines(folder).items():
        found = load_run(folder).prompts(task)[sample, record["prompt_hash"]]
        assert found.prompt_tokens == record["prompt_tokens"]
        assert found.head.startswith("<s>")
        assert "Bridge" in found.head


def test_shards_have_prompts_of_their_own_and_are_read_together(tiny: Tiny) -> None:
    for shard in range(2):
        run(tiny("cells=[full@1]", f"shard={shard}", "num_shards=2"))
    folder = tiny().output_dir
    assert {sample for sample, _ in load_run(folder).prompts(TASKS[0])} == {
        f"{TASKS[0]}-{number}" for number in range(3)
    }


def test_a_half_written_line_is_cut_off_and_a_damaged_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = prompt_path(tmp_path, "qa")
    path.parent.mkdir()
    path.write_text(f"{prompt('a').to_json()}\n[1]\n" + prompt("b").to_json()[:-9])
    assert [sample for sample, _ in read_prompts(path)] == ["a"]
    assert "line 2 is not a record" in caplog.text
    results = Results(tmp_path)
    results.add_prompt("qa", prompt("a"))
    results.add_prompt("qa", prompt("c", "a\u2028b"))
    found = read_prompts(path)
    assert [sample for sample, _ in found] == ["a", "c"]
    assert found["c", "cafe"].head == "a\u2028b"


def test_a_prompt_that_changed_is_kept_beside_the_earlier_one(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add_prompt("qa", prompt("a"))
    later = Prompt(id="a", prompt_hash="beef", prompt_tokens=9, head="What?", tail="")
    results.add_prompt("qa", later)
    assert read_prompts(prompt_path(tmp_path, "qa"))["a", "beef"] == later
    assert read_prompts(prompt_path(tmp_path, "qa"))["a", "cafe"] == prompt("a")


def test_a_task_that_cannot_name_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without /"):
        prompt_path(tmp_path, "../elsewhere")


def test_prompts_are_held_for_the_run_that_adds_to_them_and_not_for_who_looks_once(
    tmp_path: Path,
) -> None:
    Results(tmp_path).add_prompt("qa", prompt("a"))
    results = Results(tmp_path)
    assert results.prompts("qa", hold=False) == {("a", "cafe"): prompt("a")}
    results.add_prompt("qa", prompt("b"))
    assert results.prompts("qa", hold=False) is results.prompts("qa")
    assert [sample for sample, _ in results.prompts("qa")] == ["a", "b"]


def test_check_and_repair_know_the_prompts(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tiny("benchmark.tasks=[qasper]", "cells=[full@1]")).folder
    path = prompt_path(folder, "qasper")
    sound = path.read_bytes()
    path.write_bytes(b'{"id": 3}\n' + sound.replace(b'"prompt_tokens": ', b'"prompt_tokens": -', 1))
    assert main(["check", str(folder)]) == 1
    printed = capsys.readouterr().err
    assert f"{path}, line 1 is not a record: missing prompt_hash" in printed
    assert f"{path}, line 2 is not a record: prompt_tokens must be" in printed
    assert main(["repair", str(folder)]) == 0
    assert path.read_bytes() == b"".join(sound.splitlines(keepends=True)[1:])
    assert path.with_name("qasper.jsonl.damaged").exists()
