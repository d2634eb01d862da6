"""What a run would do and cost, from the configuration, the data and the tokenizer (`dry_run=true`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

from benchmarks.source import NeedsDownload, no_downloads
from benchmarks.task import Task
from harness.answering import Job, encode
from harness.lock import check_writer
from harness.observation import Observed
from harness.observing import pending_observations
from harness.ready import Ready, get_ready
from harness.runner import left
from harness.settings import Settings
from kvmerge.models import DTYPES

_ASCII_PER_TOKEN, _OTHERS_PER_TOKEN = 4.3, 1.1
"""Characters of a token, where there is no tokenizer: fitted to relative errors on 191 prompts of
LongBench and mini with six tokenizers (Llama-2, Llama-3.1, Mistral, Qwen2.5, Qwen3, SmolLM2). Half of
the tasks were within 13% then; Chinese ones were up to 54% off."""
_CHARACTERS = 12_000_000
"""Of prompts that are tokenised for a plan, about: six seconds, at two million a second."""
_LEAST = 5
"""Samples of each task that are, however long."""


@dataclass(frozen=True)
class Tokens:
    """How long the prompts of a task are that are left."""

    jobs: int
    counted: Sequence[int]
    """Tokens of those that were looked at."""
    is_exact: bool
    """Whether the numbers are those of the model's tokenizer."""

    @property
    def mean(self) -> float:
        """Mean tokens of a prompt; 0 without any."""
        return fmean(self.counted) if self.counted else 0.0

    @property
    def total(self) -> int:
        """Tokens of all prompts, or the likeliest number of them."""
        return round(self.mean * self.jobs)

    @property
    def error(self) -> float:
        """Half of the 95% interval of the total, from the spread of those that were counted."""
        seen = len(self.counted)
        if seen == self.jobs:
            return 0.0
        spread = stdev(self.counted) * math.sqrt((1 - seen / self.jobs) / seen)
        return float(stdtrit(seen - 1, 0.975)) * spread * self.jobs


def print_plan(settings: Settings, console: Console, found: Ready | None = None) -> None:
    """Make the checks of a run, and print samples, answers and the estimated cost of what is left.

    Writes nothing.

    Args:
        settings: the run.
        console: where it is printed.
        found: what is left, where the checks were made already.

    Raises:
        UserError: where the run would end with it in its first seconds.
    """
    with told_of_downloads(settings, console):
        _print(settings, console, found or _checked(settings))


@contextmanager
def told_of_downloads(settings: Settings, console: Console) -> Iterator[None]:
    """Hold downloads back inside the block, and end it with a sentence where data would need one."""
    try:
        with no_downloads():
            yield
    except NeedsDownload as error:
        console.print(
            f"{error} A run fetches it first; `python scripts/data.py fetch "
            f"{settings.benchmark.name}` does only that. What the run costs is known then.",
            soft_wrap=True,
            highlight=False,
        )


def _checked(settings: Settings) -> Ready:
    """Return what is left to answer, or to observe. Raises `UserError` as a run does."""
    check_writer(settings.results_dir)
    if settings.observe is None:
        return left(settings)
    observed = Observed(settings.results_dir)
    return get_ready(
        settings, observed, lambda: pending_observations(settings, observed), downloads=False
    )


def _print(settings: Settings, console: Console, found: Ready) -> None:
    tokens = count_tokens(settings, found)
    answering = settings.observe is None
    table = Table(title=f"{settings.model.name} on {settings.benchmark.name}", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("samples to run", "answers", "prompt tokens, mean", "answer tokens up to"):
        if answering or "answer" not in column:
            table.add_column(column, justify="right")
    for task, of_task in tokens.items():
        row = [task.name, str(of_task.jobs), f"{of_task.mean:,.0f}"]
        if answering:
            answers = sum(len(job.missing) for job in found.jobs if job.task == task)
            row = [*row[:2], str(answers), row[2], str(task.max_new_tokens)]
        table.add_row(*row)
    console.print(table)
    lines = [_counting(found, tokens)] if found.jobs else []
    if answering:
        lines.append("cells: " + ", ".join(cell.name for cell in settings.cells))
    lines.append(f"output_dir: {settings.output_dir}")
    if found.model is not None and found.model.download:
        lines.append(f"a run downloads first: {found.model.download}")
    if not found.jobs:
        lines.append("nothing left to run: every line is there.")
    else:
        lines += _costs(settings, tokens)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


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
            [len(encode(settings, tokenizer, job).prompt) for job in _spread(jobs, share)],
            is_exact=True,
        )
        for task, jobs in by_task.items()
    }


