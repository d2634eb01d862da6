"""From jobs to records: samples are encoded, run in batches, and their results written down."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baselines.full import Full
from benchmarks.questions import question_start
from benchmarks.task import Encoded, Sample, Task
from harness.batching import BatchSize
from harness.prompts import Prompt
from harness.records import KL_DECIMALS, Record
from harness.settings import Settings
from kvmerge.budget import Budget
from kvmerge.cells import Cell
from kvmerge.engine import (
    Request,
    Result,
    RowResult,
    Stop,
    Timing,
    run_samples,
    score_continuations,
)
from kvmerge.errors import UserError, is_out_of_memory
from kvmerge.kernels.packed_linear import PackedLinear
from kvmerge.models import stop_token_ids
from kvmerge.proof import UnprovenError
from kvmerge.session import Row, mean_of

Lines = list[tuple[Cell, Record]]


@dataclass(frozen=True)
class Job:
    """One sample and the cells, with seeds, that still lack its line."""

    task: Task
    sample: Sample
    missing: tuple[tuple[Cell, int], ...]
    recorded: str | None = None
    """Hash of the prompt that its finished lines were made with; None if there are none."""
    unit: int = 0
    """Number of the unit of work that it belongs to, among those of its task."""


@dataclass(frozen=True)
class Prepared:
    """A job, ready for the engine."""

    job: Job
    encoded: Encoded
    request: Request

    @property
    def entries(self) -> int:
        """Entries per KV head and layer that all its rows may hold in the end."""
        more = self.encoded.question_tokens + self.job.task.max_new_tokens
        length = len(self.encoded.context)
        return sum(row.budget.entries(length) + more for row in self.request.rows)

    @property
    def caches(self) -> object:
        """What two samples have alike that one prefill serves."""
        return self.request.sample_id, self.job.missing


class Answerer:
    """Answers jobs with a loaded model."""

    def __init__(
        self, settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.settings = settings
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = BatchSize(settings.batch_size, model, settings.rows)
        self.packed = any(isinstance(module, PackedLinear) for module in model.modules())

    def answer(self, jobs: Sequence[Job]) -> Iterator[tuple[Prompt, Lines]]:
        """Answer jobs of one task with every missing cell; yields prompt and lines of each.

        In order, but that under `question=after` those of one context come together: one prefill
        serves them.
        """
        waiting: list[list[Prepared]] = []
        is_after = self.settings.question == "after"
        prepared = map(self._prepare, together(jobs) if is_after else jobs)
        coming = (list(group) for _, group in groupby(prepared, key=lambda each: each.caches))
        while True:
            while len(waiting) < self.batch_size.most and (group := next(coming, None)) is not None:
                waiting.append(group)
            if not waiting:
                return
            taken = self.batch_size.take([max(each.entries for each in group) for group in waiting])
            batch = [each for group in waiting[:taken] for each in group]
            try:
                results = self._run(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                results = None  # after this block nothing holds what the batch had allocated
            if results is None:
                self.batch_size.shrink(taken)
                continue
            rows = sum(len(group[0].request.rows) for group in waiting[:taken])
            del waiting[:taken]
            for each, result in zip(batch, results, strict=True):
                yield self._prompt(each), self._lines(each, result, (taken, rows))

    def _prepare(self, job: Job) -> Prepared:
        settings = self.settings
        encoded = encode(settings, self.tokenizer, job)
        rows = [settings.row(cell, seed) for cell, seed in job.missing]
        reference = None
        if settings.fidelity:
            full = [index for index, (cell, _) in enumerate(job.missing) if cell.is_full]
            reference = full[0] if full else len(rows)
            if not full:  # its answer is needed but not asked for, or already recorded
                rows.append(Row(Full(), Budget.parse(1)))
        device = self.model.device
        context, asked = (
            torch.tensor([ids], device=device) for ids in (encoded.context, encoded.question)
        )
        # what is drawn for a context must not depend on which of its questions comes first
        name = f"context {prompt_hash(encoded.context)}" if encoded.question_tokens else job.sample.id
        sample_id = f"{settings.benchmark.name}/{job.task.name}/{name}"
        request = Request(
            context,
            rows,
            sample_id,
            reference,
            policy=settings.policy,
            context=settings.model.context,
            may_overrun=job.task.may_overrun,
            question=asked if encoded.question_tokens else None,
        )
        return Prepared(job, encoded, request)

    def _run(self, batch: Sequence[Prepared]) -> list[Result]:
        requests = [prepared.request for prepared in batch]
        texts = [prepared.encoded.continuation for prepared in batch]
        try:
            if any(text is None for text in texts):
                stop = stop_rule(self.settings, self.model, self.tokenizer, batch[0].job.task)
                return run_samples(self.model, requests, stop)
            return score_continuations(self.model, requests, [text or [] for text in texts])
        except UnprovenError:
            raise  # it names the cell and the sample
        except UserError as error:
            where = "; ".join(place(each.job, len(each.encoded.prompt)) for each in batch)
            raise type(error)(f"{where}: {error}") from error

    def _prompt(self, prepared: Prepared) -> Prompt:
        ids = prepared.encoded.prompt
        return Prompt.of(self.tokenizer, prepared.job.sample.id, prompt_hash(ids), ids)

    def _lines(self, prepared: Prepared, result: Result, batch: tuple[int, int]) -> Lines:
        """Return the lines of a sample that ran in a batch of so many samples and rows."""
        results, timing = result
        return [
            (cell, self._record(prepared, cell, seed, of_row, timing, batch))
            for (cell, seed), of_row in zip(prepared.job.missing, results, strict=False)
        ]

    def _record(
        self,
        prepared: Prepared,
        cell: Cell,
        seed: int,
        result: RowResult,
        timing: Timing,
        batch: tuple[int, int],
    ) -> Record:
        job, encoded = prepared.job, prepared.encoded
        length = len(encoded.context)
        prediction = str(self.tokenizer.decode(result.token_ids, skip_special_tokens=True))
        marks = self._marks(job, encoded, prediction, result)
        groups = {"groups": dict(job.sample.groups)} if job.sample.groups else {}
        counts = [count for layer in result.stats.entries for count in layer]
        kept = result.stats.kept_entries
        represented, read = result.stats.represented, result.stats.read
        stood_for = None if represented is None else mean_of(represented)
        fidelity = result.fidelity
        return Record(
            id=job.sample.id,
            seed=seed,
            prediction=prediction,
            answers=job.sample.answers,
            score=marks["score"],
            prompt_hash=prompt_hash(encoded.prompt),
            prompt_tokens=len(encoded.prompt),
            context_hash=context_hash(job.sample),
            context_tokens=length,
            question_tokens=encoded.question_tokens,
            generated_tokens=len(result.token_ids),
            kept_entries=kept,
            budget_achieved=kept / length,
            kv_bytes=result.stats.kv_bytes + result.stats.local_bytes,
            kl_to_full=round(fidelity.kl, KL_DECIMALS) if fidelity else None,
            top1_agreement=fidelity.top1 if fidelity else None,
            fidelity_tokens=fidelity.tokens if fidelity else None,
            requested_entries=cell.budget.entries(length),
            kept_entries_by_layer=[sum(layer) / len(layer) for layer in result.stats.entries],
            kept_entries_min=min(counts),
            kept_entries_max=max(counts),
            read_entries=None if read is None else mean_of(read),
            kv_bytes_full=result.stats.full_bytes(length),
            size_bytes=result.stats.size_bytes,
            merged_tokens=None if stood_for is None else stood_for - kept,
            evicted_tokens=None if stood_for is None else length - stood_for,
            prefill_seconds=round(timing.prefill, 4),
            decode_seconds=round(timing.decode, 4),
            finish_reason=result.finish_reason,
            batch_samples=batch[0],
            batch_rows=batch[1],
            threads=torch.get_num_threads(),
            kernel=self._kernel(result),
            extra={key: value for key, value in marks.items() if key != "score"} | groups,
        )

    def _kernel(self, result: RowResult) -> str:
        packed = "+packed" if self.packed else ""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{','.join(sorted(result.stats.kernels))}{packed}/{dtype}"

    def _marks(
        self, job: Job, encoded: Encoded, prediction: str, result: RowResult
    ) -> Mapping[str, float]:
        """Return the score and its parts: the benchmark's, or those of a continuation's probability."""
        if encoded.continuation is None or result.nll is None:
            return self.settings.benchmark.score(job.sample, job.task, prediction)
        return job.task.metric.sample(result.nll, len(encoded.continuation))


def place(job: Job, length: int) -> str:
    """Name a sample, with its prompt's tokens, for messages."""
    return f"task {job.task.name}, sample {job.sample.id!r} ({length} prompt tokens)"


