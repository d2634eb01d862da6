"""From the prediction files of one output_dir to summary.csv, averages and paired differences."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.metric import Metric
from benchmarks.metrics import find_metric
from harness.columnar import Records, joined
from harness.judgement import Judgement, judgement_from
from harness.prompts import Prompts
from harness.records import Record, prediction_path
from harness.report.bootstrap import Samples, Scored, average, gather, score_cells, score_task
from harness.report.columns import COLUMNS, figures
from harness.results import Results, changed_settings
from kvmerge.errors import UserError
from kvmerge.names import file_name, parse_name

R = TypeVar("R", bound=Results)
T = TypeVar("T")

_UNSHOWN = ("kept_entries_by_layer",)
"""Fields of records that no report shows, and that would take a quarter of their room."""


@dataclass(frozen=True)
class Run:
    """What one output_dir holds: its run.json and the records of every task and cell."""

    output_dir: Path
    info: Mapping[str, Any]
    """run.json as written (of shard 0 where the run is sharded)."""
    tasks: Mapping[str, str]
    """Metric by task name, in the run's own order."""
    cells: tuple[str, ...]
    """Cell names (`method@budget`) in display order."""
    records: Mapping[tuple[str, str], Sequence[Record]]
    """By task and cell; without those that have no record."""
    parts: tuple[Results, ...] = ()
    """The folders that they were read from: one, or a shard each."""
    remarks: tuple[str, ...] = ()
    """What a reader must know of how the cells came together."""
    joined: tuple[Run, ...] = ()
    """The runs that this one was joined from (`harness.report.joined`); the first is `output_dir`'s."""
    _drawn: dict[tuple[str, str, tuple[str, ...]], Scored] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What was bootstrapped already."""
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What else was worked out already, by name."""

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.info["model"])

    @property
    def benchmark(self) -> str:
        """The benchmark's name."""
        return str(self.info["benchmark"])

    @property
    def sources(self) -> tuple[Run, ...]:
        """The runs that were joined; this one where it was not."""
        return self.joined or (self,)

    @property
    def place(self) -> str:
        """The folder, or the folders, that the run was read from."""
        return ", ".join(str(source.output_dir) for source in self.sources)

    def of(self, task: str, cell: str) -> Sequence[Record]:
        """Return the records of a task and cell; [] where there are none."""
        return self.records.get((task, cell), [])

    def prompts(self, task: str) -> Prompts:
        """Return the prompts of a task that were recorded, by sample and hash."""
        each = [part.prompts(task, hold=False) for part in self.parts]
        return {key: prompt for prompts in each for key, prompt in prompts.items()}

    def recorded(self, *path: str) -> Any:
        """Return what run.json says at a place; None where an earlier version did not record it."""
        value: Any = self.info
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def asks_after(self) -> bool:
        """Whether the question came after the compression of its context."""
        return self.recorded("question") == "after"

    def values(self, field: str) -> set[Any]:
        """Return what a field holds in any record of the run."""

        def found() -> set[Any]:
            records = map(Records.of, self.records.values())
            return {value for each in records for (value,) in each.distinct(field)}

        return self.once(f"values of {field}", found)

    def once(self, name: str, work: Callable[[], T]) -> T:
        """Return what work gives, which is done the first time that this name is asked for."""
        if name not in self._known:
            self._known[name] = work()
        found: T = self._known[name]
        return found

    @cached_property
    def judgement(self) -> Judgement:
        """What the run was to be judged by, with defaults for what an earlier version did not record.

        Raises `UserError` naming run.json and the setting that cannot be.
        """
        config = self.recorded("config")
        try:
            return judgement_from(config if isinstance(config, Mapping) else {})
        except UserError as error:
            raise UserError(f"{self.output_dir}/run.json, config: {error}") from error

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metric of each task. Raises `UserError` naming run.json and a task of unknown metric."""
        metrics = {}
        for task, name in self.tasks.items():
            try:
                metrics[task] = find_metric(name)
            except UserError as error:
                raise UserError(f"{self.output_dir}/run.json, task {task}: {error}") from error
        return metrics

    @cached_property
    def contexts(self) -> dict[str, dict[str, str]]:
        """The context of each sample, by task and id: its own, where no cell's record names one."""
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for (task, _), records in self.records.items():
            columns = map(Records.of(records).values, ("id", "context_hash"))
            for sample, context in zip(*columns, strict=True):
                if context is not None:
                    found[task][sample] = context
                else:
                    found[task].setdefault(sample, sample)
        return found

    @cached_property
    def seeds(self) -> dict[tuple[str, str], set[int]]:
        """The seeds of each task and cell."""
        columns = {key: Records.of(records) for key, records in self.records.items()}
        return {key: {seed for (seed,) in each.distinct("seed")} for key, each in columns.items()}

    @cached_property
    def sharing(self) -> dict[str, tuple[int, int]]:
        """The tasks whose samples share contexts, with how many there are of both."""
        counts = {task: (len(of), len(set(of.values()))) for task, of in self.contexts.items()}
        return {task: (n, contexts) for task, (n, contexts) in counts.items() if contexts < n}

    @cached_property
    def samples(self) -> dict[tuple[str, str], Samples]:
        """The numbers behind each score, by task and cell.

        Raises `UserError` naming the sample where a line lacks what its metric needs.
        """
        gathered = {}
        names: dict[tuple[str, ...], tuple[str, ...]] = {}  # the same of all cells of a task, held once
        for (task, cell), records in self.records.items():
            try:
                found = gather(records, self.metrics[task], self.contexts[task])
                ids, contexts = (names.setdefault(of, of) for of in (found.ids, found.contexts))
                gathered[task, cell] = Samples(ids, found.parts, contexts)
            except ValueError as error:
                raise UserError(
                    f"{task} of {cell} in {self.output_dir} cannot be scored as {self.tasks[task]!r}: "
                    f"{error}. Delete that line of the prediction file and run again."
                ) from error
        return gathered

    @cached_property
    def scores(self) -> dict[tuple[str, str], Scored]:
        """Score and bootstrap replicates of each task and cell."""
        by_task: dict[str, dict[str, Samples]] = defaultdict(dict)
        for (task, cell), samples in self.samples.items():
            by_task[task][cell] = samples
        found = {task: score_cells(task, cells, self.metrics[task]) for task, cells in by_task.items()}
        return {(task, cell): found[task][cell] for task, cell in self.samples}

    def score_of(self, task: str, cell: str, ids: Iterable[str]) -> Scored:
        """Score some samples of a task and cell; the same ones are bootstrapped once."""
        samples = self.samples[task, cell].only(ids)
        if samples is self.samples[task, cell]:
            return self.scores[task, cell]
        key = task, cell, samples.ids
        if key not in self._drawn:
            self._drawn[key] = score_task(task, samples, self.metrics[task])
        return self._drawn[key]

    @cached_property
    def figures(self) -> dict[tuple[str, str], dict[str, float]]:
        """Every figure of each task and cell, by column name (`harness.report.columns`)."""
        return {key: figures(records) for key, records in self.records.items()}

    def over_tasks(self, cell: str) -> dict[str, float]:
        """Return every figure of a cell over the tasks that it has records of; {} if there are none."""
        by_task = [self.figures[task, cell] for task in self.tasks if (task, cell) in self.figures]
        if not by_task:
            return {}
        return {
            column.name: column.over_tasks([values[column.name] for values in by_task])
            for column in COLUMNS
        }

    @property
    def averaged_tasks(self) -> tuple[str, ...]:
        """The tasks scored 0 to 100; a perplexity has no place in an average with them."""
        return tuple(task for task, metric in self.metrics.items() if metric.averaged)

    @property
    def full_cell(self) -> str | None:
        """The cell of the full cache, where the run has one."""
        return next((cell for cell in self.cells if parse_name(cell).method == "full"), None)


