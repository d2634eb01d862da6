"""Results folders damaged in every way that a hand or a disk can: one message, or what is right."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from harness.provenance import check_resumable
from harness.records import Record, features, prediction_path, scan, scan_folder
from harness.report import bootstrap
from harness.report.run import load_run
from harness.report.submission import write_submissions
from harness.report.summary import summarise
from harness.report.tables.budgets import budget_table
from harness.report.tables.scores import difference_table, group_tables, score_table
from harness.results import Results
from kvmerge.errors import UserError
from scripts.records import repair
from tests.fuzz import BYTES, MARK, swapped, with_raw, yields
from tests.synthetic_run import SETTINGS, record

TRIALS = 2_000
CELLS = ("full@1", "kvmerger:sigma=3@0.35")
METRICS = {"qa": "qa_f1", "summaries": "rouge_gm", "text": "perplexity", "needle": "number"}
PARTS: Mapping[str, Mapping[str, Any]] = {
    "qa": {},
    "summaries": {"rouge1": 0.5, "rouge2": 0.25, "rougel": 0.125},
    "text": {"nll": 12.5, "tokens": 8},
    "needle": {"groups": {"length": "4-8k", "depth": 50}},
}
FULLY: Mapping[str, Any] = {
    "kl_to_full": 0.25,
    "top1_agreement": 0.75,
    "fidelity_tokens": 12,
    "kept_entries_by_layer": [50.0, 49.5],
    "merged_tokens": 10.5,
    "prefill_seconds": 0.5,
    "decode_seconds": 1.5,
}
INFO = SETTINGS | {
    "benchmark": "zero_scrolls_test",  # the one that has submissions
    "cells": list(CELLS),
    "tasks": {task: {"metric": name, "samples": 3} for task, name in METRICS.items()},
    "runs": [{"ended": "2026-01-01T00:00:00+00:00", "seconds": 3.5}],
    "fingerprint": {
        "data": {"qa": "ab"},
        "cells": {"full@1": {"window": 3}},
        "methods": {"full@1": {"baselines.full": "ab"}},
        "model": {"dtype": "float32"},
    },
    "shard": 0,
    "num_shards": 1,
}
Damage = Callable[["Folder", random.Random], None]


@dataclass
class Line:
    """One line of a file, and whether it is as a run wrote it."""

    text: bytes
    is_whole: bool = True


@dataclass
class Folder:
    """A results folder in memory."""

    path: Path
    info: bytes
    files: dict[tuple[str, str], list[Line]]
    after: list[Callable[[Path], None]] = field(default_factory=list)
    """What is done to it on the disk."""

    def write(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        (self.path / "run.json").write_bytes(self.info)
        for key, lines in self.files.items():
            path = prediction_path(self.path, *key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(line.text + b"\n" for line in lines))
        for change in self.after:
            change(self.path)

    def any_file(self, rng: random.Random) -> list[Line]:
        return self.files[rng.choice(sorted(self.files))]


def true_lines(task: str) -> list[Line]:
    made = [record(f"{task}-{n}", n / 4, extra=PARTS[task], answers=("a",), **FULLY) for n in range(3)]
    return [Line(each.to_json().encode()) for each in made]


LINES = {(task, CELLS[0]): true_lines(task) for task in METRICS}
LINES |= {(task, CELLS[1]): true_lines(task) for task in ("qa", "needle")}


def swap_in_line(folder: Folder, rng: random.Random) -> None:
    lines = folder.any_file(rng)
    n = rng.randrange(len(lines))
    if lines[n].is_whole:
        lines[n] = Line(swapped(lines[n].text, rng), False)


def swap_in_info(folder: Folder, rng: random.Random) -> None:
    folder.info = swapped(json.dumps(INFO).encode(), rng)


def tear_line(folder: Folder, rng: random.Random) -> None:
    lines = folder.any_file(rng)
    n = rng.randrange(len(lines))
    lines[n] = Line(lines[n].text[: rng.randrange(len(lines[n].text) + 1)], False)


def put_bytes(folder: Folder, rng: random.Random) -> None:
    lines = folder.any_file(rng)
    n = rng.randrange(len(lines))
    at = rng.randrange(len(lines[n].text) + 1)
    lines[n] = Line(lines[n].text[:at] + rng.choice(BYTES) + lines[n].text[at:], False)


def repeat_line(folder: Folder, rng: random.Random) -> None:
    lines = folder.any_file(rng)
    n = rng.randrange(len(lines))
    again = lines[n].text
    kind = rng.randrange(3)
    if kind == 1:
        again = again.replace(b'"decode_seconds": 1.5', b'"decode_seconds": 9.25')
    elif kind == 2:
        again = again.replace(b'"kv_bytes": 1000', b'"kv_bytes": 1001')
    lines.insert(rng.randrange(n + 1, len(lines) + 1), Line(again, False))


def shuffle_lines(folder: Folder, rng: random.Random) -> None:
    rng.shuffle(folder.any_file(rng))


def drop_line(folder: Folder, rng: random.Random) -> None:
    lines = folder.any_file(rng)
    lines.pop(rng.randrange(len(lines)))
    lines.append(Line(b"", False))


def join_lines(folder: Folder, rng: random.Random) -> None:
    lines = folder.any_file(rng)
    lines[:2] = [Line(lines[0].text + lines[-1].text, False)]


def tear_info(folder: Folder, rng: random.Random) -> None:
    at = rng.randrange(len(folder.info) + 1)
    folder.info = folder.info[:at] + rng.choice((b"", rng.choice(BYTES) + folder.info[at:]))


def change_disk(folder: Folder, rng: random.Random) -> None:
    key = rng.choice(sorted(folder.files))
    cell = file = prediction_path(folder.path, *key)
    kind = rng.randrange(8)
    if kind < 4:
        file = (cell, folder.path / "run.json", cell.parent, folder.path / "predictions")[kind]

    def replaced(path: Path) -> None:
        if kind == 4:
            cell.write_bytes(rng.choice((b"", b"\n", b"\0" * 4096, b"\n\n\n")))
        elif kind == 5:
            cell.with_name(rng.choice(("x@y.jsonl", "notes.jsonl", "h2o@0.5.jsonl"))).write_text(
                "{}\n{}\n"
            )
        elif kind == 6:
            (path / "predictions" / "other").mkdir(exist_ok=True)
            shutil.copy(cell, path / "predictions" / "other")
        elif kind == 7:
            (path / "shards").mkdir()
            (path / "shards" / rng.choice(("0-of-1", "1-of-x", "3-of-2"))).write_text("")
        else:
            was_folder = file.is_dir()
            if was_folder:
                shutil.rmtree(file)
                file.write_text("")
            else:
                file.unlink()
                file.mkdir()

    folder.after = [replaced]  # one at a time: the next would not find what it changes
    for (task, name), lines in folder.files.items():
        if kind in (3, 4) or (kind, task) == (2, key[0]) or (kind, task, name) == (0, *key):
            lines[:] = [Line(line.text, False) for line in lines]


DAMAGES: tuple[tuple[Damage, int], ...] = (
    (swap_in_line, 8),
    (swap_in_info, 5),
    (tear_line, 2),
    (put_bytes, 2),
    (repeat_line, 2),
    (shuffle_lines, 1),
    (drop_line, 1),
    (join_lines, 1),
    (tear_info, 1),
    (change_disk, 2),
)


def damaged(path: Path, rng: random.Random) -> Folder:
    files = {key: list(lines) for key, lines in LINES.items()}
    folder = Folder(path, json.dumps(INFO).encode(), files)
    functions, weights = zip(*DAMAGES, strict=True)
    for damage in rng.choices(functions, weights, k=rng.choice((1, 1, 1, 2, 3))):
        damage(folder, rng)
    folder.write()
    return folder


def assert_typed(found: Record) -> None:
    """What is computed with must be what the fields say, told here without the harness's own check."""
    assert type(found.id) is str
    assert type(found.prediction) is str
    assert type(found.seed) is type(found.kv_bytes) is type(found.prompt_tokens) is int
    assert type(found.answers) is tuple
    assert all(type(answer) is str for answer in found.answers)
    numbers = [found.kept_entries, found.budget_achieved, found.kl_to_full, found.decode_seconds]
    numbers += [value for name, value in found.extra.items() if name != "groups"]
    numbers += found.kept_entries_by_layer or []
    assert all(
        value is None or (type(value) in (int, float) and math.isfinite(value)) for value in numbers
    )
    assert min(found.kv_bytes, found.prompt_tokens, found.kept_entries) >= 0
    for name, value in found.extra.get("groups", {}).items():
        assert type(name) is str
        assert type(value) in (int, str)
    f"{found}".encode()


