"""Perplexity under compression: how well a text goes on from the compressed cache of its beginning.

Each passage is cut in two. The first part is the prompt; the second is fed to the model token by token
from the compressed cache, and its negative log-likelihood is what a task's perplexity is made of. It
needs no answers and has no floor, so it separates methods that task scores cannot.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.encoding import tokens
from benchmarks.metric import Array, Metric
from benchmarks.task import Encoded, PromptFormat, Sample, Task
from benchmarks.texts import Text, read_text
from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LARGEST = math.log(sys.float_info.max)


def _marks(nll: float, tokens: int) -> dict[str, float]:
    mean = nll / tokens
    # Of a model that is certain of other tokens it may be more than a float holds.
    score = math.inf if mean > _LARGEST else math.exp(mean)
    return {"score": score, "nll": nll, "tokens": tokens}


def _perplexity(means: Array) -> Array:
    # Both means are over the same samples, so their ratio is the ratio of the sums.
    return np.exp(means[..., 0] / means[..., 1])


PERPLEXITY = Metric(
    "perplexity",
    _marks,
    parts=("nll", "tokens"),
    score=_perplexity,
    higher_is_better=False,
    averaged=False,
    continuation=True,
)


class Perplexity:
    """The benchmark: passages of one long text, spread evenly over it.

    Args:
        source: where the text comes from (`benchmarks.texts.read_text`).
        hub: the file and its column, where `source` is `hub`.
        prompt_tokens: tokens of each passage that are fed to prefill, special tokens included.
        scored_tokens: tokens after them whose probability is measured.
        samples: passages. The text is cut into that many parts, and each begins one at its first
            paragraph.

    Raises UserError for a number below 1, and what `read_text` raises.
    """

    name = "perplexity"

    def __init__(
        self,
        source: str = "stdlib",
        hub: Mapping[str, Any] | None = None,
        prompt_tokens: int = 1024,
        scored_tokens: int = 512,
        samples: int = 16,
    ) -> None:
        for key, value in (
            ("prompt_tokens", prompt_tokens),
            ("scored_tokens", scored_tokens),
            ("samples", samples),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"benchmark.{key}={value!r} must be a whole number of 1 or more.")
        self.source = source
        self.hub = hub
        self.prompt_tokens = prompt_tokens
        self.count = samples
        self.tasks: Sequence[Task] = (
            Task("continuation", PERPLEXITY, max_new_tokens=scored_tokens, chat=False),
        )

    def samples(self, task: Task) -> list[Sample]:
        """Return the passages, each up to where the next one begins, in the order of the text."""
        text = self._text.content
        starts = [self._text.paragraph_at(len(text) * i // self.count) for i in range(self.count)]
        ends = [*starts[1:], len(text)]
        return [
            Sample(
                id=f"{number:03d}",
                task=task.name,
                prompt=text[start:end],
                answers=(),
                tokens=self.prompt_tokens,
            )
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Return the passage's first tokens as the prompt and the next ones as the continuation.

        Raises UserError if the passage is too short, or the model's context.
        """
        needed = self.prompt_tokens + task.max_new_tokens
        wanted = (
            f"benchmark.prompt_tokens={self.prompt_tokens} and "
            f"benchmark.scored_tokens={task.max_new_tokens} need {needed} tokens"
        )
        if fmt.context is not None and needed > fmt.context:
            raise UserError(f"{wanted}, the model has {fmt.context} positions. Lower one of the two.")
        ids = tokens(tokenizer, sample.prompt)
        if len(ids) < needed:
            raise UserError(
                f"{wanted}, passage {sample.id} of {self._text.place} has {len(ids)}. "
                f"Lower one of the two or benchmark.samples={self.count}, or give a longer text."
            )
        return Encoded(ids[: self.prompt_tokens], ids[self.prompt_tokens : needed])

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Refuse: a continuation is weighed, not answered."""
        raise TypeError("perplexity has no predictions to score")

    def notes(self) -> list[str]:
        """Return what the text is, and what the perplexity counts."""
        return [
            f"Perplexity of the {self.tasks[0].max_new_tokens} tokens after a prompt of "
            f"{self.prompt_tokens}, over {self.count} passages of {self._text.place}. The first of "
            "those tokens is predicted before anything is compressed.",
            *self._text.notes,
        ]

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of the text."""
        return {self.tasks[0].name: self._text.sha256}

    @functools.cached_property
    def _text(self) -> Text:
        return read_text(self.source, self.hub)
