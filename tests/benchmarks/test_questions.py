"""Where the question of a prompt begins, in its text and in its tokens."""

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.longbench.tasks import TASKS as LONGBENCH
from benchmarks.longbench.tasks import template
from benchmarks.mini import template as mini_template
from benchmarks.mini.tasks import TASKS as MINI
from benchmarks.needle.tasks import template as needle_template
from benchmarks.questions import after_context, question_start
from benchmarks.zero_scrolls.benchmark import ZeroScrolls
from kvmerge.errors import UserError
from tests import real_tokenizers
from tests.real_tokenizers import BENCHMARKS, TOKENIZERS, load_tokenizer, tokenizer_folder
from tests.tiny_run import save_checkpoint

MODELS = ("llama2-7b-chat", "mistral-7b-instruct-v0.2", "llama3.1-8b-instruct", "qwen3-8b")
"""One of each vocabulary."""
EVERY = 12
"""Rows of which one is looked at: the others are of the same templates."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_checkpoint(tmp_path_factory.mktemp("tokenizer")))


def test_the_question_is_what_follows_the_context():
    found = after_context("Read.\n{context}\n\nQ: {input}\nA:", {"input": "who?", "context": "x"})
    assert found == "Q: who?\nA:"


def test_blanks_after_the_context_are_no_question():
    assert after_context("{context}\n{input}", {"input": "   "}) is None


@pytest.mark.parametrize("task", LONGBENCH, ids=lambda task: task.name)
def test_every_template_of_longbench_has_its_question_after_the_context(task):
    before, _, after = template(task.name).partition("{context}")
    assert "{input}" not in before
    assert after.strip()


def test_templates_that_are_built_here_have_a_question_but_for_code():
    without = [task.name for task in MINI if after_context(mini_template(task.name)) is None]
    assert without == []  # {input} is blank in each row of code_completion
    assert after_context(needle_template().replace("{question}", "Why?")).endswith("Why?\nAnswer:")


@pytest.mark.parametrize(
    ("context", "question"),
    [
        ("The mill stood still.", "Who built the bridge?"),
        ("The mill stood still. Who built the bridge? Nobody.", "Who built the bridge?"),
        ("读取文件", "问题：谁"),
        ("x" * 300, "y" * 200),
    ],
    ids=["plain", "again", "bytes", "long"],
)
def test_tokens_before_the_start_are_of_the_context_alone(tokenizer, context, question):
    ids = tokenizer(f"{context} {question}</s>")["input_ids"]
    start = question_start(tokenizer, ids, question)
    assert question in tokenizer.decode(ids[start:])
    assert question not in tokenizer.decode(ids[start + 1 :])
    assert tokenizer.decode(ids[:start]).removeprefix("<s>").rstrip() == context


def test_a_token_of_both_is_the_questions(tokenizer):
    (token,) = tokenizer("question", add_special_tokens=False)["input_ids"][-1:]
    assert len(tokenizer.decode([token])) > 1
    asked = tokenizer.decode([token])[1:] + "?"
    ids = [*tokenizer("The old")["input_ids"], token, *tokenizer("?")["input_ids"][1:]]
    assert question_start(tokenizer, ids, asked) == len(ids) - 2


def test_of_a_question_that_was_cut_the_rest_counts(tokenizer):
    question = "def read(path): " * 8
    ids = tokenizer("The bridge." + question[40:])["input_ids"]
    start = question_start(tokenizer, ids, question.strip())
    assert tokenizer.decode(ids[:start]) == "<s>The bridge."


@pytest.mark.parametrize(
    "text",
    [
        "Who built the bridge, and when?",
        "Nothing at all",
        "A river. Who built the bridge, and when was",
    ],
    ids=["alone", "other", "head"],
)
def test_a_prompt_without_a_context_before_its_question_is_refused(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = "Who built the bridge, and when was it built? Zzz"
    if text.startswith("Who"):
        asked = text
    with pytest.raises(UserError, match="no context is left before the question"):
        question_start(tokenizer, ids, asked)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_family_finds_the_questions_of_real_rows(model, benchmark):
    assert model in TOKENIZERS
    tokenizer = load_tokenizer(tokenizer_folder(model))
    for row in real_tokenizers.rows_fed(model, benchmark, every=EVERY):
        question = row.sample.question
        assert question, row.task.name
        start = question_start(tokenizer, row.ids, question)
        asked = tokenizer.decode(row.ids[start:])
        assert question[-40:] in asked
        assert 0 < start < len(row.ids)
        if not row.cut:
            assert question in asked
            assert question not in tokenizer.decode(row.ids[start + 1 :])


def test_summaries_of_zero_scrolls_have_no_question_under_the_chat_request(tmp_path):
    text = "Write a summary.\n\nReport:\nLong text.\n\nSummary:\n"
    place = text.index("Summary:\n")
    row = {
        "id": "a",
        "pid": "a_0",
        "input": text,
        "output": "Short.",
        "document_start_index": 18,
        "document_end_index": place - 2,
        "query_start_index": place,
        "query_end_index": place,
        "truncation_seperator": "... [omitted]\n\n",
    }
    (tmp_path / "gov_report.jsonl").write_text(json.dumps(row) + "\n")
    for chat, wanted in (("format_request", None), ("wrap", "Summary:")):
        benchmark = ZeroScrolls(data_dir=str(tmp_path), tasks=["gov_report"], chat=chat)
        (sample,) = benchmark.samples(benchmark.tasks[0])
        assert sample.question == wanted
