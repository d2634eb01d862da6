"""Anyone's own task: three shapes of public data, and what can be wrong with them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import custom, source
from benchmarks.custom import Custom
from benchmarks.source import NeedsDownload, no_downloads
from harness import runner
from kvmerge.errors import UserError
from tests.tiny_run import compose, read_lines

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "Read.\n{document}\nQuestion: {question}\n"


def written(path: Path, *rows: object, template: str = TEMPLATE) -> dict[str, str]:
    """Write rows in the file's format, and the template; give both as settings."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    prompt = path.with_name("prompt.txt")
    prompt.write_text(template, encoding="utf-8")
    return {"dataset": str(path), "template": str(prompt)}


def samples(benchmark: Custom):
    return benchmark.samples(benchmark.tasks[0])


# --- three shapes


def test_nested_answers_in_the_manner_of_squad(tmp_path):
    row = {
        "id": "56be",
        "title": "Mills",
        "context": "Built in 1804.\r\n\u2028 It {stood}.",
        "question": "When?",
        "answers": {"text": ["1804", "in 1804"], "answer_start": [9, 6]},
    }
    settings = written(tmp_path / "q.jsonl", row, template="{{T}} {title}: {context} {question}")
    benchmark = Custom(**settings, answers="answers.text", id="id", max_new_tokens=8)
    (sample,) = samples(benchmark)
    assert sample.id == "56be"
    assert sample.prompt == "{T} Mills: Built in 1804.\r\n\u2028 It {stood}. When?"
    assert sample.answers == ("1804", "in 1804")
    task = benchmark.tasks[0]
    assert benchmark.score(sample, task, "1804") == {"score": 1.0}
    assert (benchmark.name, task.metric.name, task.max_new_tokens, task.chat) == ("q", "qa_f1", 8, True)


def test_lists_of_lists_in_the_manner_of_hotpotqa(tmp_path):
    row = {
        "question": "Who?",
        "context": {"title": ["A", "B"], "sentences": [["a1.", "a2."], ["b1."]]},
        "answer": "B",
    }
    settings = written(tmp_path / "h.parquet", row, template="{context.sentences}\n{question}")
    (sample,) = samples(Custom(**settings, answers="answer"))
    assert sample.prompt == "a1. a2.\nb1.\nWho?"
    assert (sample.id, sample.answers) == ("0", ("B",))


def test_a_table_with_a_column_of_answers(tmp_path):
    rows = [
        {"document": 'He said, "no"\nand left', "question": "N/A", "answer": "007"},
        {"document": "é" * 200_000, "question": "null", "answer": "1.50"},
    ]
    benchmark = Custom(**written(tmp_path / "t.csv", *rows), answers="answer", metric="number")
    first, second = samples(benchmark)
    assert first.prompt == 'Read.\nHe said, "no"\nand left\nQuestion: N/A\n'
    assert [first.answers, second.answers] == [("007",), ("1.50",)]
    assert second.prompt == f"Read.\n{'é' * 200_000}\nQuestion: null\n"


def test_a_run_compares_methods_on_it_and_resumes(tmp_path):
    rows = [
        {"document": "mill " * 40, "question": f"{n}?", "label": label}
        for n, label in enumerate(("yes", "no"))
    ]
    given = written(tmp_path / "own.jsonl", *rows)
    command = [
        "model=tiny-random",
        "benchmark=custom",
        *(f"benchmark.{key}={value}" for key, value in given.items()),
        "benchmark.answers=label",
        "benchmark.metric=classification",
        "benchmark.classes=[yes,no]",
        "benchmark.max_new_tokens=4",
        "cells=[full@1,h2o@0.5]",
        f"output_dir={tmp_path / 'out'}",
    ]
    runner.run(compose(*command))
    lines = read_lines(tmp_path / "out")
    assert {key[:2] for key in lines} == {("own", "full@1"), ("own", "h2o@0.5")}
    assert len(lines) == 4
    assert all(0 <= line["score"] <= 1 for line in lines.values())
    Path(given["template"]).write_text(TEMPLATE + "!", encoding="utf-8")
    with pytest.raises(UserError, match=r"another data\.own"):
        runner.run(compose(*command))


