"""The loop of a run: sample by sample, one prefill for all cells, a line for each as it finishes.

A killed run loses at most the sample it was at. Running again skips every (cell, seed, sample) that
has its line; when nothing is left to do, the model is not even loaded.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines.full import Full
from benchmarks.task import Encoded, Sample, Task
from harness.cells import Cell
from harness.provenance import check_resumable, fingerprint, read_run, write_run
from harness.records import Record, append_record, prediction_path, read_records
from harness.settings import Settings
from kvmerge.budget import Budget
from kvmerge.engine import RowResult, Stop, Timing, run_sample, score_continuation
from kvmerge.errors import UserError
from kvmerge.models import load, stop_token_ids
from kvmerge.session import Row


@dataclass(frozen=True)
class Job:
    """One sample and the cells, with seeds, that still lack its line."""

    task: Task
    sample: Sample
    missing: tuple[tuple[Cell, int], ...]


def run(settings: Settings) -> None:
    """Run everything that has no line yet; results go to `settings.results_dir`.

    Raises:
        UserError: if data, weights or settings cannot be used, or the folder holds results made
            with other settings. What is finished stays.
    """
    started = time.perf_counter()
    _refuse_mixed(settings)
    jobs, counts = pending(settings)
    notes = settings.benchmark.notes()
    run_file = settings.results_dir / "run.json"
    prints = check_resumable(run_file, fingerprint(settings, settings.benchmark.fingerprint()))
    if not jobs:
        # a shard that got no samples of a task still shares its run's tasks and cells
        if read_run(run_file).get("fingerprint") != prints:
            write_run(settings, run_file, prints, counts, notes, seconds=0.0)
        return
    write_run(settings, run_file, prints, counts, notes)
    model, tokenizer = load(settings.model)
    work = sum(len(job.missing) for job in jobs)
    with tqdm(total=len(jobs), unit="sample", desc=f"{work} answers", smoothing=0.05) as bar:
        for task, of_task in groupby(jobs, key=lambda job: job.task):
            for job in of_task:
                bar.set_postfix_str(task.name)
                for cell, record in answer(settings, model, tokenizer, job):
                    path = prediction_path(settings.results_dir, job.task.name, cell.name)
                    append_record(path, record)
                bar.update()
    write_run(
        settings, run_file, prints, counts, notes, seconds=round(time.perf_counter() - started, 1)
    )


def _refuse_mixed(settings: Settings) -> None:
    """Refuse to share an output_dir between a whole run and shards, or between two splits.

    They would overlap, and the report could not merge them.
    """
    folder = settings.output_dir
    found = {path.name.partition("-of-")[2] for path in folder.glob("shards/*-of-*")}
    if (folder / "predictions").exists():
        found.add("1")
    others = sorted(found - {str(settings.num_shards)})
    if others:
        raise UserError(
            f"{folder} holds results of num_shards={others[0]}, so num_shards={settings.num_shards} "
            "cannot be added to it. Go on with the former, or choose another output_dir."
        )


def pending(settings: Settings) -> tuple[list[Job], dict[str, int]]:
    """The samples with lines missing, task by task in the benchmark's order.

    Returns:
        the jobs; how many samples each task has in all, whatever this run takes of them.
    """
    jobs = []
    counts = {}
    for task in settings.benchmark.tasks:
        done: set[tuple[str, int, str]] = set()
        for cell in settings.cells:
            path = prediction_path(settings.results_dir, task.name, cell.name)
            done |= {(cell.name, record.seed, record.id) for record in read_records(path)}
        samples = settings.benchmark.samples(task)
        counts[task.name] = len(samples)
        for sample in settings.of_run(samples):
            missing = tuple(
                (cell, seed)
                for cell in settings.cells
                for seed in settings.seeds(cell)
                if (cell.name, seed, sample.id) not in done
            )
            if missing:
                jobs.append(Job(task, sample, missing))
    return jobs, counts


def answer(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job
) -> list[tuple[Cell, Record]]:
    """Answer one sample with every missing cell, in one shared prefill."""
    encoded = settings.benchmark.encode(job.sample, job.task, tokenizer, settings.prompt_format)
    rows = [settings.row(cell, seed) for cell, seed in job.missing]
    reference = None
    if settings.fidelity:
        full = [index for index, (cell, _) in enumerate(job.missing) if cell.is_full]
        reference = full[0] if full else len(rows)
        if not full:  # its answer is needed but not asked for, or already recorded
            rows.append(Row(Full(), Budget.parse(1)))
    prompt = torch.tensor([encoded.prompt], device=model.device)
    named: dict[str, Any] = {
        "sample_id": f"{settings.benchmark.name}/{job.task.name}/{job.sample.id}",
        "reference": reference,
    }
    try:
        if encoded.continuation is None:
            stop = stop_rule(settings, model, tokenizer, job.task)
            results, timing = run_sample(model, prompt, rows, stop, **named)
        else:
            results, timing = score_continuation(model, prompt, encoded.continuation, rows, **named)
    except UserError as error:
        length = len(encoded.prompt)
        where = f"task {job.task.name}, sample {job.sample.id!r} ({length} prompt tokens)"
        raise UserError(f"{where}: {error}") from error
    return [
        (cell, _record(settings, tokenizer, job, encoded, cell, seed, result, timing))
        for (cell, seed), result in zip(job.missing, results, strict=False)
    ]


def stop_rule(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> Stop:
    """When answers of a task end: the model's end tokens, and for some tasks a newline."""
    ids = stop_token_ids(model, tokenizer, settings.model)
    if task.stop_at_newline:
        ids |= {tokenizer.encode("\n", add_special_tokens=False)[-1]}
    return Stop(task.max_new_tokens, ids, task.min_new_tokens)


