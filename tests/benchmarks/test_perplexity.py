from __future__ import annotations

import math

import pytest

from benchmarks.perplexity import PERPLEXITY, Perplexity
from benchmarks.task import PromptFormat
from kvmerge.errors import UserError

FMT = PromptFormat(max_length=10)
PARAGRAPHS = [f"Paragraph {number} says that {number} follows {number - 1}." for number in range(100)]
TEXT = "\n\n".join(PARAGRAPHS)


class Characters:
    """One token a character, and one for the beginning."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [0, *map(ord, text)]}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_passages_start_at_paragraphs_spread_evenly_and_cover_the_text(book):
    benchmark = Perplexity(book, samples=7)
    samples = benchmark.samples(benchmark.tasks[0])
    assert "".join(sample.prompt for sample in samples) == TEXT
    assert len({sample.id for sample in samples}) == 7
    for number, sample in enumerate(samples):
        start = TEXT.index(sample.prompt)
        assert sample.prompt.startswith("Paragraph ")
        assert 0 <= start - len(TEXT) * number // 7 <= max(map(len, PARAGRAPHS)) + 2


def test_a_text_without_paragraphs_is_cut_where_the_parts_begin(tmp_path):
    (tmp_path / "line.txt").write_text("abcdefghij")
    benchmark = Perplexity(str(tmp_path / "line.txt"), samples=5)
    assert [s.prompt for s in benchmark.samples(benchmark.tasks[0])] == ["ab", "cd", "ef", "gh", "ij"]


def test_the_first_tokens_are_the_prompt_and_the_next_are_scored(book):
    benchmark = Perplexity(book, prompt_tokens=20, scored_tokens=9, samples=2)
    (task,) = benchmark.tasks
    for sample in benchmark.samples(task):
        encoded = benchmark.encode(sample, task, Characters(), FMT)
        assert encoded.prompt == [0, *map(ord, sample.prompt[:19])]
        assert encoded.continuation == [*map(ord, sample.prompt[19:28])]
        assert sample.tokens == 20
        assert sample.answers == ()
    assert task.metric.name == "perplexity"
    assert task.max_new_tokens == 9


def test_what_does_not_fit_is_refused_with_its_numbers(book):
    benchmark = Perplexity(book, prompt_tokens=2000, scored_tokens=900, samples=2)
    (task,) = benchmark.tasks
    sample = benchmark.samples(task)[0]
    with pytest.raises(UserError, match=r"need 2900 tokens, passage 000 of .*book\.txt has \d+"):
        benchmark.encode(sample, task, Characters(), FMT)
    with pytest.raises(UserError, match="need 2900 tokens, the model has 2899 positions"):
        benchmark.encode(sample, task, Characters(), PromptFormat(10, context=2899))


@pytest.mark.parametrize("key", ["prompt_tokens", "scored_tokens", "samples"])
@pytest.mark.parametrize("value", [0, -3, 1.5, math.nan, True, "5"])
def test_counts_are_whole_and_positive(key, value):
    with pytest.raises(UserError, match=f"benchmark.{key}="):
        Perplexity(**{key: value})


def test_the_fingerprint_follows_the_text(book, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT + ".")
    prints = [Perplexity(source).fingerprint() for source in (book, str(tmp_path / "other.txt"))]
    assert prints[0].keys() == prints[1].keys() == {"continuation"}
    assert prints[0] != prints[1]


def test_the_default_text_is_long_enough_for_its_passages():
    benchmark = Perplexity()
    samples = benchmark.samples(benchmark.tasks[0])
    assert len(samples) == 16
    # Prose has more than 2.5 characters a token in any tokenizer made for English.
    assert min(len(sample.prompt) for sample in samples) > 2.5 * (1024 + 512)
    assert any("Python" in note for note in benchmark.notes())


@pytest.mark.parametrize(("nll", "score"), [(0.0, 1.0), (20.0, math.e**2), (1e6, math.inf)])
def test_a_perplexity_beyond_any_float_is_infinite(nll, score):
    marks = PERPLEXITY.sample(nll, 10)
    assert marks == {"score": pytest.approx(score), "nll": nll, "tokens": 10}
    assert math.isnan(PERPLEXITY.sample(math.nan, 10)["score"])
