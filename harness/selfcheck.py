"""The gate for the whole path: what a person runs before a long run, ten minutes on one card.

It loads the model once, makes the checks of `harness.checks` on the first samples of a few tasks, runs
these samples as an ordinary run in a folder below, and ends with one sentence: go, or what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.answering import stop_rule
from harness.checks import (
    Budgets,
    Check,
    Compression,
    PlainTokens,
    Prompt,
    Status,
    cell_answers,
    full_budgets,
    golden_prompts,
    plain_answer,
    published_scores,
    rounding,
    unproven,
)
from harness.lock import only_writer
from harness.plan.show import print_plan
from harness.report.export.markdown import markdown_table
from harness.report.gates import sampled_gates
from harness.report.published import load_references
from harness.report.run import load_run
from harness.results import Results
from harness.runner import left, run
from harness.settings import Settings
from kvmerge.errors import UserError, is_out_of_memory
from kvmerge.files import remove_leftovers, write_atomically
from kvmerge.limits import check_fits
from kvmerge.models import load
from kvmerge.proof import UnprovenError
from kvmerge.resolve import build

_MOST_TASKS = 3
"""Tasks of a benchmark that the options do not name."""
_HEADER = ("check", "looked at", "verdict", "found")
_STYLES = {Status.PASSED: "green", Status.FAILED: "bold red", Status.NOT_APPLICABLE: "yellow"}


@dataclass(frozen=True)
class Verdict:
    """All checks, and what they come to."""

    checks: Sequence[Check]

    @property
    def go(self) -> bool:
        """Whether nothing failed."""
        return all(check.status is not Status.FAILED for check in self.checks)

    @property
    def sentence(self) -> str:
        """Go, and what could not be told; or stop, and what is wrong."""
        of = {status: [c for c in self.checks if c.status is status] for status in Status}
        if failed := of[Status.FAILED]:
            return f"Stop: {'; '.join(f'{check.name}: {check.found}' for check in failed)}."
        sentence = f"Go: {', '.join(check.name for check in of[Status.PASSED])} passed."
        if unclear := of[Status.NOT_APPLICABLE]:
            sentence += f" Not told: {'; '.join(f'{c.name} ({c.found})' for c in unclear)}."
        return sentence


def selfcheck(settings: Settings, console: Console) -> None:
    """Make every check, write selfcheck.json and selfcheck.md, and say go.

    Raises:
        UserError: with the sentence that says what is wrong, or if the checks cannot be made.
    """
    settings = samples_run(settings)
    folder = settings.output_dir.parent
    if settings.dry_run:
        print_plan(settings, console)
        console.print(
            f"before it: the same prompts answered by plain generate and by every cell, "
            f"{_options_tokens(settings)} tokens each; then {folder / 'selfcheck.md'}",
            soft_wrap=True,
            highlight=False,
        )
        return
    with only_writer(settings.results_dir):
        remove_leftovers(settings.results_dir)
        # what the run would refuse is refused before the checks, not after them
        found = left(settings, downloads=True)
        model, tokenizer = load(settings.model, found.model)
        golden, golden_ids = golden_prompts(settings, tokenizer)
        checks, pace = [golden], ""
        try:
            checks += _checks_on_prompts(settings, model, tokenizer)
            results = run(settings, loaded=(model, tokenizer))
            results.failures.check()
        except UnprovenError as error:
            checks.append(unproven(settings, error))
        else:
            gates = sampled_gates(load_run(settings.output_dir, results), load_references())
            checks.append(published_scores(gates))
            pace = whole_tasks(results)
        verdict = Verdict(checks)
        _write(settings, verdict, pace, golden_ids)
    _show(verdict, pace, console)
    console.print(f"  {folder / 'selfcheck.md'}", soft_wrap=True, highlight=False)
    if not verdict.go:
        raise UserError(verdict.sentence)
    console.print(Text(verdict.sentence, "bold green"), soft_wrap=True)


def samples_run(settings: Settings) -> Settings:
    """Return the ordinary run of a selfcheck's samples: its tasks, in a folder below.

    Raises:
        UserError: for settings that no selfcheck can take.
    """
    assert settings.selfcheck is not None
    if settings.num_shards > 1:
        raise UserError(
            f"num_shards={settings.num_shards}: a selfcheck is one process. Leave it out, and shard "
            "the run that comes after it."
        )
    if not any(cell.is_full for cell in settings.cells):
        raise UserError("a selfcheck compares with the full cache: add full@1 to the cells.")
    resolved = dict(settings.resolved)
    benchmark = dict(resolved["benchmark"])
    if benchmark.get("tasks") is None and "tasks" in benchmark:
        every = [task.name for task in settings.benchmark.tasks]
        benchmark["tasks"] = settings.selfcheck.tasks.get(settings.benchmark.name, every[:_MOST_TASKS])
    resolved["benchmark"] = benchmark
    return replace(
        settings,
        benchmark=build(benchmark, "benchmark"),
        output_dir=settings.output_dir / "run",
        resolved=resolved,
    )


def _checks_on_prompts(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Check]:
    """Make the checks that look at what the model does with prompts."""
    count = _options_tokens(settings)
    by_task = list(_prompts(settings, model, tokenizer))
    plain_tokens, budgets = PlainTokens(count), Budgets(model, settings.policy)
    compression = Compression()
    prompts = [prompt for of_task in by_task for prompt in of_task]
    for prompt in tqdm(prompts, unit="prompt", desc="engine beside plain generate"):
        try:
            plain = plain_answer(model, prompt, count)
            answers = cell_answers(model, settings, prompt, count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"memory ran out on {prompt.name} ({prompt.length} tokens) with "
                f"{len(settings.cells)} cells. Give fewer cells, or a lower model.max_length."
            ) from error
        full = next(iter(answers.values()))
        allowed = rounding(settings, model, plain.logits)
        plain_tokens.see(prompt, plain, full, allowed)
        for cell in settings.cells:
            answer = answers[cell.name]
            assert answer.stats is not None
            budgets.see(prompt, cell, answer.stats)
            if not cell.is_full:
                compression.see(prompt, cell, full, answer, allowed)
    firsts = [of_task[0] for of_task in by_task if of_task]
    return [
        plain_tokens.check(),
        budgets.check(),
        compression.check(),
        full_budgets(model, settings, firsts, count),
    ]


def _prompts(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Prompt]]:
    """Encode the samples of each task. Raises `UserError` for what the model cannot hold."""
    count = _options_tokens(settings)
    for task in settings.benchmark.tasks:
        stop_ids = stop_rule(settings, model, tokenizer, task).token_ids
        prompts = []
        for sample in settings.samples(task):
            ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
            name = f"{task.name}/{sample.id}"
            try:
                check_fits(
                    model.config,
                    len(ids),
                    count,
                    context=settings.model.context,
                    may_overrun=task.may_overrun,
                )
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
            tensor = torch.tensor([ids], device=model.device)
            sample_id = f"{settings.benchmark.name}/{name}"
            prompts.append(Prompt(name, sample_id, task, tensor, stop_ids))
        yield prompts


def whole_tasks(results: Results) -> str:
    """Say how long all samples of the tasks would take at the pace of those that were run."""
    info = results.info
    seconds = sum(stretch.get("seconds") or 0.0 for stretch in info.get("runs", []))
    cell = info["cells"][0]
    done = sum(len(results.records(task, cell)) for task in info["tasks"])
    total = sum(task.get("samples", 0) for task in info["tasks"].values())
    if not done or not seconds:
        return ""
    pace = seconds / done
    whole = timedelta(seconds=round(total * pace))
    text = (
        f"{pace:.1f} s a sample for {len(info['cells'])} cells together: all {total:,} samples of "
        f"{', '.join(info['tasks'])} would take {whole}."
    )
    if torch.cuda.is_available():
        text += f" Most GPU memory in use: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB."
    return text


def _options_tokens(settings: Settings) -> int:
    assert settings.selfcheck is not None
    return settings.selfcheck.tokens


def _write(
    settings: Settings, verdict: Verdict, pace: str, golden_ids: Sequence[Sequence[int]]
) -> None:
    folder = settings.output_dir.parent
    content: dict[str, Any] = {
        "verdict": "go" if verdict.go else "stop",
        "sentence": verdict.sentence,
        "model": settings.model.name,
        "benchmark": settings.benchmark.name,
        "tasks": [task.name for task in settings.benchmark.tasks],
        "limit": settings.limit,
        "cells": [cell.name for cell in settings.cells],
        "checks": [asdict(check) for check in verdict.checks],
        "pace": pace,
        "golden_ids": golden_ids,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(folder / "selfcheck.json", text + "\n")
    rows = [(c.name, c.looked_at, str(c.status), c.found) for c in verdict.checks]
    lines = [
        f"# {settings.model.name} on {settings.benchmark.name}",
        f"**{verdict.sentence}**",
        markdown_table(_HEADER, rows, numeric=()).rstrip(),
        *([pace] if pace else []),
        "What was run, and how: `run/run.json`.",
    ]
    write_atomically(folder / "selfcheck.md", "\n\n".join(lines) + "\n")


def _show(verdict: Verdict, pace: str, console: Console) -> None:
    table = Table(title="Selfcheck", title_justify="left")
    for column in _HEADER:
        table.add_column(column, overflow="fold")
    for check in verdict.checks:
        table.add_row(
            *map(Text, (check.name, check.looked_at, str(check.status), check.found)),
            style=_STYLES[check.status],
        )
    console.print(table)
    if pace:
        console.print(pace, style="dim", soft_wrap=True, highlight=False)