def _record(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    encoded: Encoded,
    cell: Cell,
    seed: int,
    result: RowResult,
    timing: Timing,
) -> Record:
    length = len(encoded.prompt)
    prediction = str(tokenizer.decode(result.token_ids, skip_special_tokens=True))
    marks = _marks(settings, job, encoded, prediction, result)
    groups = {"groups": dict(job.sample.groups)} if job.sample.groups else {}
    counts = [count for layer in result.stats.entries for count in layer]
    kept = sum(counts) / len(counts)
    stood_for = None
    if result.stats.represented is not None:
        sums = [count for layer in result.stats.represented for count in layer]
        stood_for = sum(sums) / len(sums)
    fidelity = result.fidelity
    return Record(
        id=job.sample.id,
        seed=seed,
        prediction=prediction,
        answers=job.sample.answers,
        score=marks["score"],
        prompt_hash=prompt_hash(encoded.prompt),
        prompt_tokens=length,
        generated_tokens=len(result.token_ids),
        kept_entries=kept,
        budget_achieved=kept / length,
        kv_bytes=result.stats.kv_bytes,
        kl_to_full=fidelity.kl if fidelity else None,
        top1_agreement=fidelity.top1 if fidelity else None,
        fidelity_tokens=fidelity.tokens if fidelity else None,
        requested_entries=cell.budget.entries(length),
        kept_entries_by_layer=[sum(layer) / len(layer) for layer in result.stats.entries],
        kept_entries_min=min(counts),
        kept_entries_max=max(counts),
        kv_bytes_full=result.stats.kv_bytes // sum(counts) * length * len(counts),
        size_bytes=result.stats.size_bytes,
        merged_tokens=None if stood_for is None else stood_for - kept,
        evicted_tokens=None if stood_for is None else length - stood_for,
        prefill_seconds=round(timing.prefill, 4),
        decode_seconds=round(timing.decode, 4),
        extra={key: value for key, value in marks.items() if key != "score"} | groups,
    )


def _marks(
    settings: Settings, job: Job, encoded: Encoded, prediction: str, result: RowResult
) -> Mapping[str, float]:
    """The score and its parts: the benchmark's, or those of the continuation's probability."""
    if encoded.continuation is None or result.nll is None:
        return settings.benchmark.score(job.sample, job.task, prediction)
    tokens = len(encoded.continuation)
    return {"score": math.exp(result.nll / tokens), "nll": result.nll, "tokens": tokens}


def prompt_hash(ids: list[int]) -> str:
    """Short digest of the tokens fed to prefill."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