def test_the_commands_of_the_documentation_compose(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "custom_benchmark.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```\npython run\.py (.*?)```", text, re.DOTALL)
    (row,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (prompt,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    (tmp_path / "questions.jsonl").write_text(row, encoding="utf-8")
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = compose(*shlex.split(first.replace("\\\n", " ")))
    (sample,) = settings.samples(settings.benchmark.tasks[0])
    assert sample.prompt.endswith("Question: When was the mill built?\nAnswer:\n")
    assert settings.benchmark.score(sample, settings.benchmark.tasks[0], "1804")["score"] == 1
    squad = compose(*shlex.split(second.replace("\\\n", " "))).benchmark
    assert squad.name == "rajpurkar-squad"


# --- datasets of the hub


def test_a_dataset_of_the_hub_is_asked_for_by_split_subset_and_revision(tmp_path, monkeypatch):
    asked = []

    def load(dataset, subset, *, split, revision):
        asked.append((dataset, subset, split, revision))
        return iter([{"document": "d", "question": "q", "answer": "a"}])

    monkeypatch.setattr(custom, "load_rows", load)
    template = written(tmp_path / "x.jsonl")["template"]
    benchmark = Custom("owner/name", template, "answer", split="test", subset="long", revision="f00")
    (sample,) = samples(benchmark)
    assert sample.prompt == "Read.\nd\nQuestion: q\n"
    assert asked == [("owner/name", "long", "test", "f00")]
    assert benchmark.name == "owner-name"
    assert benchmark.notes()[0].startswith("Rows of split test of owner/name")


def test_a_plan_downloads_nothing_and_asks_whether_a_run_could(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with no_downloads(), pytest.raises(UserError, match="HF_HUB_OFFLINE forbids to download it"):
        list(source.load_rows("owner/name", split="test"))
    monkeypatch.setattr(source, "_refusal", lambda *_: None)  # the hub has it
    with no_downloads(), pytest.raises(NeedsDownload, match="owner/name is not in the cache"):
        list(source.load_rows("owner/name", split="test"))


# --- what can be wrong


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dataset": None}, r"needs benchmark\.dataset=;"),
        ({"answers": ""}, r"needs benchmark\.answers=;"),
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl is not there"),
        ({"dataset": "./data"}, "is not there, or is not a file"),
        ({"dataset": "owner/name"}, "give benchmark.split= as well"),
        ({"split": "test"}, "is a file, which has no split"),
        ({"template": "nowhere.txt"}, "cannot read nowhere.txt"),
        ({"metric": "bleu"}, "unknown metric 'bleu'"),
        ({"metric": "perplexity"}, "perplexity judges no answers"),
        ({"metric": "unscored"}, "unscored judges no answers"),
        ({"metric": "classification"}, r"needs benchmark\.classes="),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_before_anything_is_read(tmp_path, changes, why):
    row = {"document": "d", "question": "q", "answer": "a"}
    settings = {**written(tmp_path / "x.jsonl", row), "answers": "answer"} | changes
    with pytest.raises(UserError, match=why):
        Custom(**settings)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("no field", "names no {field}"),
        ("{}", "holds {}: name a field"),
        ("{document", "cannot be read as a template: expected '}'"),
        ("{nothing}", r"x\.jsonl, line 1: there is no field 'nothing'\. Found: document, question"),
        ("{document.more}", "there is no field 'document.more'. Found: 'd'"),
        ("{table}", "field 'table' must be a text, a number or a list of them, got {'x': 1}"),
    ],
)
def test_a_template_that_does_not_fit_is_named(tmp_path, template, why):
    row = {"document": "d", "question": "q", "answer": "a", "table": {"x": 1}}
    settings = written(tmp_path / "x.jsonl", row, template=template)
    with pytest.raises(UserError, match=why):
        samples(Custom(**settings, answers="answer"))


@pytest.mark.parametrize(
    ("rows", "settings", "why"),
    [
        ([{"answer": None}], {}, "line 1: field 'answer' must be a text, a number or a list"),
        ([{"answer": [["a"]]}], {}, "answers in 'answer' must be a text or a list of texts"),
        ([{"answer": True}], {}, "must be a text, a number or a list of them, got True"),
        ([{"answer": "\ud800"}], {}, r"line 1: field 'answer' must be a text.*, got '\\ud800'"),
        ([{"document": json.loads("[" * 500 + "]" * 500), "answer": "x"}], {}, "'document' must be a"),
        ([{"name": None}], {"id": "name"}, "line 1: field 'name' must be a text.*, got None"),
        ([{"answer": "x"}, {"reply": "y"}], {}, "line 2: there is no field 'answer'"),
        ([{"answer": "60"}], {"metric": "exp_similarity"}, "exp_similarity cannot score against"),
        ([{"answer": "x", "id": "a"}] * 2, {"id": "id"}, "line 2: id 'a' is already that of .*line 1"),
        ([], {}, "holds no rows"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, rows, settings, why):
    rows = [{"document": "d", "question": "q", **row} for row in rows]
    given = written(tmp_path / "x.jsonl", *rows)
    with pytest.raises(UserError, match=why):
        samples(Custom(**given, answers="answer", **settings))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("x.jsonl", b'{"document": ', "line 1: not valid JSON"),
        ("x.csv", b"", "first line must name the columns"),
        ("x.csv", b"document,document\n", "each once"),
        ("x.csv", b"document,question,answer\na,b,c,d\n", "line 2: 4 values for 3 columns"),
        ("x.csv", b"document,question,answer\na,b\n", "line 2: 2 values for 3 columns"),
        ("x.csv", b'document,question,answer\na,b,"c\n', "not valid CSV"),
        ("x.csv", b"document,question,answer\n", "holds no rows"),
        ("x.csv", b"document,question,answer\n\xff,b,c\n", "line 2: not UTF-8"),
        ("x.parquet", b"PAR1", "cannot read .*x.parquet: "),
        ("x.txt", b"text", "must be one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, why):
    settings = written(tmp_path / "other.jsonl")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=why):
        samples(Custom(**settings | {"dataset": str(path)}, answers="answer"))
