"""The loop of a run: one prefill a sample for all cells, a line for each as it finishes.

A killed run loses at most the batch of samples it was at. Running again skips every (cell, seed,
sample) that has its line; when nothing is left to do, the model is not even loaded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.task import Task
from harness.answering import Answerer, Job
from harness.progress import Progress
from harness.provenance import run_info
from harness.ready import Pending, Ready, get_ready
from harness.results import Results
from harness.settings import Settings
from kvmerge.cells import Cell
from kvmerge.errors import UserError
from kvmerge.families import local_windows
from kvmerge.models import Outline, load

logger = logging.getLogger(__name__)

Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]
COMPARED = 3
"""Finished samples of a task whose prompts are made again before others are added to them."""


def run(
    settings: Settings,
    after_task: Callable[[Results, str], None] = lambda results, task: None,
    loaded: Loaded | None = None,
) -> Results:
    """Run everything that has no line yet and return what lies in `settings.results_dir` then.

    Args:
        settings: the run.
        after_task: called with the results so far and the name of each task that gained a line, as
            soon as the task is finished.
        loaded: the model and its tokenizer, where they are loaded already.

    Raises:
        UserError: if data, weights or settings cannot be used, or the folder holds results made
            with other settings. What is finished stays.
    """
    results = Results(settings.results_dir)

    def begin(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Begun:
        answerer = Answerer(settings, model, tokenizer)

        def work(task: Task, jobs: Sequence[Job]) -> Iterator[None]:
            for prompt, lines in answerer.answer(jobs):
                results.add_prompt(task.name, prompt)
                for cell, record in lines:
                    results.add(task.name, cell.name, record)
                yield
            after_task(results, task.name)

        return Begun(work, counted_layers(model.config))

    carry_out(settings, results, lambda: pending(settings, results), begin, loaded)
    return results


def left(settings: Settings, known: Outline | None = None, *, downloads: bool = False) -> Ready:
    """Return what a run would answer, after every check that it makes first; change nothing of its own.

    Args:
        settings: the run.
        known: the model's outline, where that was looked at already.
        downloads: whether caches may be filled with what the run needs.

    Raises:
        UserError: where the run could not begin, or not add to what its folder holds.
    """
    results = Results(settings.results_dir)
    return get_ready(settings, results, lambda: pending(settings, results), known, downloads=downloads)


@dataclass(frozen=True)
class Begun:
    """What a run does with its samples, once the model is there."""

    work: Callable[[Task, Sequence[Job]], Iterator[None]]
    """Does the jobs of one task, and yields as each is on the disk."""
    notes: Sequence[str]
    """What a reader of the results must know of the model."""


def carry_out(
    settings: Settings,
    results: Results,
    find: Callable[[], Pending],
    begin: Callable[[PreTrainedModel, PreTrainedTokenizerBase], Begun],
    loaded: Loaded | None = None,
) -> None:
    """Do what is left of a run, and describe it in run.json before and after.

    Args:
        settings: the run.
        results: where it writes.
        find: returns what is left.
        begin: called with the loaded model, where anything is left.
        loaded: the model and its tokenizer, where they are loaded already.

    Raises:
        UserError: as `run` does.
    """
    started = time.perf_counter()
    known = None if loaded is None else Outline(*loaded)
    found = get_ready(settings, results, find, known)
    for cell, why in found.stale.items():
        logger.warning("%s is answered anew: %s", cell, why)
        results.set_aside(cell)
    jobs, counts, prints = found.jobs, found.counts, found.prints
    notes = [*settings.benchmark.notes(), *_question_note(settings)]
    if not jobs:
        # a shard that got no samples of a task still shares its run's tasks and cells
        if results.info.get("fingerprint") != prints:
            results.write_info(run_info(settings, results, prints, counts, notes, seconds=0.0))
        return
    results.write_info(run_info(settings, results, prints, counts, notes))
    if loaded is None:
        logger.info("loading %s", settings.model.name)
    model, tokenizer = loaded or load(settings.model, found.model)
    begun = begin(model, tokenizer)
    notes += begun.notes
    with Progress(found.taken - len(jobs), found.taken) as progress:
        for task, task_jobs in groupby(jobs, key=lambda job: job.task):
            progress.begin(task.name)
            for _ in begun.work(task, list(task_jobs)):
                progress.step()
    seconds = round(time.perf_counter() - started, 1)
    results.write_info(run_info(settings, results, prints, counts, notes, seconds))


def _question_note(settings: Settings) -> list[str]:
    """Return a note on what budgets are a part of, where it is not the whole prompt."""
    if settings.question == "inside":
        return []
    return [
        "question=after: only the context of a prompt was compressed, and budgets are fractions of it; "
        "the question was read afterwards and stored whole, so that the first answer token counts."
    ]


def counted_layers(config: PretrainedConfig) -> list[str]:
    """Return a note on which layers a budget counts, where it does not count all."""
    windows = local_windows(config)
    local = [window for window in windows if window is not None]
    if not local:
        return []
    return [
        f"Budgets and kept entries count {len(windows) - len(local)} of {len(windows)} layers; the "
        f"others keep a window of {max(local)} tokens in every cell."
    ]


def pending(settings: Settings, results: Results) -> Pending:
    """Find the samples with lines missing, task by task in the benchmark's order."""
    jobs: list[Job] = []
    compared: list[Job] = []
    counts = {}
    taken = 0
    for task in settings.benchmark.tasks:
        recorded = _recorded_prompts(settings, results, task.name)
        done: set[tuple[str, int, str]] = set()
        for cell in settings.cells:
            records = results.records(task.name, cell.name)
            done |= {(cell.name, record.seed, record.id) for record in records}
        samples = settings.benchmark.samples(task)
        counts[task.name] = len(samples)
        of_task = [
            Job(task, sample, missing, recorded.get(sample.id))
            for sample in settings.take(samples)
            for missing in [_missing(settings, sample.id, done)]
        ]
        taken += len(of_task)
        left = [job for job in of_task if job.missing]
        jobs += left
        if left:
            finished = [job for job in of_task if job.recorded and not job.missing]
            compared += finished[:COMPARED]
    check_questions(settings, jobs)
    return Pending(jobs, compared, counts, taken)