def encode(settings: Settings, tokenizer: PreTrainedTokenizerBase, job: Job) -> Encoded:
    """Return a sample as token ids, its question apart under `question=after`.

    Raises:
        UserError: if it has lines that were made with another prompt, or its question cannot be found.
    """
    encoded = settings.benchmark.encode(job.sample, job.task, tokenizer, settings.prompt_format)
    if job.recorded not in (None, prompt_hash(encoded.prompt)):
        raise UserError(
            f"task {job.task.name}, sample {job.sample.id!r}: the prompt is not the one that "
            f"{settings.results_dir} holds results of. The chat template may write today's date "
            "(fix it, e.g. model.template_options.date_string='26 Jul 2024'), or the tokenizer or "
            "the rows changed. Undo that, or choose another output_dir."
        )
    if settings.question == "inside" or job.sample.question is None:
        return encoded
    try:
        start = question_start(tokenizer, encoded.prompt, job.sample.question)
    except UserError as error:
        raise UserError(f"task {job.task.name}, sample {job.sample.id!r}: {error}") from error
    return replace(encoded, question_tokens=len(encoded.prompt) - start)


def together(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs with those of one context beside each other, in the order of their first ones."""
    by_context: dict[str, list[Job]] = {}
    for job in jobs:
        by_context.setdefault(shared_context(job), []).append(job)
    return [job for of_context in by_context.values() for job in of_context]


def shared_context(job: Job) -> str:
    """Return the text that a sample shares with others under `question=after`; its own id if none."""
    return job.sample.context or job.sample.id


def stop_rule(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> Stop:
    """Return when answers of a task end: the model's end tokens, and for some tasks a newline."""
    ids = stop_token_ids(model, tokenizer, settings.model)
    if task.stop_at_newline:
        ids |= {tokenizer.encode("\n", add_special_tokens=False)[-1]}
    return Stop(task.max_new_tokens, ids, task.min_new_tokens)


def prompt_hash(ids: list[int]) -> str:
    """Return a short digest of the tokens fed to prefill."""
    return _digest(",".join(map(str, ids)))


def context_hash(sample: Sample) -> str | None:
    """Return a short digest of a sample's context; of its text, which no cut of a prompt changes."""
    return None if sample.context is None else _digest(sample.context)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
