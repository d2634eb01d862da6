"""What lies in the folder of a run: its run.json and its records, each file read at most once.

The runner reads records to know what is left, adds those that it makes, and hands the object on: the
gate after each task and the report look at the same records, and at no file.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from harness.columnar import Records, read_columns
from harness.failures import Failures
from harness.ordering import put_in_order
from harness.prompts import Prompt, Prompts, prompt_path, read_prompts
from harness.records import Record, append_record, prediction_path
from harness.threads import in_threads
from harness.typed import Count, parse_object, shape_of
from kvmerge.errors import UserError
from kvmerge.files import write_atomically
from kvmerge.names import file_name

OBSERVATIONS = "observations"
"""Folder of what a run of `kind=observations` measured."""


def is_observed(output_dir: Path) -> bool:
    """Return whether a folder, or one of its shards, holds observations."""
    return any(output_dir.glob(f"{OBSERVATIONS}/*.jsonl")) or any(
        output_dir.glob(f"shards/*/{OBSERVATIONS}/*.jsonl")
    )


def changed_settings(
    before: object, now: object, place: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Yield where two plain values differ: the dotted path of a setting, and its two values.

    Of mappings what they hold is compared; what only one of them has is `None` in the other, and an
    empty one is as none at all.
    """
    one, other = ({} if side is None else side for side in (before, now))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in sorted({*one, *other}):
            below = f"{place}.{name}" if place else name
            yield from changed_settings(one.get(name), other.get(name), below)
    elif json.dumps(before, sort_keys=True) != json.dumps(now, sort_keys=True):
        yield place, before, now


def changed_prints(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[tuple[str, object, object]]:
    """Yield where the fingerprints of two runs differ, as `changed_settings` does.

    Tasks and cells that only one of the two has are no difference.
    """
    one, other = dict(before), dict(now)
    for key in _NAMED:
        first, second = one.get(key) or {}, other.get(key) or {}
        one[key], other[key] = (
            {name: side[name] for name in side if name in first and name in second}
            for side in (first, second)
        )
    yield from changed_settings(one, other)


_NAMED = ("data", "cells", "methods")
"""Parts of a fingerprint that tasks or cells have for themselves."""


class _Judged(TypedDict):
    metric: str


class TaskInfo(_Judged, total=False):
    """What run.json says of a task."""

    max_new_tokens: Count
    samples: Count


class Stretch(TypedDict, total=False):
    """One of the runs that wrote into a folder."""

    ended: str | None
    seconds: float | None


class Fingerprint(TypedDict, total=False):
    """What a resumed run must match; `harness.provenance` compares the rest of it as it stands."""

    data: Mapping[str, str]
    cells: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]


class RunInfo(TypedDict, total=False):
    """What must hold of run.json where it says it (`harness.provenance.run_info`).

    Earlier versions said less.
    """

    model: str
    benchmark: str
    cells: list[str]
    tasks: Mapping[str, TaskInfo]
    shard: Count
    num_shards: Count
    runs: list[Stretch]
    fingerprint: Fingerprint


_INFO = shape_of(RunInfo)


