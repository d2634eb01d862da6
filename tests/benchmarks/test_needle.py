from __future__ import annotations

import re

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from benchmarks.needle import score
from benchmarks.needle.benchmark import BUFFER, Needle
from benchmarks.needle.haystack import book_ids, hide, insertion_point
from benchmarks.needle.tasks import SANDWICH, SANDWICH_EXPECTED, TASKS, fact, template
from benchmarks.rows import sha256
from benchmarks.task import PromptFormat
from kvmerge.errors import UserError
from kvmerge.places import config_dir

TASK = {task.name: task for task in TASKS}
FMT = PromptFormat(max_length=3500)
SENTENCES = [f"Sentence {number} of this book says {number * number}." for number in range(400)]
BOOK = "\n\n".join(" ".join(SENTENCES[i : i + 4]) for i in range(0, 400, 4))


class Characters:
    """One token a character, and one for the beginning where special tokens are added."""

    def __call__(self, text: str, add_special_tokens: bool, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [*map(ord, text)]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(token) for token in ids if token)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def text_of(prompt: str) -> str:
    """What stands between the marks of the book."""
    return prompt.partition("<book> ")[2].rpartition(" </book>")[0]


# Scores


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The secret number for Oslo is 1234567.", 1),
        ("1234567", 1),
        ("It is 1234567, not 7654321.", 1),
        ("7654321 or 1234567", 0),
        ("12345678", 0),
        ("123456", 0),
        ("1,234,567", 0),
        ("no number", 0),
        ("", 0),
    ],
)
def test_the_first_digits_must_be_the_number(prediction, expected):
    assert score("number", prediction, "1234567") == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("eat a sandwich in the park", 5 / 11),
        ("EAT a a a", 2 / 11),
        ("day", 0),
        ("on a sunny day.", 4 / 11),
        (SANDWICH, 1),
        ("", 0),
    ],
)
def test_recall_counts_different_words_split_at_white_space(prediction, expected):
    assert score("sandwich_recall", prediction, SANDWICH_EXPECTED) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (SANDWICH, 1),
        ("eating sandwiches", 2 * 2 / (2 + 21)),  # two stems of the needle's 21 words
        ("qqq", 0),
        ("", 0),
    ],
)
def test_rouge_is_against_the_whole_needle(prediction, expected):
    assert score("sandwich_rouge1", prediction, SANDWICH) == pytest.approx(expected)


def test_a_right_short_answer_has_full_recall_and_less_rouge():
    answer = "Eat a sandwich and sit in Dolores Park on a sunny day."
    assert score("sandwich_recall", answer, SANDWICH_EXPECTED) == 1
    assert 0.5 < score("sandwich_rouge1", answer, SANDWICH) < 0.8


def test_an_unknown_task_is_an_error():
    with pytest.raises(UserError, match="unknown needle task 'numbr'"):
        score("numbr", "1", "1")


# What is hidden


def test_the_facts_are_the_same_everywhere():
    answers = [fact(TASK["number"], *cell).answer for cell in ((512, 0, 0), (512, 0, 1), (1024, 50, 4))]
    assert answers == ["9642992", "3397090", "8013871"]


def test_a_number_is_in_its_sentence_and_not_in_its_question():
    for repeat in range(50):
        asked = fact(TASK["number"], 512, 50, repeat)
        assert re.fullmatch(r"[1-9]\d{6}", asked.answer)
        city = re.fullmatch(rf"The secret number for (\w+) is {asked.answer}\.", asked.sentence)[1]
        assert asked.question == f"What is the secret number for {city}?"


def test_each_sample_has_a_number_of_its_own():
    samples = Needle().samples(TASK["number"])
    assert len({sample.answers for sample in samples}) == len(samples) == 4 * 11 * 5


@pytest.mark.parametrize(
    ("task", "answer"), [("sandwich_recall", SANDWICH_EXPECTED), ("sandwich_rouge1", SANDWICH)]
)
def test_the_sandwich_has_the_same_prompts_and_two_scores(task, answer):
    benchmark = Needle(repeats=1)
    samples = benchmark.samples(TASK[task])
    other = benchmark.samples(TASK["sandwich_recall"])
    assert [sample.prompt for sample in samples] == [sample.prompt for sample in other]
    assert {sample.row["needle"] for sample in samples} == {SANDWICH}
    assert {sample.answers for sample in samples} == {(answer,)}


# Where it goes