def _size(job: Job) -> int:
    """Return the characters of a sample's prompt, about, where it is made to a number of tokens."""
    return max(len(job.sample.prompt), round((job.sample.tokens or 0) * _ASCII_PER_TOKEN))


def _spread(jobs: Sequence[Job], share: float) -> list[Job]:
    """Return a part of a task's jobs, from all over it."""
    count = min(len(jobs), max(_LEAST, math.ceil(share * len(jobs))))
    return [jobs[place * len(jobs) // count] for place in range(count)]


def _estimated(settings: Settings, job: Job) -> int:
    if job.sample.tokens is not None:
        return job.sample.tokens
    characters = len(job.sample.prompt)
    others = characters - len(job.sample.prompt.encode("ascii", "ignore"))
    tokens = (characters - others) / _ASCII_PER_TOKEN + others / _OTHERS_PER_TOKEN
    return min(round(tokens), settings.model.max_length)


def _error(tokens: Mapping[Task, Tokens]) -> float:
    """Return half of the 95% interval of all prompts' tokens; tasks err independently."""
    return math.hypot(*(of_task.error for of_task in tokens.values()))


def _counting(found: Ready, tokens: Mapping[Task, Tokens]) -> str:
    """Say how the prompts' tokens were found."""
    seen = sum(len(of_task.counted) for of_task in tokens.values())
    if all(of_task.is_exact for of_task in tokens.values()):
        if seen == len(found.jobs):
            return "prompt tokens: counted with the model's tokenizer"
        total = sum(of_task.total for of_task in tokens.values())
        return (
            f"prompt tokens: counted with the model's tokenizer in {seen:,} of {len(found.jobs):,} "
            f"samples, from all over each task; the total is within {_error(tokens) / total:.1%} (95%)"
        )
    return (
        f"prompt tokens: estimated by their characters ({_ASCII_PER_TOKEN} a token, "
        f"{_OTHERS_PER_TOKEN} outside ASCII), as the model's tokenizer is not here; some tasks may be "
        "half as long, or twice"
    )


def _costs(settings: Settings, tokens: Mapping[Task, Tokens]) -> list[str]:
    """Return the estimated cost of a run, as far as the model's size is known."""
    shape = settings.model.shape
    if shape is None:
        return []
    answering = settings.observe is None
    total = sum(of_task.total for of_task in tokens.values())
    error = round(_error(tokens))
    operations = 2 * shape.parameters * total
    lines = [
        f"prefill: one per sample{' for all cells' * answering}, {total:,}"
        f"{f' ± {error:,}' * bool(error)} tokens, about {operations / 1e12:,.1f} TFLOP in the weights"
    ]
    if not answering:
        return lines
    itemsize = DTYPES[settings.model.dtype].itemsize
    entry = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
    longest = max(max(of_task.counted, default=0) for of_task in tokens.values())
    steps = sum(task.max_new_tokens * of_task.jobs for task, of_task in tokens.items())
    return [
        *lines,
        f"decode: at most {steps:,} steps, each reading "
        f"{shape.parameters * itemsize / 2**30:.2f} GiB of weights once for all cells",
        f"full cache: {entry / 2**10:,.1f} KiB a token, up to {entry * longest / 2**20:,.0f} MiB a "
        "sample",
    ]
