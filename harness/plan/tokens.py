"""How long the prompts are that are left to a run, counted or estimated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit
from transformers import PreTrainedTokenizerBase

from benchmarks.task import Task
from harness.answering import Job, encode, prompt_hash, together
from harness.ready import Ready
from harness.settings import Settings
from kvmerge.cells import Cell

_ASCII_PER_TOKEN, _OTHERS_PER_TOKEN = 4.3, 1.1
"""Characters of a token, where there is no tokenizer: fitted to relative errors on 191 prompts of
LongBench and mini with six tokenizers (Llama-2, Llama-3.1, Mistral, Qwen2.5, Qwen3, SmolLM2). Half of
the tasks were within 13% then; Chinese ones were up to 54% off."""
_CHARACTERS = 12_000_000
"""Of prompts that are tokenised for a plan, about: six seconds, at two million a second."""
_LEAST = 5
"""Samples of each task that are, however long."""


@dataclass(frozen=True)
class Sized:
    """A sample that is left to a run, by its tokens."""

    context: int
    """Tokens that are compressed."""
    cells: tuple[Cell, ...]
    """What answers it: a cell for each line that is missing, so once a seed."""
    question: int = 0
    """Tokens that are fed after the compression of the others."""
    continuation: int = 0
    """Tokens of a text whose probability is measured in place of an answer; 0: an answer is made."""
    shared: str = ""
    """Samples of one name share a prefill; empty: it has its own."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole prompt."""
        return self.context + self.question


@dataclass(frozen=True)
class Tokens:
    """How long the prompts of a task are that are left."""

    jobs: int
    samples: Sequence[Sized]
    """Those that were looked at."""
    is_exact: bool
    """Whether the numbers are those of the model's tokenizer."""

    @property
    def counted(self) -> list[int]:
        """Tokens of each prompt that was looked at."""
        return [sample.tokens for sample in self.samples]

    @property
    def mean(self) -> float:
        """Mean tokens of a prompt; 0 without any."""
        return fmean(self.counted) if self.counted else 0.0

    @property
    def total(self) -> int:
        """Tokens of all prompts, or the likeliest number of them."""
        return round(self.mean * self.jobs)

    @property
    def answers(self) -> int:
        """Answers that are left, or about so many."""
        return round(self.scale * sum(len(sample.cells) for sample in self.samples))

    @property
    def scale(self) -> float:
        """How many samples each one that was looked at stands for; 1 where all were."""
        return self.jobs / len(self.samples) if self.samples else 1.0

    @property
    def error(self) -> float:
        """Half of the 95% interval of the total, from the spread of those that were counted."""
        seen = len(self.samples)
        if seen == self.jobs:
            return 0.0
        spread = stdev(self.counted) * math.sqrt((1 - seen / self.jobs) / seen)
        return float(stdtrit(seen - 1, 0.975)) * spread * self.jobs


def count_tokens(settings: Settings, found: Ready) -> dict[Task, Tokens]:
    """Return how long the prompts of each task are that are left to a run.

    With the model's tokenizer where it is at hand: all of them, or of many characters an evenly spread
    part of each task. By their characters otherwise.
    """
    by_task = {
        task: [job for job in found.jobs if job.task == task] for task in settings.benchmark.tasks
    }
    tokenizer = None if found.model is None else found.model.tokenizer
    if tokenizer is None:
        return {
            task: Tokens(len(jobs), [_estimated(settings, job) for job in jobs], is_exact=False)
            for task, jobs in by_task.items()
        }
    share = min(1.0, _CHARACTERS / max(1, sum(map(_size, found.jobs))))
    return {
        task: Tokens(
            len(jobs),
            [_counted(settings, tokenizer, job) for job in _spread(settings, jobs, share)],
            is_exact=True,
        )
        for task, jobs in by_task.items()
    }


def describe_count(samples: int, tokens: Mapping[Task, Tokens]) -> str:
    """Say how the prompts' tokens were found, for so many samples that are left."""
    seen = sum(len(of_task.samples) for of_task in tokens.values())
    if all(of_task.is_exact for of_task in tokens.values()):
        if seen == samples:
            return "prompt tokens: counted with the model's tokenizer"
        total = sum(of_task.total for of_task in tokens.values())
        return (
            f"prompt tokens: counted with the model's tokenizer in {seen:,} of {samples:,} "
            f"samples, from all over each task; the total is within {error_of(tokens) / total:.1%} "
            "(95%)"
        )
    return (
        f"prompt tokens: estimated by their characters ({_ASCII_PER_TOKEN} a token, "
        f"{_OTHERS_PER_TOKEN} outside ASCII), as the model's tokenizer is not here; some tasks may be "
        "half as long, or twice"
    )


def error_of(tokens: Mapping[Task, Tokens]) -> float:
    """Return half of the 95% interval of all prompts' tokens; tasks err independently."""
    return math.hypot(*(of_task.error for of_task in tokens.values()))


def _size(job: Job) -> int:
    """Return the characters of a sample's prompt, about, where it is made to a number of tokens."""
    return max(len(job.sample.prompt), round((job.sample.tokens or 0) * _ASCII_PER_TOKEN))


def _spread(settings: Settings, jobs: Sequence[Job], share: float) -> list[Job]:
    """Return a part of a task's jobs, from all over it, in the order that a run takes."""
    ordered = together(jobs) if settings.question == "after" else jobs
    count = min(len(jobs), max(_LEAST, math.ceil(share * len(jobs))))
    return [ordered[place * len(jobs) // count] for place in range(count)]


def _counted(settings: Settings, tokenizer: PreTrainedTokenizerBase, job: Job) -> Sized:
    encoded = encode(settings, tokenizer, job)
    return Sized(
        len(encoded.context),
        tuple(cell for cell, _ in job.missing),
        encoded.question_tokens,
        len(encoded.continuation or ()),
        prompt_hash(encoded.context) if encoded.question_tokens else "",
    )


def _estimated(settings: Settings, job: Job) -> Sized:
    cells = tuple(cell for cell, _ in job.missing)
    if job.sample.tokens is not None:
        return Sized(job.sample.tokens, cells)
    characters = len(job.sample.prompt)
    others = characters - len(job.sample.prompt.encode("ascii", "ignore"))
    tokens = (characters - others) / _ASCII_PER_TOKEN + others / _OTHERS_PER_TOKEN
    return Sized(min(round(tokens), settings.model.max_length), cells)