def load_run(output_dir: Path, results: Results | None = None) -> Run:
    """Read an output_dir: its own predictions/, or all its shards merged.

    `results` is what was read and written there already, of an output_dir that is not sharded.

    Raises `UserError` where run.json is missing or incomplete, where a shard is missing, shards
    differ in a setting, or a sample was written twice.
    """
    shards = sorted((output_dir / "shards").glob("*-of-*"))
    if shards and (output_dir / "predictions").exists():
        raise UserError(
            f"{output_dir} holds predictions/ of its own and shards/ too, and one of them would be "
            "counted twice. Move one of the two elsewhere."
        )
    parts = (
        complete_shards(output_dir, [Results(shard, _UNSHOWN) for shard in shards])
        if shards
        else [results or Results(output_dir, _UNSHOWN)]
    )
    first = parts[0].info
    for part in parts:
        check_info(part)
        refuse_other_settings(part, parts[0])
    tasks = {task: spec["metric"] for part in parts for task, spec in part.info["tasks"].items()}
    cells = list(dict.fromkeys(cell for part in parts for cell in part.info["cells"]))
    cells += _unlisted_cells(parts, cells)
    for part, task in itertools.product(parts, tasks):
        part.read_ahead(task, cells)
    _refuse_overlaps(parts, tasks, cells)
    records = {
        (task, cell): merged
        for task in tasks
        for cell in cells
        if len(merged := joined([part.records(task, cell) for part in parts]))
    }
    _refuse_unknown_tasks(parts, tasks)
    return Run(output_dir, first, tasks, tuple(cells), records, tuple(parts))


