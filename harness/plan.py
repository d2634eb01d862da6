"""What a run would do and cost, from the configuration and the data alone (`dry_run=true`)."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.source import NeedsDownload, no_downloads
from harness.answering import Job
from harness.observation import Observed
from harness.observing import pending_observations
from harness.runner import found_with, left
from harness.settings import Settings
from kvmerge.models import DTYPES

_CHARACTERS_PER_TOKEN = 3.5
"""Of English text; a plan must not load a tokenizer that may have to be fetched first."""


def print_plan(settings: Settings, console: Console) -> None:
    """Print samples, answers and the estimated cost of what is left to run. Writes nothing."""
    try:
        with no_downloads():
            jobs = _pending(settings)
    except NeedsDownload as error:
        console.print(
            f"{error} A run fetches it first; `python scripts/data.py fetch "
            f"{settings.benchmark.name}` does only that. What the run costs is known then.",
            soft_wrap=True,
            highlight=False,
        )
        return
    answering = settings.observe is None
    table = Table(title=f"{settings.model.name} on {settings.benchmark.name}", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("samples to run", "answers", "prompt tokens (about)", "answer tokens up to"):
        if answering or "answer" not in column:
            table.add_column(column, justify="right")
    total_prompt = total_answer = longest = 0
    for task in settings.benchmark.tasks:
        task_jobs = [job for job in jobs if job.task == task]
        prompts = [
            job.sample.tokens
            or min(round(len(job.sample.prompt) / _CHARACTERS_PER_TOKEN), settings.model.max_length)
            for job in task_jobs
        ]
        mean = round(sum(prompts) / len(prompts)) if prompts else 0
        row = [task.name, str(len(task_jobs)), f"{mean:,}"]
        if answering:
            answers = sum(len(job.missing) for job in task_jobs)
            row = [*row[:2], str(answers), row[2], str(task.max_new_tokens)]
        table.add_row(*row)
        total_prompt += sum(prompts)
        longest = max(longest, *prompts, 0)
        total_answer += task.max_new_tokens * len(task_jobs)
    console.print(table)
    if answering:
        console.print("cells: " + ", ".join(cell.name for cell in settings.cells), highlight=False)
    console.print(f"output_dir: {settings.output_dir}", soft_wrap=True, highlight=False)
    shape = settings.model.shape
    if not jobs:
        console.print("nothing left to run: every line is there.")
    elif shape is not None:
        operations = 2 * shape.parameters * total_prompt
        itemsize = DTYPES[settings.model.dtype].itemsize
        entry = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
        console.print(
            f"prefill: one per sample{' for all cells' * answering}, {total_prompt:,} tokens, about "
            f"{operations / 1e12:,.1f} TFLOP in the weights"
        )
        if not answering:
            return
        console.print(
            f"decode: at most {total_answer:,} steps, each reading "
            f"{shape.parameters * itemsize / 2**30:.2f} GiB of weights once "
            "for all cells\n"
            f"full cache: {entry / 2**10:,.1f} KiB a token, up to {entry * longest / 2**20:,.0f} MiB a "
            "sample"
        )


def _pending(settings: Settings) -> list[Job]:
    """Return the samples that are left to answer, or to observe.

    Raises `UserError` where the run could not add them to what is there.
    """
    if settings.observe is None:
        return left(settings)
    observed = Observed(settings.results_dir)
    found, _ = found_with(settings, observed, lambda: pending_observations(settings, observed))
    return found[0]