def read_as_resuming(folder: Folder) -> None:
    results = Results(folder.path)
    for key, lines in folder.files.items():
        records = results.records(*key)
        for one in records:
            assert_typed(one)
        names = [(one.id, one.seed) for one in records]
        assert len(set(names)) == len(names), "a sample counts twice"
        # of lines that agree but for times the first counts, wherever shuffling put it
        read = {replace(one, decode_seconds=FULLY["decode_seconds"]).to_json() for one in records}
        assert all(line.text.decode() in read for line in lines if line.is_whole), "a line is lost"
    check_resumable(results, INFO["fingerprint"])


def read_as_report(folder: Folder) -> None:
    run = load_run(folder.path)
    summary = summarise(run)
    for metric, score in zip(summary["metric"], summary["score"], strict=True):
        assert score >= 1 if metric == "perplexity" else 0 <= score <= 100, (metric, score)
    for table in (score_table(run, []), budget_table(run), difference_table(run), *group_tables(run)):
        if table is not None:
            str(table).encode()


def read_as_types(folder: Folder) -> None:
    features(folder.path)


def read_as_submission(folder: Folder) -> None:
    write_submissions(load_run(folder.path))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)
    monkeypatch.setattr(logging.getLogger("harness.records"), "disabled", True)


READERS = (read_as_resuming, read_as_report, read_as_types, read_as_submission)