def refuse_other_settings(part: Results, first: Results) -> None:
    """Refuse a shard that was run with other settings than the first, naming one of them."""

    def settings(results: Results) -> Mapping[str, Any]:
        names = {f"{key}.name": results.info[key] for key in ("model", "benchmark")}
        return names | results.info.get("fingerprint", {})

    for setting, here, there in changed_settings(settings(part), settings(first)):
        raise UserError(
            f"{part.folder} and {first.folder} differ in {setting} ({here!r} against {there!r}), so "
            "they are not one run. Run the odd shard again with the settings of the others."
        )


def complete_shards(output_dir: Path, shards: Sequence[R]) -> list[R]:
    """Return the shards of a run in their order. Raises `UserError` where they are not all of them."""
    numbers = {}
    for each in shards:
        shard = each.folder
        match = re.fullmatch(r"(\d+)-of-(\d+)", shard.name)
        if not match:
            raise UserError(f"{shard} is not a shard folder; those are named k-of-n, as in 0-of-4.")
        numbers[int(match[1]), int(match[2])] = each
    totals = sorted({total for _, total in numbers})
    if len(totals) > 1:
        raise UserError(
            f"{output_dir / 'shards'} mixes runs split in {' and '.join(map(str, totals))}; "
            "they overlap. Keep the shards of one split."
        )
    total = totals[0]
    missing = [k for k in range(total) if (k, total) not in numbers]
    beyond = [k for k, _ in numbers if k >= total]
    if missing or beyond:
        names = [f"{k}-of-{total}" for k in missing or beyond]
        what = "lacks" if missing else "holds more than its shards 0 to n-1:"
        fix = "Run them with" if missing else "Shards are counted from 0; run again with"
        raise UserError(
            f"{output_dir / 'shards'} {what} {', '.join(names)}. "
            f"{fix} shard=0..{total - 1} num_shards={total}."
        )
    ordered = [numbers[k, total] for k in range(total)]
    for k, part in enumerate(ordered):
        check_info(part)
        says = part.info.get("shard"), part.info.get("num_shards")
        if says != (k, total):
            raise UserError(
                f"{part.run_file} says shard {says[0]} of {says[1]}, "
                "which is not what its folder says. Shard folders cannot be renamed."
            )
    return ordered