@given(
    st.lists(st.sampled_from("ab."), max_size=40).map("".join),
    st.integers(0, 100),
)
def test_the_cut_moves_back_to_the_last_full_stop(text, depth):
    ids = [*map(ord, text)]
    found = insertion_point(ids, depth, lambda token: chr(token) == ".")
    if depth == 100:
        assert found == len(ids)
    else:
        ends = [cut for cut in range(1, int(len(ids) * depth / 100) + 1) if text[cut - 1] == "."]
        assert found == max(ends, default=0)


@given(st.text("ab. ", min_size=1, max_size=20), st.integers(0, 19), st.integers(1, 300))
def test_a_book_starts_where_it_is_told_and_begins_anew_at_the_end(text, start, count):
    start %= len(text)
    endless = text[start:] + text * (count + 1)
    ids = book_ids(Characters(), text, start, count)
    assert "".join(map(chr, ids)) == endless[:count]


def test_text_with_many_characters_a_token_is_read_further():
    class Words(Characters):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split()]}

    assert book_ids(Words(), "x" * 99 + " ", 0, 50) == [99] * 50


def test_full_stops_are_told_by_what_tokens_decode_to():
    class Marked(Characters):
        def decode(self, ids: list[int], **_: object) -> str:
            return {1: ".", 2: " .", 3: "e.", 4: ".a", 5: "..."}[ids[0]]

    assert hide(Marked(), [3, 1, 4, 5], [9], 90) == [3, 1, 9, 4, 5]
    assert hide(Marked(), [2, 3, 5, 4], [9], 90) == [2, 9, 3, 5, 4]
    assert hide(Marked(), [3, 4, 5, 4], [9], 90) == [9, 3, 4, 5, 4]


# Prompts


def test_the_template_is_the_recipes():
    assert sha256(template().encode()) == (
        "1f7e27927c4358580e2b5ee1f8cc9da4f2ea6c59a7bccc73fe8acc9e82cf9309"
    )


@pytest.mark.parametrize("depth", [0, 35, 100])
@pytest.mark.parametrize("name", TASK)
def test_the_needle_stands_in_its_text_at_its_depth(book, tokenizer, name, depth):
    benchmark = Needle([name], book, lengths=[700], depths=[depth], repeats=2)
    (task,) = benchmark.tasks
    for sample in benchmark.samples(task):
        prompt = tokenizer.decode(benchmark.encode(sample, task, tokenizer, FMT).prompt)
        before, _, after = text_of(prompt).partition(f"\n{sample.row['needle']}\n")
        haystack = before + after
        assert len(before) == pytest.approx(depth / 100 * len(haystack), abs=60)
        assert before.endswith(".") or depth in (0, 100)
        assert (before == "") == (depth == 0)
        assert (after == "") == (depth == 100)
        # Nothing of the text is lost where the needle was put in.
        start = 0 if sample.row["repeat"] == 0 else (BOOK + BOOK).index(haystack[:60])
        assert (BOOK + BOOK)[start:].startswith(haystack)


@pytest.mark.parametrize("length", [400, 1500])
def test_text_and_needle_fill_all_but_the_buffer(book, length):
    benchmark = Needle(["number"], book, lengths=[length], depths=[50], repeats=1)
    (sample,) = benchmark.samples(TASK["number"])
    fmt = PromptFormat(3500, chat="none")
    ids = benchmark.encode(sample, TASK["number"], Characters(), fmt).prompt
    assert len(text_of(Characters().decode(ids))) == length - BUFFER
    assert len(ids) <= length
    assert sample.tokens == length


def test_the_question_stands_behind_the_text_in_the_chat_format(book, tokenizer):
    benchmark = Needle(["number"], book, lengths=[400], depths=[50], repeats=1)
    (sample,) = benchmark.samples(TASK["number"])
    fmt = PromptFormat(3500, chat="[INST]{prompt}[/INST]")
    prompt = tokenizer.decode(benchmark.encode(sample, TASK["number"], tokenizer, fmt).prompt)
    question = fact(TASK["number"], 400, 50, 0).question
    assert prompt.endswith(
        f"</book>.\n Based on the content of the book, Question: {question}\nAnswer:[/INST]"
    )
    assert "[INST]This is a very long story book: <book> Sentence 0" in prompt


def test_each_repeat_reads_from_another_paragraph(book, tokenizer):
    benchmark = Needle(["number"], book, lengths=[400], depths=[100], repeats=5)
    prompts = [
        tokenizer.decode(benchmark.encode(sample, TASK["number"], tokenizer, FMT).prompt)
        for sample in benchmark.samples(TASK["number"])
    ]
    first = [int(re.match(r"Sentence (\d+) ", text_of(prompt))[1]) for prompt in prompts]
    assert first[0] == 0
    assert len(set(first)) == 5
    assert all(number % 4 == 0 for number in first)