class Results:
    """One results folder: an output_dir that is not sharded, or one of its shards."""

    def __init__(self, folder: Path, without: Container[str] = ()) -> None:
        """Look at a folder; records of its files come without some fields, which then take no room."""
        self.folder = folder
        self._without = without
        self.failures = Failures(folder)
        self._records: dict[tuple[str, str], Records] = {}
        self._alike: dict[str, Records] = {}
        self._left_out: set[str] = set()
        self._prompts: dict[str, Prompts] = {}

    @property
    def run_file(self) -> Path:
        """Return where run.json lies."""
        return self.folder / "run.json"

    @cached_property
    def info(self) -> dict[str, Any]:
        """Return what run.json says; {} if there is none.

        Raises `UserError` naming what is wrong: it cannot be read, is no JSON object, or holds what
        `RunInfo` does not allow.
        """
        try:
            content = parse_object(self.run_file.read_bytes())
            wrong = _INFO.misfits("", content)
            if wrong:
                raise ValueError("; ".join(wrong))
            json.dumps(content, ensure_ascii=False).encode()  # half a character cannot be written on
        except FileNotFoundError:
            return {}
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(
                f"cannot read {self.run_file}: {error}. Put a copy of it back, if there is one. Choose "
                "another output_dir, or delete that folder to start over: nothing else says what made "
                "its predictions."
            ) from error
        return content

    def write_info(self, content: dict[str, Any]) -> None:
        """Replace run.json, in one step."""
        write_atomically(self.run_file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self.info = content

    def records(self, task: str, cell_name: str) -> Records:
        """Return the records of a task and cell in the order of their file; none if there is no file.

        Raises `UserError` as `read_records` does.
        """
        key = task, cell_name
        if cell_name in self._left_out:
            return Records()
        if key not in self._records:
            read = read_columns(self._path(*key), self._alike.get(task), self._without)
            self._records[key] = self._alike[task] = read
        return self._records[key]

    def read_ahead(self, task: str, cell_names: Iterable[str]) -> None:
        """Read the records of some cells at once: parsing leaves the interpreter to other threads.

        Raises `UserError` as `records` does.
        """
        in_threads(partial(self.records, task), cell_names)

    def add(self, task: str, cell_name: str, record: Record) -> None:
        """Add a record, on the disk first. Raises `UserError` as `append_record` does."""
        records = self.records(task, cell_name)
        append_record(self._path(task, cell_name), record)
        records.append(record)

    def prompts(self, task: str, hold: bool = True) -> Prompts:
        """Return the prompts of a task that were recorded; earlier versions recorded none.

        Args:
            task: the task.
            hold: whether they stay in memory for whoever asks again.
        """
        if task in self._prompts:
            return self._prompts[task]
        found = read_prompts(prompt_path(self.folder, task))
        if hold:
            self._prompts[task] = found
        return found

    def add_prompt(self, task: str, prompt: Prompt) -> None:
        """Add a prompt that is not there yet. Raises `UserError` as `append_record` does."""
        prompts = self.prompts(task)
        key = prompt.id, prompt.prompt_hash
        if key not in prompts:
            append_record(prompt_path(self.folder, task), prompt)
            prompts[key] = prompt

    def put_in_order(self, task: str, cell_names: Sequence[str], ids: Sequence[str]) -> None:
        """Put the lines of a task in the order of its samples, and of seeds, where they are not.

        Args:
            task: the task.
            cell_names: whose records are looked at.
            ids: its samples in the benchmark's order; those of other ones come last.
        """
        places = {sample: number for number, sample in enumerate(ids)}

        def place(line: Record | Prompt) -> tuple[int, int]:
            return places.get(line.id, len(places)), getattr(line, "seed", 0)

        def is_astray(cell_name: str) -> bool:
            columns = map(self.records(task, cell_name).values, ("id", "seed"))
            return not _is_sorted(
                (places.get(name, len(places)), seed) for name, seed in zip(*columns, strict=True)
            )

        # prompts first: where a kill comes between, the records say that there is more to do
        astray = list(filter(is_astray, cell_names))
        if astray or not _is_sorted(map(place, self._prompts.get(task, {}).values())):
            put_in_order(prompt_path(self.folder, task), Prompt, place)
        for name in astray:
            put_in_order(self._path(task, name), Record, place)
            self.records(task, name).sort(key=place)

    def has_predictions(self) -> bool:
        """Return whether there is any prediction file."""
        return any(self.folder.glob("predictions/*/*.jsonl"))

    def has_cell(self, cell_name: str) -> bool:
        """Return whether there is any prediction file of a cell that is not left out."""
        return cell_name not in self._left_out and bool(self._paths(cell_name))

    def set_aside(self, cell_name: str) -> None:
        """Keep a cell's lines under names that nothing reads, so that the cell is answered anew."""
        for path in self._paths(cell_name):
            number = 1 + sum(1 for _ in path.parent.glob(f"{glob.escape(path.name)}.stale-*"))
            path.rename(path.with_name(f"{path.name}.stale-{number}"))
        self._records = {key: kept for key, kept in self._records.items() if key[1] != cell_name}

    def leave_out(self, cell_name: str) -> None:
        """Go on as if a cell had no lines, and leave them where they are."""
        self._left_out.add(cell_name)

    def _paths(self, cell_name: str) -> list[Path]:
        name = glob.escape(file_name(cell_name))
        return sorted(self.folder.glob(f"predictions/*/{name}.jsonl"))

    def _path(self, task: str, cell_name: str) -> Path:
        return prediction_path(self.folder, task, cell_name)


def _is_sorted(places: Iterable[tuple[int, int]]) -> bool:
    return all(before <= after for before, after in pairwise(places))
