"""The loop of a run: one prefill a sample for all cells, a line for each as it finishes.

Who answers is an executor (`harness.executors`); what it sends back is written here, one way, whoever
it is. A killed run loses at most the units that were at work. Running again skips every (cell, seed,
sample) that has its line; when nothing is left to do, the model is not even loaded.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import repeat

from rich.console import RenderableType

from harness.answering import Job
from harness.executors.executor import Loaded
from harness.executors.units import Answered, Outcome, numbered, units
from harness.failures import Failure
from harness.foreign import foreign_listed
from harness.live import LiveScores
from harness.progress import Progress, Step
from harness.provenance import run_info
from harness.ready import Pending, Ready, get_ready
from harness.results import Results
from harness.settings import Settings
from harness.stopping import finishing
from kvmerge.cells import Cell
from kvmerge.errors import UserError
from kvmerge.models import Outline

logger = logging.getLogger(__name__)

COMPARED = 3
"""Finished samples of a task whose prompts are made again before others are added to them."""

AfterTask = Callable[[Results, str], None]


def run(
    settings: Settings,
    after_task: AfterTask = lambda results, task: None,
    loaded: Loaded | None = None,
) -> Results:
    """Run everything that has no line yet and return what lies in `settings.results_dir` then.

    Samples that could not be answered are in `failures` of what is returned; the others are done.

    Args:
        settings: the run.
        after_task: called with the results so far and the name of each task that gained a line, as
            soon as the task is finished.
        loaded: the model and its tokenizer, where they are loaded already.

    Raises:
        UserError: if data, weights or settings cannot be used, or the folder holds results made
            with other settings. What is finished stays.
        Stopped: if a signal ended the run; what was at work is finished and written then, unless
            another followed.
    """
    results = Results(settings.results_dir)
    scores = LiveScores(results, settings.benchmark.tasks, settings.cells)

    @contextlib.contextmanager
    def begin(found: Ready) -> Iterator[Begun]:
        with settings.executor.start(settings, found.model, loaded) as workers:

            def work(is_stopping: Callable[[], bool]) -> Iterator[Step]:
                left = Counter(job.task.name for job in found.jobs)
                gained: set[str] = set()
                for outcome in workers.answer(list(units(found.jobs)), is_stopping):
                    write(results, outcome)
                    scores.note(outcome.task)
                    yield Step(outcome.task, outcome.tokens)
                    left[outcome.task] -= 1
                    if isinstance(outcome, Answered):
                        gained.add(outcome.task)
                    if not left[outcome.task] and outcome.task in gained:
                        _put_in_order(settings, results, found, outcome.task)
                        after_task(results, outcome.task)

            yield Begun(work, workers.notes, workers.count, scores.table)

    known = None if loaded is None else Outline(*loaded)
    found = carry_out(settings, results, lambda: pending(settings, results), begin, known)
    drop_finished(results, found, lambda each: _is_answered(results, each))
    for task in found.ids:  # a killed run may have finished one without
        _put_in_order(settings, results, found, task)
    return results


def write(results: Results, outcome: Outcome) -> None:
    """Write down what became of a sample. Raises `UserError` where the disk is full."""
    if isinstance(outcome, Failure):
        results.failures.add(outcome)
        return
    results.add_prompt(outcome.task, outcome.prompt)
    for cell, record in outcome.lines:
        results.add(outcome.task, cell, record)
    results.failures.drop_sample(outcome.task, outcome.id)


def drop_finished(results: Results, found: Pending, has_lines: Callable[[Failure], bool]) -> None:
    """Take out failures of samples that have their lines: a run was killed between the two.

    Args:
        results: whose failures they are.
        found: what was left to the run, which has dealt with the failures of that.
        has_lines: whether the sample of a failure has all its lines.
    """
    left = {(job.task.name, job.sample.id) for job in found.jobs}
    results.failures.drop(lambda each: (each.task, each.id) not in left and has_lines(each))


def _is_answered(results: Results, failure: Failure) -> bool:
    lines = (results.records(failure.task, cell) for cell in failure.cells)
    return all(any(record.id == failure.id for record in of_cell) for of_cell in lines)


def _put_in_order(settings: Settings, results: Results, found: Pending, task: str) -> None:
    results.put_in_order(task, [cell.name for cell in settings.cells], found.ids[task])


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

    work: Callable[[Callable[[], bool]], Iterator[Step]]
    """Does what is left, and yields as each sample is on the disk; begins nothing more once what it is
    given says that the run is to end."""
    notes: Sequence[str]
    """What a reader of the results must know of the model."""
    workers: int = 1
    scores: Callable[[], RenderableType] | None = None
    """Returns what is shown of the results so far."""


def carry_out(
    settings: Settings,
    results: Results,
    find: Callable[[], Pending],
    begin: Callable[[Ready], AbstractContextManager[Begun]],
    known: Outline | None = None,
) -> Ready:
    """Do what is left of a run, describe it in run.json before and after, and return what was left.

    Args:
        settings: the run.
        results: where it writes.
        find: returns what is left.
        begin: called with that, where it is anything.
        known: the model's outline, where that was looked at already.

    Raises:
        UserError, Stopped: as `run` does.
    """
    started = time.perf_counter()
    found = get_ready(settings, results, find, known)
    for cell, why in found.stale.items():
        logger.warning("%s is answered anew: %s", cell, why)
        results.set_aside(cell)
    counts, prints = found.counts, found.prints
    notes = [*settings.benchmark.notes(), *_question_note(settings)]
    if not found.jobs:
        # a shard that got no samples of a task still shares its run's tasks and cells
        if results.info.get("fingerprint") != prints:
            results.write_info(run_info(settings, results, prints, counts, notes, seconds=0.0))
        return found
    results.write_info(run_info(settings, results, prints, counts, notes))
    with begin(found) as begun:
        notes += begun.notes
        shown = Progress(found.taken - len(found.jobs), found.taken, begun.workers, begun.scores)
        with shown as progress, finishing() as stop:
            for step in begun.work(stop.is_asked):
                progress.step(step)
    seconds = round(time.perf_counter() - started, 1)
    results.write_info(run_info(settings, results, prints, counts, notes, seconds))
    return found


def _question_note(settings: Settings) -> list[str]:
    """Return a note on what budgets are a part of, where it is not the whole prompt."""
    if settings.question == "inside":
        return []
    return [
        "question=after: only the context of a prompt was compressed, and budgets are fractions of it; "
        "the question was read afterwards and stored whole, so that the first answer token counts."
    ]


def pending(settings: Settings, results: Results) -> Pending:
    """Find the samples with lines missing, task by task in the benchmark's order."""
    jobs: list[Job] = []
    compared: list[Job] = []
    ids = {}
    taken = 0
    for task in settings.benchmark.tasks:
        recorded = _recorded_prompts(settings, results, task.name)
        needed = [(cell.name, cell, seed) for cell in settings.cells for seed in settings.seeds(cell)]
        done: set[tuple[str, int, str]] = set()
        for cell in settings.cells:
            records = results.records(task.name, cell.name)
            done.update(zip(repeat(cell.name), records.values("seed"), records.values("id")))
        samples = settings.benchmark.samples(task)
        ids[task.name] = [sample.id for sample in samples]
        of_task = [
            Job(task, sample, _missing(needed, sample.id, done), recorded.get(sample.id))
            for sample in settings.take(samples)
        ]
        taken += len(of_task)
        left = [job for job in numbered(settings, of_task) if job.missing]
        jobs += left
        if left:
            finished = [job for job in of_task if job.recorded and not job.missing]
            compared += finished[:COMPARED]
    check_questions(settings, jobs)
    return Pending(jobs, compared, ids, taken)


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
    needed: Sequence[tuple[str, Cell, int]], sample_id: str, done: Set[tuple[str, int, str]]
) -> tuple[tuple[Cell, int], ...]:
    return tuple((cell, seed) for name, cell, seed in needed if (name, seed, sample_id) not in done)


def _recorded_prompts(settings: Settings, results: Results, task: str) -> dict[str, str]:
    """Return the hash of the prompt that each sample's lines were made with.

    Of the cells of earlier runs too: they share their tables with this one's. Raises `UserError` naming
    files and lines where two lines of a sample differ.
    """
    found: dict[str, str] = {}
    cells = dict.fromkeys([*results.info.get("cells", []), *(cell.name for cell in settings.cells)])
    results.read_ahead(task, cells)
    for cell in cells:
        records = results.records(task, cell)
        for sample, made_of in zip(records.values("id"), records.values("prompt_hash"), strict=True):
            if found.setdefault(sample, made_of) != made_of:
                raise UserError(
                    f"{results.folder} holds lines of task {task}, sample {sample!r} that were made "
                    f"with different prompts (one is of {cell}): they cannot be compared.\n"
                    f"{foreign_listed(results.folder)}\nOr delete that folder, or choose another "
                    "output_dir."
                )
    return found