def test_braces_in_the_text_are_left_alone(tmp_path, tokenizer):
    (tmp_path / "code.txt").write_text("Take {context} and {question} {0}. " * 30)
    benchmark = Needle(["number"], str(tmp_path / "code.txt"), lengths=[400], depths=[100], repeats=1)
    (sample,) = benchmark.samples(TASK["number"])
    prompt = tokenizer.decode(benchmark.encode(sample, TASK["number"], tokenizer, FMT).prompt)
    assert text_of(prompt).startswith("Take {context} and {question} {0}. Take {context}")


def test_the_answer_is_short_and_ends_at_a_newline():
    for task in TASKS:
        assert (task.max_new_tokens, task.stop_at_newline, task.min_new_tokens) == (30, True, 0)


# Samples


def test_a_limit_takes_whole_grids_first():
    benchmark = Needle(lengths=[300, 400], depths=[0, 50, 100], repeats=2)
    samples = benchmark.samples(TASK["number"])
    grid = [{"length": length, "depth": depth} for length in (300, 400) for depth in (0, 50, 100)]
    assert [dict(sample.groups) for sample in samples] == grid + grid
    assert len({sample.id for sample in samples}) == 12


def test_more_repeats_leave_the_first_ones_as_they_are(book, tokenizer):
    few, many = (Needle(["number"], book, lengths=[300], depths=[50], repeats=n) for n in (2, 5))
    for ours, theirs in zip(few.samples(TASK["number"]), many.samples(TASK["number"]), strict=False):
        assert ours == theirs
        encoded = [one.encode(ours, TASK["number"], tokenizer, FMT) for one in (few, many)]
        assert encoded[0] == encoded[1]


def test_the_score_is_that_of_the_samples_answer():
    benchmark = Needle(repeats=1)
    sample = benchmark.samples(TASK["number"])[3]
    assert benchmark.score(sample, TASK["number"], f"It is {sample.answers[0]}") == {"score": 1}
    assert benchmark.score(sample, TASK["number"], "It is 5") == {"score": 0}


# Settings


def test_a_length_beyond_the_models_context_is_refused_at_once(book):
    benchmark = Needle(["number"], book, lengths=[300, 4067], repeats=1)
    first = benchmark.samples(TASK["number"])[0]
    with pytest.raises(UserError, match=r"4067 is too long .* 4096 positions, 30 of .* up to 4066"):
        benchmark.encode(first, TASK["number"], Characters(), PromptFormat(3500, context=4096))
    fits = PromptFormat(3500, chat="none", context=4097)
    assert benchmark.encode(first, TASK["number"], Characters(), fits).prompt


def test_a_length_without_room_for_text_is_refused(book):
    benchmark = Needle(["number"], book, lengths=[BUFFER + 20])
    sample = benchmark.samples(TASK["number"])[0]
    taken = len(sample.row["needle"]) + 2
    with pytest.raises(UserError, match=f"220 leaves no room .* Give lengths above {BUFFER + taken}"):
        benchmark.encode(sample, TASK["number"], Characters(), FMT)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lengths", []),
        ("lengths", 512),
        ("lengths", "512"),
        ("lengths", [200]),
        ("lengths", [512.0]),
        ("lengths", [512, 512]),
        ("depths", [-1]),
        ("depths", [101]),
        ("depths", [True]),
        ("repeats", 0),
        ("repeats", 1.5),
    ],
)
def test_settings_out_of_range_are_named(key, value):
    with pytest.raises(UserError, match=f"benchmark.{key}="):
        Needle(**{key: value})


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="unknown needle task 'passkey'"):
        Needle(["passkey"])


def test_the_default_is_the_number_on_the_whole_grid():
    config = OmegaConf.load(config_dir() / "benchmark" / "needle.yaml")
    benchmark = instantiate(config, _convert_="all")
    assert [task.name for task in benchmark.tasks] == ["number"]
    assert len(benchmark.samples(TASK["number"])) == 220
    assert [task.name for task in Needle().tasks] == list(TASK)


def test_the_fingerprint_follows_the_text(book, tmp_path):
    (tmp_path / "other.txt").write_text(BOOK + ".")
    prints = [
        Needle(["number"], source).fingerprint() for source in (book, str(tmp_path / "other.txt"))
    ]
    assert prints[0] == {"number": sha256(BOOK.encode())}
    assert prints[1].keys() == {"number"}
    assert prints[0] != prints[1]


def test_notes_say_what_the_needle_is_hidden_in_and_what_rouge_means(book):
    (note,) = Needle(["number"], book).notes()
    assert book in note
    assert any("Python" in note for note in Needle(["number"]).notes())
    assert any("times 10" in note for note in Needle(None, book).notes())
