"""What the sample browser shows: one sample at a time, with every cell's answer beside the others.

The page holds the samples itself while they are few. Beyond that they lie in files beside it, one a
task, which the page loads when the task is chosen. A page opened from the disk may read no other file,
but may run scripts, so these files are scripts that hand their samples over.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.judgement import FlipRule
from harness.prompts import CHARACTERS
from harness.records import Record
from harness.report.flips import flips
from harness.report.missed import shown_name
from harness.report.run import Run
from kvmerge.files import write_atomically

FOLDER = "report_samples"
INLINE = 3_000_000
"""Bytes of samples that a page holds itself; those of a report that has more lie beside it."""
TEXT = 4_000
"""Characters of an answer that are shown; the whole of it is in predictions/."""
ANSWERS = 20
"""Gold answers of a sample that are shown."""

# What would be invisible, or end a text early: shown by the picture that Unicode has of it.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


@dataclass(frozen=True)
class TaskSamples:
    """The samples of one task, as JSON."""

    task: str
    count: int
    content: str
    """An object, safe inside a script of a page."""
    file: str = ""
    """Where they lie beside the page; empty where the page holds them."""

    def write(self, out: Path, slug: str) -> None:
        """Write the file beside the page, where there is one."""
        if self.file:
            call = f"kvmergeSamples({embedded(slug)}, {embedded(self.task)}, {self.content});\n"
            write_atomically(out / self.file, call)

    @property
    def url(self) -> str:
        """The file's address, as the page has it."""
        return quote(self.file)


def task_samples(run: Run, rule: FlipRule, slug: str) -> list[TaskSamples]:
    """Return the samples of every task that has records.

    Args:
        run: what was answered.
        rule: which samples count as lost or gained.
        slug: names the run's folder, where samples lie beside the page.
    """
    changed: Mapping[tuple[str, str], dict[str, str]] = {
        (one.task, one.cell): dict.fromkeys(one.lost, "lost") | dict.fromkeys(one.gained, "gained")
        for one in flips(run, rule)
    }
    found = [_of_task(run, task, changed) for task in run.tasks]
    found = [samples for samples in found if samples.count]
    if sum(len(samples.content.encode()) for samples in found) <= INLINE:
        return found
    return [
        TaskSamples(one.task, one.count, one.content, f"{FOLDER}/{slug}/{one.task}.js") for one in found
    ]


def embedded(value: Any) -> str:
    """Return a value as JSON that is safe inside a script: no text of it can end the script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def visible(text: str) -> str:
    """Return a text with its control characters shown, line ends and tabs aside."""
    return text.translate(_CONTROLS)


def _of_task(run: Run, task: str, changed: Mapping[tuple[str, str], Mapping[str, str]]) -> TaskSamples:
    by_sample: dict[str, list[tuple[int, Record]]] = defaultdict(list)
    for place, cell in enumerate(run.cells):
        for record in run.of(task, cell):
            by_sample[record.id].append((place, record))
    samples = [_sample(run, task, sample, outputs, changed) for sample, outputs in by_sample.items()]
    return TaskSamples(task, len(samples), embedded({"samples": samples}))


def _sample(
    run: Run,
    task: str,
    sample: str,
    outputs: Sequence[tuple[int, Record]],
    changed: Mapping[tuple[str, str], Mapping[str, str]],
) -> dict[str, Any]:
    first = outputs[0][1]
    prompt = run.prompts(task).get((sample, first.prompt_hash))
    more = len(first.answers) - ANSWERS
    flipped = {
        place: kind
        for place, cell in enumerate(run.cells)
        if (kind := changed.get((task, cell), {}).get(sample))
    }
    return {
        "id": visible(sample),
        "tokens": first.prompt_tokens,
        "prompt": prompt and [_cut(prompt.head, CHARACTERS * 2), _cut(prompt.tail, CHARACTERS * 2)],
        "answers": [_cut(answer) for answer in first.answers[:ANSWERS]]
        + ([f"… and {more:,} more"] if more > 0 else []),
        "flips": flipped,
        "outputs": [
            [place, record.seed, _cut(record.prediction), *_numbers(run, task, record)]
            for place, record in outputs
        ],
    }


def _numbers(run: Run, task: str, record: Record) -> Iterable[str]:
    """Yield the score, KL and length of an answer as they are shown; empty where not recorded."""
    metric = run.metrics[task]
    if not metric.parts or math.isnan(record.score):
        yield ""
    else:
        yield f"{100 * record.score:.1f}" if metric.averaged else f"{record.score:.4g}"
    yield "" if record.kl_to_full is None else f"{record.kl_to_full:.4f}"
    yield str(record.generated_tokens)


def _cut(text: str, most: int = TEXT) -> str:
    """Return a text as it is shown, cut where it is too long, which it then says."""
    more = len(text) - most
    return visible(text) if more <= 0 else f"{visible(text[:most])} … [{more:,} characters more]"


def browser_of(run: Run, samples: Sequence[TaskSamples], rule: FlipRule, slug: str) -> dict[str, Any]:
    """Return what the page must know before any sample is loaded."""
    return {
        "slug": slug,
        "cells": [visible(shown_name(run, cell)) for cell in run.cells],
        "full": -1 if run.full_cell is None else run.cells.index(run.full_cell),
        "rule": rule.sentence,
        "tasks": [
            {"task": one.task, "name": visible(one.task), "count": one.count, "file": one.url}
            for one in samples
        ],
    }
