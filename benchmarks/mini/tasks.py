"""The tasks of the mini benchmark, and how one sample of each is made.

A maker takes a seeded generator and the room that context and input should fill together, as
`text.size` counts. What it asks for stands in the first seven eighths of the context, out of reach
of a recent window, and takes several tokens: the first token of an answer follows from the prefill,
which no cache method changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

from benchmarks.longbench.metrics import CLASSIFICATION, CODE_SIM, COUNT, QA_F1, RETRIEVAL, ROUGE_L
from benchmarks.mini.words import (
    ADJECTIVES,
    BUILDINGS,
    FACTS,
    FIRST_NAMES,
    LAST_NAMES,
    NOUNS,
    QUESTIONS,
    TOWNS,
)
from benchmarks.package_text import FOLDERS, code, docstrings, paragraphs, sentences, size
from benchmarks.task import Task


@dataclass(frozen=True)
class Made:
    """What a maker makes of a row; the builder adds the rest."""

    context: str
    input: str
    answer: str
    all_classes: Sequence[str] | None = None


def passkey(rng: Random, room: int) -> Made:
    """Ask for one of three seven-digit keys that are hidden in prose."""
    adjectives, nouns = rng.sample(ADJECTIVES, 3), rng.sample(NOUNS, 3)
    things = [f"{adjective} {noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
    keys = [str(key) for key in rng.sample(range(1_000_000, 10_000_000), 3)]
    facts = [
        f"The pass key of the {thing} is {key}. Remember it."
        for thing, key in zip(things, keys, strict=True)
    ]
    return Made(_hide(rng, facts, room), things[0], keys[0])


def key_values(rng: Random, room: int) -> list[Made]:
    """Ask for the description of each early function, in a list of functions."""
    names = {
        doc.paragraphs[0]: doc.name
        for doc in docstrings(*FOLDERS)
        if "_" in doc.name.strip("_")
        and 50 < len(doc.paragraphs[0]) < 100
        # Many descriptions begin so; a wrong one would get a part of the score.
        and not doc.paragraphs[0].startswith("Return")
    }
    described = {name: text for text, name in names.items()}
    lines = _fill(rng, (f"- {name}: {text}" for name, text in described.items()), room)
    entries = [line.removeprefix("- ").partition(": ") for line in _early(lines)]
    return [Made("\n".join(lines), name, text) for name, _, text in entries]


def passage_retrievals(rng: Random, room: int) -> list[Made]:
    """Ask for the number of each early paragraph that a sentence of its own ends."""
    prose = paragraphs(*FOLDERS)
    ids = rng.sample(range(1000, 10_000), len(prose))
    lines = _fill(rng, (f"{p} [Paragraph {i}]" for p, i in zip(prose, ids, strict=True)), room)
    context = "\n".join(lines)
    ends = [
        (sentences(text)[-1], label.removesuffix("]"))
        for text, _, label in (line.partition(" [") for line in _early(lines))
    ]
    return [Made(context, *end) for end in ends if size(end[0]) > 10 and context.count(end[0]) == 1]


def passage_qas(rng: Random, room: int) -> list[Made]:
    """Ask for the person in each of six facts that are stated between unrelated passages."""
    places = [f"{town} {rng.choice(BUILDINGS)}" for town in rng.sample(TOWNS, 6)]
    first, last = rng.sample(FIRST_NAMES, 12), rng.sample(LAST_NAMES, 6)
    people = [" ".join(names) for names in zip(first[:6], first[6:], last, strict=True)]
    asked = [
        (question.format(place=place), beginning.format(place=place))
        for place, (question, beginning) in ((place, rng.choice(FACTS)) for place in places)
    ]
    facts = [f"{beginning} {who}." for (_, beginning), who in zip(asked, people, strict=True)]
    context = _hide(rng, facts, room)

    def ask(fact: int) -> Made:
        (question, beginning), who = asked[fact], people[fact]
        example, example_beginning = asked[(fact + 1) % 6]
        return Made(
            context,
            f"{example}\nAnswer: {example_beginning} {people[(fact + 1) % 6]}\n\n"
            f"Question: {question}\nAnswer: {beginning}",
            who,
        )

    return [ask(fact) for fact in range(6)]


def classification(rng: Random, room: int) -> Made:
    """Ask what a question asks for, after examples of every class."""
    labels = list(QUESTIONS)
    label = rng.choice(labels)
    asked = _question(rng, label)
    examples: list[str] = []
    while room > 0:
        for name in rng.sample(labels, len(labels)):
            examples.append(f"Question: {_question(rng, name)}\nType: {name}")
            room -= size(examples[-1]) + 1
    return Made("\n\n".join(examples), asked, label, labels)


def quotations(rng: Random, room: int) -> list[Made]:
    """Ask how each early sentence of the text goes on."""
    lines = _fill(rng, paragraphs(*FOLDERS), room)
    context = "\n".join(lines)
    words = [sentence.split() for line in _early(lines) for sentence in sentences(line)]
    halves = [(" ".join(w[:-12]), " ".join(w[-12:])) for w in words if 18 <= len(w) <= 24]
    return [Made(context, *half) for half in halves if context.count(half[0]) == 1]


def code_completion(rng: Random, room: int) -> Made:
    """Ask for the next line of a source file: one that followed the same line before."""
    lines, line = rng.choice(_repeated_lines(room))
    # All of the indentation but one space, which tokenizers keep with the word after it.
    indent = line[: max(0, len(line) - len(line.lstrip()) - 1)]
    return Made("\n".join(lines), indent, line.removeprefix(indent))


Maker = Callable[[Random, int], Made]
Asker = Callable[[Random, int], list[Made]]
"""Makes all questions of one context."""


def _any(asker: Asker) -> Maker:
    """Return a maker that asks one of the questions of a context."""
    return lambda rng, room: rng.choice(asker(rng, room))


# All but passkey are texts to go on with, not requests to a chat model.
_ONE_LINE: dict[str, Any] = {"chat": False, "stop_at_newline": True, "min_new_tokens": 1}
_LINE: dict[str, Any] = {**_ONE_LINE, "first_line": True}

_KEY_VALUE = Task("key_value", ROUGE_L, 24, **_LINE)
_PASSAGE_RETRIEVAL = Task("passage_retrieval", RETRIEVAL, 12, **_LINE)
_PASSAGE_QA = Task("passage_qa", QA_F1, 16, **_LINE)
_QUOTATION = Task("quotation", ROUGE_L, 24, **_LINE)

MAKERS: dict[Task, Maker] = {
    Task("passkey", COUNT, 24): passkey,
    _KEY_VALUE: _any(key_values),
    _PASSAGE_RETRIEVAL: _any(passage_retrievals),
    _PASSAGE_QA: lambda rng, room: passage_qas(rng, room)[0],  # its facts are drawn already
    Task("classification", CLASSIFICATION, 8, **_LINE): classification,
    _QUOTATION: _any(quotations),
    # No first-line rule: code_sim finds the line itself.
    Task("code_completion", CODE_SIM, 24, **_ONE_LINE): code_completion,
}
ASKERS: dict[Task, Asker] = {
    _KEY_VALUE: key_values,
    _PASSAGE_RETRIEVAL: passage_retrievals,
    _PASSAGE_QA: passage_qas,
    _QUOTATION: quotations,
}
"""The tasks whose contexts have several questions."""

TASKS = tuple(MAKERS)
SHARING_TASKS = tuple(ASKERS)


def _early(items: Sequence[str]) -> Sequence[str]:
    return items[: len(items) * 7 // 8]


def _fill(rng: Random, texts: Iterable[str], room: int) -> list[str]:
    """Draw texts, without replacement, until nothing more fits."""
    pool = list(texts)
    rng.shuffle(pool)
    chosen = []
    for text in pool:
        if size(text) < room:
            chosen.append(text)
            room -= size(text) + 1
    return chosen


def _hide(rng: Random, facts: Sequence[str], room: int) -> str:
    """Return prose with the facts in it, as paragraphs of their own."""
    lines = _fill(rng, paragraphs(*FOLDERS), room - size("\n".join(facts)))
    for fact in facts:
        lines.insert(1 + rng.randrange(len(_early(lines)) - 1), fact)
    return "\n".join(lines)


def _question(rng: Random, label: str) -> str:
    return rng.choice(QUESTIONS[label]).format(
        person=f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        thing=f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
        town=rng.choice(TOWNS),
    )


@functools.cache
def _repeated_lines(room: int) -> list[tuple[Sequence[str], str]]:
    """Return lines to ask for, each with the lines before it that fill the room."""
    found: list[tuple[Sequence[str], str]] = []
    for lines in code(*FOLDERS):
        sizes = [size(f"{line}\n") for line in lines]
        start = used = 0
        for i, line in enumerate(lines):
            while used > room:
                used -= sizes[start]
                start += 1
            before = lines[start:i]
            if start and _is_answer(line) and _follows_again(before, line):
                found.append((before, line))
            used += sizes[i]
    return found


def _is_answer(line: str) -> bool:
    """Return whether a line says enough, is short enough and is one that code_sim reads."""
    text = line.strip()
    return (
        text.isascii()
        and 28 <= len(text) <= 64
        and size(text) <= 16
        and not any(mark in text for mark in ("`", "#", "//", "@"))
    )


def _follows_again(before: Sequence[str], line: str) -> bool:
    """Return whether `line`, early in `before`, follows the same line as it does now."""
    early = _early(before)
    return any(pair == (before[-1], line) for pair in pairwise(early))
