"""The nouns of an evaluation: a task is data, a sample is one prompt with its gold answers.

Benchmarks do not know that cache methods exist; they turn rows into prompts and predictions into
scores, and that is all the runner needs from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.metric import Marks, Metric
from kvmerge.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """One task of a benchmark, as its official configuration states it."""

    name: str
    metric: Metric
    """What the benchmark scores it by; results give its name."""
    max_new_tokens: int
    """Longest answer; where a continuation is scored instead, its length."""
    chat: bool = True
    """Whether the prompt is wrapped in the model's chat format."""
    first_line: bool = False
    """Whether the scorer keeps only the first line of the prediction."""
    stop_at_newline: bool = False
    """Whether decoding also ends at a newline."""
    min_new_tokens: int = 0
    """Tokens before which no answer ends."""
    may_overrun: bool = False
    """Whether prompt and answer may pass the model's context, as the protocol that is followed has it;
    otherwise the engine refuses them."""

    def mark(
        self, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
    ) -> Marks:
        """Return the marks of one prediction, by the first-line rule and the metric.

        Raises what the metric raises.
        """
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        return self.metric.sample(prediction, answers, all_classes)


@dataclass(frozen=True)
class Sample:
    """One row of a benchmark: the filled prompt and what counts as a right answer."""

    id: str
    task: str
    prompt: str
    """The official template filled, before truncation and chat wrap."""
    question: str | None = field(default=None, kw_only=True)
    """The end of the prompt, from the end of its context on; None where the template does not say where
    that is, or nothing follows it (`benchmarks.questions`)."""
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None = None
    groups: Mapping[str, str | int] = field(default_factory=dict)
    """What the sample's scores are also reported by, e.g. `{"length": "0-4k"}`."""
    tokens: int | None = None
    """Prompt tokens, where the sample is made to a length; a plan needs no tokenizer then."""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def context(self) -> str | None:
        """The prompt before its question, which samples may share; None where that is not known.

        Nor is it where a prompt is made to a length: its text is filled in with a tokenizer only.
        """
        if self.question is None or self.tokens is not None:
            return None
        return self.prompt.rstrip().removesuffix(self.question)


@dataclass(frozen=True)
class Encoded:
    """A sample as token ids."""

    prompt: list[int]
    """What is fed to prefill."""
    continuation: list[int] | None = None
    """Text whose probability is measured after the prompt, instead of an answer."""
    question_tokens: int = 0
    """Tokens at the prompt's end that are fed after the compression of the others."""

    @property
    def context(self) -> list[int]:
        """The tokens that are compressed."""
        return self.prompt[: len(self.prompt) - self.question_tokens]

    @property
    def question(self) -> list[int]:
        """The tokens that are fed afterwards."""
        return self.prompt[len(self.context) :]


@dataclass(frozen=True)
class PromptFormat:
    """How a model wants its prompts: the part of a model's config that benchmarks may see."""

    max_length: int
    """Most tokens of the official prompt, special tokens included, before the chat wrap."""
    chat: str = "template"
    """`template`: the tokenizer's own chat template; `none`: no wrap; otherwise a text holding
    `{prompt}`, e.g. `[INST]{prompt}[/INST]`."""
    context: int | None = None
    """Positions that the model was trained for, prompt and answer together; None: not stated."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is called with, e.g. `{"enable_thinking": False}`."""


class Benchmark(Protocol):
    """What the runner asks of a benchmark."""

    name: str
    tasks: Sequence[Task]
    """The tasks chosen for this run, in the benchmark's own order."""

    def samples(self, task: Task) -> list[Sample]:
        """Return all rows of a task, validated.

        Raises `UserError` (kvmerge.errors) naming the file and line of a bad row.
        """
        ...

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Truncate, wrap and tokenise by the official protocol."""
        ...

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Score one prediction by the official rule.

        `score`, 0 to 1, and beside it the parts that the task's score is made of, if it is not the
        mean of the samples' scores (`harness.report.bootstrap`). Never called for a continuation.
        """
        ...

    def notes(self) -> list[str]:
        """Return what a reader of the results must know, one sentence each; usually nothing."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each data file in use, by task name: for provenance, safe resuming."""
        ...


def choose_tasks(all_tasks: Sequence[Task], names: Sequence[str] | None, of: str) -> Sequence[Task]:
    """Return the named tasks in the benchmark's own order; None means all.

    Raises UserError naming what does not exist in `of`, e.g. `LongBench`.
    """
    if names is None:
        return all_tasks
    given = [names] if isinstance(names, str) else [str(name) for name in names]
    known = [task.name for task in all_tasks]
    if not given:
        raise UserError(
            f"benchmark.tasks is empty. Name tasks of {of}, e.g. [{known[0]}]; null takes all."
        )
    for name in given:
        if name not in known:
            raise unknown(f"{of} task", name, known)
    return tuple(task for task in all_tasks if task.name in given)
