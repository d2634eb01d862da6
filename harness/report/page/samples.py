"""What the sample browser shows: one sample at a time, with every cell's answer beside the others.

The page holds the samples itself while they are few. Beyond that they lie in files beside it, one a
task, which the page loads when the task is chosen. A page opened from the disk may read no other file,
but may run scripts, so these files are scripts that hand their samples over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.metric import Metric
from harness.columnar import Records
from harness.judgement import FlipRule
from harness.prompts import CHARACTERS, Prompts
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
    make: Callable[[], str]
    """Makes what `content` is: of very many samples only one task's are held at a time."""
    file: str = ""
    """Where they lie beside the page; empty where the page holds them."""

    @property
    def content(self) -> str:
        """An object, safe inside a script of a page."""
        return self.make()

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
    found = [
        TaskSamples(task, count, partial(_content, run, task, changed))
        for task in run.tasks
        if (count := len({name for cell in run.cells for name in _ids(run, task, cell)}))
    ]
    made: list[TaskSamples] = []
    size = 0
    for one in found:
        content = one.content
        size += len(content.encode())
        if size > INLINE:
            return [replace(each, file=f"{FOLDER}/{slug}/{each.task}.js") for each in found]
        made.append(replace(one, make=content.__str__))
    return made


def embedded(value: Any) -> str:
    """Return a value as JSON that is safe inside a script: no text of it can end the script."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def visible(text: str) -> str:
    """Return a text with its control characters shown, line ends and tabs aside."""
    return text if text.isprintable() else text.translate(_CONTROLS)


def _ids(run: Run, task: str, cell: str) -> list[str]:
    return Records.of(run.of(task, cell)).samples()[0]


def _content(run: Run, task: str, changed: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    found: dict[str, dict[str, Any]] = {}
    prompts = run.prompts(task)
    for place, cell in enumerate(run.cells):
        records = Records.of(run.of(task, cell))
        flipped = changed.get((task, cell), {})
        columns = map(records.values, ("id", "seed", "prediction"))
        for row, (sample, seed, text, *numbers) in enumerate(
            zip(*columns, *_numbers(run.metrics[task], records), strict=True)
        ):
            if sample not in found:
                found[sample] = _asked(records[row], prompts)
            if kind := flipped.get(sample):
                found[sample]["flips"][place] = kind
            found[sample]["outputs"].append([place, seed, _cut(text), *numbers])
    return embedded({"samples": [*found.values()]})


def _asked(first: Record, prompts: Prompts) -> dict[str, Any]:
    """Return what a sample was asked, from its first record, and room for how it was answered."""
    prompt = prompts.get((first.id, first.prompt_hash))
    more = len(first.answers) - ANSWERS
    return {
        "id": visible(first.id),
        "tokens": first.prompt_tokens,
        "prompt": prompt and [_cut(prompt.head, CHARACTERS * 2), _cut(prompt.tail, CHARACTERS * 2)],
        "answers": [_cut(answer) for answer in first.answers[:ANSWERS]]
        + ([f"… and {more:,} more"] if more > 0 else []),
        "flips": {},
        "outputs": [],
    }


def _numbers(metric: Metric, records: Records) -> Iterable[list[str]]:
    """Yield scores, KL and lengths of answers as they are shown; empty where not recorded."""
    scores = records.numbers("score").tolist()
    if not metric.parts:
        yield [""] * len(scores)
    elif metric.averaged:
        yield ["" if math.isnan(score) else f"{100 * score:.1f}" for score in scores]
    else:
        yield ["" if math.isnan(score) else f"{score:.4g}" for score in scores]
    yield ["" if kl is None else f"{kl:.4f}" for kl in records.values("kl_to_full")]
    yield [str(tokens) for tokens in records.values("generated_tokens")]


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