def check_questions(settings: Settings, jobs: Sequence[Job]) -> None:
    """Refuse `question=after` for tasks whose prompts do not say where their context ends.

    Raises:
        UserError: naming these tasks, and those that can be run.
    """
    if settings.question == "inside":
        return
    unasked = {job.task.name for job in jobs if job.sample.question is None}
    if unasked:
        others = [task.name for task in settings.benchmark.tasks if task.name not in unasked]
        raise UserError(
            f"question=after: {', '.join(sorted(unasked))} of {settings.benchmark.name} has no "
            "question after its context. "
            + (f"Take the others, benchmark.tasks=[{','.join(others)}], or use " if others else "Use ")
            + "question=inside."
        )


def _missing(
    settings: Settings, sample_id: str, done: Set[tuple[str, int, str]]
) -> tuple[tuple[Cell, int], ...]:
    return tuple(
        (cell, seed)
        for cell in settings.cells
        for seed in settings.seeds(cell)
        if (cell.name, seed, sample_id) not in done
    )


def _recorded_prompts(settings: Settings, results: Results, task: str) -> dict[str, str]:
    """Return the hash of the prompt that each sample's lines were made with.

    Of the cells of earlier runs too: they share their tables with this one's. Raises `UserError` where
    two lines of a sample differ.
    """
    found: dict[str, str] = {}
    cells = dict.fromkeys([*results.info.get("cells", []), *(cell.name for cell in settings.cells)])
    for cell in cells:
        for record in results.records(task, cell):
            if found.setdefault(record.id, record.prompt_hash) != record.prompt_hash:
                raise UserError(
                    f"{results.folder} holds lines of task {task}, sample {record.id!r} that were made "
                    f"with different prompts (one is of {cell}): they cannot be compared. Delete that "
                    "folder, or choose another output_dir."
                )
    return found
