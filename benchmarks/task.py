"""The nouns of an evaluation: a task is data, a sample is one prompt with its gold answers.

Benchmarks do not know that cache methods exist; they turn rows into prompts and predictions into
scores, and that is all the runner needs from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """One task of a benchmark, as its official configuration states it."""

    name: str
    metric: str
    """Name of a function in `benchmarks.metrics`."""
    max_new_tokens: int
    chat: bool = True
    """Whether the prompt is wrapped in the model's chat format."""
    first_line: bool = False
    """Whether the scorer keeps only the first line of the prediction."""
    stop_at_newline: bool = False
    """Whether decoding also ends at a newline (after at least one token)."""


@dataclass(frozen=True)
class Sample:
    """One row of a benchmark: the filled prompt and what counts as a right answer."""

    id: str
    task: str
    prompt: str
    """The official template filled, before truncation and chat wrap."""
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None = None
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class PromptFormat:
    """How a model wants its prompts: the part of a model's config that benchmarks may see."""

    max_length: int
    """Most tokens of the official prompt, special tokens included, before the chat wrap."""
    chat: str = "template"
    """`template`: the tokenizer's own chat template; `none`: no wrap; otherwise a text holding
    `{prompt}`, e.g. `[INST]{prompt}[/INST]`."""


class Benchmark(Protocol):
    """What the runner asks of a benchmark."""

    name: str
    tasks: Sequence[Task]
    """The tasks chosen for this run, in the benchmark's own order."""

    def samples(self, task: Task) -> list[Sample]:
        """All rows of a task, validated.

        Raises `UserError` (kvmerge.errors) naming the file and line of a bad row.
        """
        ...

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> list[int]:
        """Token ids fed to prefill: truncated, wrapped and tokenised by the official protocol."""
        ...

    def score(self, sample: Sample, task: Task, prediction: str) -> float:
        """The official per-sample score, 0 to 1."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the results must know, one sentence each; usually nothing."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of each data file in use, by task name (for provenance and safe resuming)."""
        ...
