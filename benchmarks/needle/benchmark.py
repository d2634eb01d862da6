"""The needle test: every length with every depth, several times."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.encoding import encode_wrapped, tokens
from benchmarks.needle.haystack import book_ids, hide
from benchmarks.needle.tasks import TASKS, fact, template
from benchmarks.questions import after_context
from benchmarks.task import Encoded, PromptFormat, Sample, Task, choose_tasks
from benchmarks.texts import Text, read_text
from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUFFER = 200
"""Tokens of a length that text and needle leave to the template, the chat wrap and the answer."""

_GOLDEN = (5**0.5 - 1) / 2


class Needle:
    """The benchmark: every length with every depth, several times.

    Args:
        tasks: names of the tasks to run; None means all three.
        source: the text that the needle is hidden in (`benchmarks.texts.read_text`).
        hub: the file and its column, where `source` is `hub`.
        lengths: nominal lengths in tokens; text and needle fill all but `BUFFER` of them.
        depths: where in the text the needle is, in percent of the text's tokens.
        repeats: samples of each length and depth. The first reads the text from its beginning, each
            further one from another place.

    Raises UserError for a task that does not exist, and for a setting out of range.
    """

    name = "needle"

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        source: str = "stdlib",
        hub: Mapping[str, Any] | None = None,
        lengths: Sequence[int] = (512, 1024, 2048, 3500),
        depths: Sequence[int] = tuple(range(0, 101, 10)),
        repeats: int = 5,
    ) -> None:
        self.tasks = choose_tasks(TASKS, tasks, "needle")
        self.source = source
        self.hub = hub
        self.lengths = _numbers("lengths", lengths, range(BUFFER + 1, 2**31))
        self.depths = _numbers("depths", depths, range(101))
        (self.repeats,) = _numbers("repeats", [repeats], range(1, 2**31))

    def samples(self, task: Task) -> list[Sample]:
        """Return the samples of `task`: every length and depth once, then all of them again.

        So a run's `limit` takes whole grids first. The prompts still lack their text, at
        `{context}`: only a tokenizer can tell how much of it there is room for.
        """
        return [
            _sample(task, length, depth, repeat)
            for repeat in range(self.repeats)
            for length in self.lengths
            for depth in self.depths
        ]

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Hide the needle in its text, fill the template, wrap and tokenise.

        Raises UserError if a length of the run exceeds the model's context, and if one has no room
        for text.
        """
        self._check_context(task, fmt)
        length, depth, repeat = (sample.row[key] for key in ("length", "depth", "repeat"))
        needle = tokens(tokenizer, f"\n{sample.row['needle']}\n", add_special_tokens=False)
        room = length - BUFFER - len(needle)
        if room < 1:
            raise UserError(
                f"benchmark.lengths={list(self.lengths)}: {length} leaves no room for text beside "
                f"{len(needle)} tokens of the needle and {BUFFER} for the rest of the prompt and the "
                f"answer. Give lengths above {BUFFER + len(needle)}."
            )
        # The golden ratio spreads any number of repeats evenly, and adding one moves none.
        start = self._text.paragraph_at(int(len(self._text.content) * (repeat * _GOLDEN % 1)))
        book = book_ids(tokenizer, self._text.content, start, room)
        hidden = hide(tokenizer, book, needle, depth)
        context = str(tokenizer.decode(hidden, skip_special_tokens=True))
        prompt = sample.prompt.replace("{context}", context)
        return Encoded(encode_wrapped(tokenizer, prompt, fmt))

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Return the score of one prediction, 0 to 1."""
        return task.mark(prediction, sample.answers)

    def notes(self) -> list[str]:
        """Return what the needle is hidden in, and what the scores of the sandwich do not mean."""
        notes = [
            f"The needle is hidden in {self._text.place}; the recipe takes Paul Graham's essays.",
            *self._text.notes,
        ]
        if any(task.name == "sandwich_rouge1" for task in self.tasks):
            notes.append(
                "sandwich_rouge1 is ROUGE-1 F against the whole needle, 0 to 100 (the recipe prints it "
                "times 10): a right short answer stays below 100, and it does not compare with "
                "sandwich_recall."
            )
        return notes

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of the text, for each chosen task."""
        return {task.name: self._text.sha256 for task in self.tasks}

    @functools.cached_property
    def _text(self) -> Text:
        return read_text(self.source, self.hub)

    def _check_context(self, task: Task, fmt: PromptFormat) -> None:
        """Refuse the longest length at the first sample already, not hours into a run."""
        longest, answer = max(self.lengths), task.max_new_tokens
        if fmt.context is not None and longest > fmt.context - answer:
            raise UserError(
                f"benchmark.lengths={list(self.lengths)}: {longest} is too long for the model, which "
                f"has {fmt.context} positions, {answer} of them for the answer. Give lengths up to "
                f"{fmt.context - answer}."
            )


def _sample(task: Task, length: int, depth: int, repeat: int) -> Sample:
    asked = fact(task, length, depth, repeat)
    prompt = template().replace("{question}", asked.question)
    return Sample(
        id=f"{length}-{depth}-{repeat}",
        task=task.name,
        prompt=prompt,
        question=after_context(prompt),
        answers=(asked.answer,),
        groups={"length": length, "depth": depth},
        tokens=length,
        row={"length": length, "depth": depth, "repeat": repeat, "needle": asked.sentence},
    )


def _numbers(key: str, given: Sequence[int], allowed: range) -> tuple[int, ...]:
    """Return a setting's numbers if they are whole, allowed and all different."""
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    sound = all(type(number) is int and number in allowed for number in listed)
    if not listed or not sound or len(set(listed)) < len(listed):
        raise UserError(
            f"benchmark.{key}={given!r}: give different whole numbers from {allowed[0]} on"
            + (f", up to {allowed[-1]}." if allowed[-1] < 2**31 - 1 else ".")
        )
    return tuple(listed)
