"""One table of cells that were run apart: in one folder by several commands, or in several folders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.columnar import Records
from harness.records import Record
from harness.report.run import Run
from harness.results import changed_prints
from kvmerge.errors import UserError

_WHERE = ("device", "model.device", "model.device_map")
"""Parts of a fingerprint that say where a run ran: another machine rounds otherwise, and is named."""
_AS_LONG = 1e-5
"""Share of its value by which a perplexity differs between machines (docs/results.md)."""


def join_all(runs: Sequence[Run]) -> list[Run]:
    """Join the runs of each model and benchmark, in the order of the first of each.

    Raises:
        UserError: as `join` does.
    """
    return [join(group) for group in grouped(runs)]


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs of each model and benchmark together, in the order of the first of each."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.benchmark), []).append(run)
    return list(groups.values())


def join(runs: Sequence[Run]) -> Run:
    """Put the cells of several runs of one model and benchmark into one run.

    A cell that several have keeps the lines of the first, and gains those that only a later one holds,
    unless its method or settings are others there. Comparisons are paired, so they rest on the samples
    that two cells both hold.

    Raises:
        UserError: naming the folders, the setting and its two values where runs do not compare: by all
            that one folder cannot hold two of either, but for where they ran.
    """
    first, *others = runs
    if not others:
        return first
    for run in others:
        for setting, here, there in _changes(first, run):
            if setting not in _WHERE and not setting.startswith(("cells.", "methods.")):
                raise _refusal(first, run, setting, here, there)
    for earlier, later in itertools.combinations(runs, 2):
        _refuse_other_prompts(earlier, later)
    tasks = {task: metric for run in runs for task, metric in run.tasks.items()}
    cells = tuple(dict.fromkeys(cell for run in runs for cell in run.cells))
    remarks: list[str] = []
    records: dict[tuple[str, str], Sequence[Record]] = {}
    for cell in cells:
        records |= _joined_cell(cell, [run for run in runs if cell in run.cells], remarks)
    return replace(
        first,
        info=_joined_info(runs, cells),
        tasks=tasks,
        cells=cells,
        records={
            (task, cell): records[task, cell]
            for task in tasks
            for cell in cells
            if (task, cell) in records
        },
        parts=tuple(part for run in runs for part in run.parts),
        remarks=(
            *(remark for run in runs for remark in run.remarks),
            *remarks,
            *_other_judgements(runs),
        ),
        joined=tuple(runs),
    )


def _changes(first: Run, run: Run) -> Iterator[tuple[str, object, object]]:
    """Yield the settings in which two runs differ, what they judge their common tasks by among them."""
    one, other = (each.recorded("fingerprint") or {} for each in (first, run))
    yield from changed_prints(one, other)
    for task in first.tasks.keys() & run.tasks.keys():
        for key in ("metric", "max_new_tokens"):
            here, there = (each.recorded("tasks", task, key) for each in (first, run))
            if here != there:
                yield f"{key} of {task}", here, there


def _refuse_other_prompts(first: Run, run: Run) -> None:
    """Refuse runs of which a sample was fed as another prompt, as by another tokenizer or template."""
    for task in first.tasks.keys() & run.tasks.keys():
        one, other = (
            {
                key: made_of
                for cell in each.cells
                for key, made_of in Records.of(each.of(task, cell)).distinct("id", "prompt_hash")
            }
            for each in (first, run)
        )
        for name in one.keys() & other.keys():
            if one[name] != other[name]:
                setting = f"the prompt of {task}, sample {name!r}"
                raise _refusal(first, run, setting, one[name], other[name])


def _refusal(first: Run, run: Run, setting: str, here: object, there: object) -> UserError:
    return UserError(
        f"{first.output_dir} and {run.output_dir} differ in {setting} ({here!r} against {there!r}), so "
        "their cells are not put into one table. Run one of them again with the other's settings, or "
        "give --separate for tables of their own."
    )


def _joined_cell(
    cell: str, runs: Sequence[Run], remarks: list[str]
) -> dict[tuple[str, str], Sequence[Record]]:
    """Return a cell's records by task and cell, from all runs that have it; say what differs."""
    first, *others = runs
    if not others:
        return {(task, cell): first.of(task, cell) for task in first.tasks if first.of(task, cell)}
    kept = {task: {(r.id, r.seed): r for r in first.of(task, cell)} for task in first.tasks}
    for run in others:
        changed = [
            f"{setting.partition(f'.{cell}.')[2]} is {there!r} there and {here!r} here"
            for setting, here, there in _changes(first, run)
            if setting.startswith((f"cells.{cell}.", f"methods.{cell}."))
        ]
        if changed:
            remarks.append(
                f"{cell} of {run.output_dir} is left out, as it is not that of {first.output_dir}: "
                f"{', '.join(changed)}."
            )
            continue
        both = differing = 0
        for task in run.tasks:
            held = kept.setdefault(task, {})
            for record in run.of(task, cell):
                known = held.setdefault((record.id, record.seed), record)
                both += known is not record
                differing += known is not record and not _alike(known, record)
        if differing:
            remarks.append(
                f"{cell}: {differing} of the {both} answers that {first.output_dir} and "
                f"{run.output_dir} both hold differ{_elsewhere(first, run)}; those of "
                f"{first.output_dir} are shown."
            )
    return {(task, cell): list(held.values()) for task, held in kept.items() if held}