def check_info(results: Results) -> None:
    """Refuse a folder whose run.json is missing or does not say enough."""
    if not results.info:
        raise UserError(
            f"{results.folder} has no run.json, so it is not an output_dir of a run. "
            "Give the folder that run.py printed, e.g. results/runs/mini/mini/smollm2-135m."
        )
    missing = [key for key in ("model", "benchmark", "tasks", "cells") if key not in results.info]
    if missing:
        raise UserError(f"{results.run_file} lacks {', '.join(missing)}. Run again to write it anew.")
    for cell in results.info["cells"]:
        try:
            parse_name(cell)
        except UserError as error:
            raise UserError(f"{results.run_file}, cells: {error}") from error


def _unlisted_cells(parts: Iterable[Results], cells: Iterable[str]) -> list[str]:
    """Return cells of earlier runs into the same folder, which the last run.json need not list."""
    listed = {file_name(cell) for cell in cells}
    stems = {path.stem for part in parts for path in part.folder.glob("predictions/*/*@*.jsonl")}
    return sorted(stems - listed)


def _refuse_unknown_tasks(parts: Iterable[Results], tasks: Mapping[str, str]) -> None:
    for part in parts:
        for path in sorted(part.folder.glob("predictions/*/")):
            if path.name not in tasks:
                raise UserError(
                    f"{path} belongs to a task that run.json does not list, so its metric is "
                    f"unknown. Run that task again into this folder, or move {path} elsewhere."
                )


def _refuse_overlaps(parts: Sequence[Results], tasks: Iterable[str], cells: Sequence[str]) -> None:
    """Refuse samples that more than one shard holds, all of them together."""
    if len(parts) == 1:
        return
    overlaps = []
    for task, cell in itertools.product(tasks, cells):
        places: dict[tuple[str, int], list[str]] = defaultdict(list)
        for part in parts:
            records = part.records(task, cell)
            for key in zip(records.values("id"), records.values("seed"), strict=True):
                places[key].append(str(prediction_path(part.folder, task, cell)))
        overlaps += [
            f"sample {name!r} with seed {seed} is there twice, in {' and '.join(paths)}"
            for (name, seed), paths in places.items()
            if len(paths) > 1
        ]
    if overlaps:
        listed = "\n".join(overlaps)
        raise UserError(
            f"{listed}\nEach would be counted twice. Delete its line in all shards but one."
        )


def averages(run: Run) -> dict[str, Scored]:
    """Return the plain mean over the tasks scored 0 to 100, from unrounded task scores, by cell.

    A cell that lacks a task has no average: over fewer tasks it would be another number.
    """
    tasks = run.averaged_tasks
    return {
        cell: average([run.scores[task, cell] for task in tasks])
        for cell in run.cells
        if tasks and all((task, cell) in run.scores for task in tasks)
    }


@dataclass(frozen=True)
class Difference:
    """A cell's score minus another's, over the samples that both have."""

    task: str
    """A task, or `average`."""
    cell: str
    n: int
    """Samples compared (summed over tasks for the average)."""
    scored: Scored


def differences(run: Run, to: str) -> list[Difference]:
    """Return the differences of every other cell to the cell `to`, bootstrapped in pairs by sample id.

    Each resample of a task takes the same samples in both cells. The average is the mean of the
    tasks' differences, where the cell has every averaged task in common with `to`.
    """
    paired: list[Difference] = []
    for cell in run.cells:
        if cell == to:
            continue
        by_task: dict[str, Difference] = {}
        for task in run.tasks:
            if (task, cell) not in run.samples or (task, to) not in run.samples:
                continue
            common = set(run.samples[task, cell].ids) & set(run.samples[task, to].ids)
            if common:
                scored = run.score_of(task, cell, common).minus(run.score_of(task, to, common))
                by_task[task] = Difference(task, cell, len(common), scored)
        paired += by_task.values()
        if run.averaged_tasks and by_task.keys() >= set(run.averaged_tasks):
            averaged = [by_task[task] for task in run.averaged_tasks]
            total = sum(difference.n for difference in averaged)
            paired.append(Difference("average", cell, total, average([d.scored for d in averaged])))
    return paired