def test_a_damaged_folder_is_refused_by_name_or_read_right(tmp_path: Path) -> None:
    def attempt(rng: random.Random) -> None:
        folder = damaged(tmp_path / "run", rng)
        for read in READERS:
            try:
                read(folder)
            except UserError as error:
                if str(folder.path) not in str(error):
                    raise AssertionError(f"{read.__name__} names no file: {error}") from error

    assert not yields(TRIALS, attempt)


def test_a_wrong_value_is_named_with_file_line_and_key(tmp_path: Path) -> None:
    def attempt(rng: random.Random) -> None:
        n, key = (
            rng.randrange(3),
            rng.choice(["seed", "answers", "kept_entries", "groups", "unheard_of"]),
        )
        lines = list(LINES["needle", "full@1"])
        raw = rng.choice(['"x"', "true", '{"a": [1]}', "1e999", "[[]]"])
        lines[n] = Line(with_raw(json.loads(lines[n].text) | {key: MARK}, raw))
        folder = Folder(tmp_path / "run", json.dumps(INFO).encode(), {("needle", "full@1"): lines})
        folder.write()
        with pytest.raises(UserError, match=rf"full@1\.jsonl, line {n + 1} is not a record: {key}"):
            Results(folder.path).records("needle", "full@1")

    assert not yields(TRIALS // 20, attempt)


def test_repair_takes_out_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    def attempt(rng: random.Random) -> None:
        folder = damaged(tmp_path / "run", rng)
        list(repair(folder.path))
        for found in scan_folder(folder.path):
            assert found.unreadable or not [*found.faults(), *found.remarks()]
        for key, lines in folder.files.items():
            left = list(scan(prediction_path(folder.path, *key)).lines.values())
            for line in lines:
                assert line.text in left or not line.is_whole or contradicted(line, lines)
            assert len(set(left)) == len(left)

    assert not yields(TRIALS // 4, attempt)


def contradicted(line: Line, lines: list[Line]) -> bool:
    """Whether another line is of the same sample and says something else, so that neither can count."""
    start = line.text.partition(b'"prediction"')[0]
    return any(other.text.startswith(start) and other.text != line.text for other in lines)