def _alike(one: Record, other: Record) -> bool:
    """Return whether two lines of a sample say the same, up to a perplexity's last digits."""
    both_unknown = math.isnan(one.score) and math.isnan(other.score)
    scored = both_unknown or math.isclose(one.score, other.score, rel_tol=_AS_LONG)
    return scored and one.prediction == other.prediction


def _elsewhere(first: Run, run: Run) -> str:
    """Say on what two runs ran, where that differs."""
    for what in (("device",), ("hardware", "gpus"), ("hardware", "cpu")):
        here, there = first.recorded(*what), run.recorded(*what)
        if here != there:
            return f" ({what[-1]} {here} and {there})"
    return ""


def _joined_info(runs: Sequence[Run], cells: Sequence[str]) -> dict[str, Any]:
    """Return what run.json would say of all runs: the first's, with the others' tasks and cells."""

    def united(*path: str) -> dict[str, Any]:
        parts = [part for run in reversed(runs) if isinstance(part := run.recorded(*path), Mapping)]
        return {name: value for part in parts for name, value in part.items()}

    prints = dict(runs[0].recorded("fingerprint") or {})
    prints |= {key: united("fingerprint", key) for key in ("data", "cells", "methods")}
    notes = dict.fromkeys(note for run in runs for note in run.recorded("notes") or ())
    return {
        **runs[0].info,
        "tasks": united("tasks"),
        "cells": list(cells),
        "fingerprint": prints,
        "notes": list(notes),
    }


def _other_judgements(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    others = [str(run.output_dir) for run in runs[1:] if run.judgement != first.judgement]
    if not others:
        return []
    return [
        f"Judged as {first.output_dir} is; {', '.join(others)} was given another margin, rule for "
        "flips or noise floor."
    ]


def on_common_samples(run: Run, cells: Collection[str]) -> Run:
    """Return a run on the samples that some of its cells all hold, with others that hold them too.

    Another cell is left out of a task where it lacks one of its samples, and named in the remarks. A
    run whose cells hold the same samples is returned as it is.

    Args:
        run: what a folder holds.
        cells: the cells that are to be compared, as those that were just run.
    """
    held = {key: set(Records.of(records).values("id")) for key, records in run.records.items()}
    common = {
        task: wanted
        for task in run.tasks
        if (wanted := set[str].intersection(*(held.get((task, cell), set()) for cell in cells)))
    }
    records = {
        (task, cell): Records.of(found).only(common[task])
        for (task, cell), found in run.records.items()
        if common.get(task) and common[task] <= held[task, cell]
    }
    if not records or records == run.records:
        return run
    shown = {cell for _, cell in records}
    return replace(
        run,
        tasks={task: metric for task, metric in run.tasks.items() if task in common},
        cells=tuple(cell for cell in run.cells if cell in shown),
        records=records,
        remarks=(*run.remarks, *_remarks(run, common, held)),
    )


def _remarks(run: Run, common: dict[str, set[str]], held: dict[tuple[str, str], set[str]]) -> list[str]:
    """Say which cells lack samples, and that the folder holds more than is shown."""
    by_lack: dict[str, list[str]] = {}
    for cell in run.cells:
        lacking = [
            f"{task} ({len(wanted & has)} of {len(wanted)})"
            for task, wanted in common.items()
            if not wanted <= (has := held.get((task, cell), set()))
        ]
        if lacking:
            by_lack.setdefault(", ".join(lacking), []).append(cell)
    remarks = [
        f"Left out, for want of samples that this run has: {', '.join(cells)} on {lacking}. The same "
        "limit and tasks add them."
        for lacking, cells in by_lack.items()
    ]
    if any(has - common.get(task, set()) for (task, _), has in held.items()):
        remarks.append(
            "Shown are the samples that all cells of this run hold. "
            f"All that the folder holds: make report DIRS={run.output_dir}"
        )
    return remarks
