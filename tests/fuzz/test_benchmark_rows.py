"""Rows of benchmarks in every wrong shape: refused by line and field, or samples that can be scored."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.custom import Custom
from benchmarks.longbench import tasks as longbench
from benchmarks.longbench.benchmark import LongBench
from benchmarks.longbench_e import TASKS as TASKS_E
from benchmarks.longbench_e import LongBenchE
from benchmarks.metrics import METRICS
from benchmarks.task import Benchmark
from benchmarks.zero_scrolls import tasks as zero_scrolls
from benchmarks.zero_scrolls.benchmark import ZeroScrolls
from kvmerge.errors import UserError
from tests.fuzz import BYTES, MARK, RAW, places, with_raw, yields

TRIALS = 10_000
ODD = (
    *(
        "",
        " ",
        "\n",
        "\0",
        "\r\n",
        "a",
        "A",
        "the",
        "...",
        "`#//",
        "Paragraph 1",
        "段落1",
        "段落",
        "1, 2, 3",
    ),
    *(
        "３",
        "²",
        "٣",
        "50%",
        "5" * 400 + "%",
        "9" * 5000,
        "1e999",
        "nan",
        "-0",
        "ß İ ǅ",
        "e\u0301\u0301",
        "\u202e",
    ),
    *(
        "\u2028",
        "\ufeff",
        "\U0001f9d1\u200d\U0001f680",
        "𝔸𝔹",
        "长" * 50,
        "word " * 400,
        ",",
        '"',
        "[]",
        "{x}",
        "%s",
    ),
)
"""Texts, as answers and as predictions."""
VALUES = (
    *RAW,
    *(json.dumps(text) for text in ODD),
    '["", null]',
    '[["a", ["b"]], 1]',
    '{"text": ["a"]}',
)
"""Values as they stand in JSON."""
ANSWERS = {
    "retrieval": "Paragraph 1",
    "retrieval_zh": "段落1",
    "accuracy": "(B)",
    "exp_similarity": "40%",
    "concordance_index": "2, 1, 3",
}
"""What a metric must find in an answer."""
CLASSES = ("Date", "Place", "answer 1")
JUDGING = sorted(name for name, metric in METRICS.items() if metric.parts and not metric.continuation)


class Source(NamedTuple):
    """One kind of rows: a true row, and the benchmark of a file that holds some."""

    name: str
    row: Mapping[str, Any]
    benchmark: Callable[[], Benchmark]
    file: str
    """Where the rows are written."""


def answer(metric: str) -> str:
    return ANSWERS.get(metric, "answer 1")


def of_longbench(folder: Path, task: str, *, extended: bool) -> Source:
    judged = longbench.find_task(task).metric.name
    row = {
        "input": "Which?",
        "context": "Some text.",
        "answers": [answer(judged)],
        "all_classes": list(CLASSES) if judged == "classification" else None,
        "dataset": task,
        "length": 40,
        "_id": "one",
    }
    made = LongBenchE if extended else LongBench
    where = folder / made.name
    return Source(made.name, row, lambda: made(str(where), [task]), f"{made.name}/{task}{made.suffix}")


def of_zero_scrolls(folder: Path, task: str, split: str) -> Source:
    row = {
        "id": "one",
        "input": "Read.\n\nText.\n\nWhat?\nAnswer:",
        "output": answer(zero_scrolls.find_task(task).metric.name),
        "document_start_index": 7,
        "document_end_index": 12,
        "query_start_index": 14,
        "query_end_index": 20,
        "truncation_seperator": "...",
    }
    where = folder / split
    return Source(
        f"zero_scrolls {split}",
        row,
        lambda: ZeroScrolls(str(where), [task], split),
        f"{split}/{task}.jsonl",
    )


def of_custom(folder: Path, metric: str, suffix: str) -> Source:
    row = {
        "document": ["Some", ["text"]],
        "question": "Which?",
        "answer": answer(metric),
        "name": "one",
    }
    template = folder / "template.txt"
    template.write_text("{document}\n{question}\n")
    file = f"rows{suffix}"
    return Source(
        f"custom {suffix}",
        row,
        lambda: Custom(str(folder / file), str(template), "answer", metric, id="name", classes=CLASSES),
        file,
    )


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    found = [
        *(of_custom(tmp_path, metric, suffix) for suffix in (".jsonl", ".csv") for metric in JUDGING),
        *(of_longbench(tmp_path, task.name, extended=False) for task in longbench.TASKS),
        *(of_longbench(tmp_path, task.name, extended=True) for task in TASKS_E),
        *(
            of_zero_scrolls(tmp_path, task.name, split)
            for task in zero_scrolls.TASKS
            for split in ("validation", "test")
        ),
    ]
    for source in found:  # the benchmarks ask for their files as they are made
        (tmp_path / source.file).parent.mkdir(exist_ok=True)
        (tmp_path / source.file).touch()
    return found


def changed(row: Mapping[str, Any], rng: random.Random) -> tuple[bytes, str]:
    """A row with another value somewhere, or without one; and the field that it is in."""
    copy = json.loads(json.dumps(row))
    field = rng.choice(list(copy))
    container, key = rng.choice([(copy, field), *places(copy[field])])
    if rng.random() < 0.1:
        del container[key]
    else:
        container[key] = MARK
    return with_raw(copy, rng.choice(VALUES)), field


def as_json(row: Mapping[str, Any], rng: random.Random) -> tuple[bytes, str]:
    """Two lines, one of them wrong; and the field that is, empty where the line is as a whole."""
    whole = json.dumps(row).encode()
    text, field = changed(dict(row) | {"_id": "two", "id": "two", "name": "two"}, rng)
    if rng.random() < 0.2:
        at = rng.randrange(len(text) + 1)
        text, field = text[:at] + rng.choice((b"", *BYTES)) + text[at + rng.randrange(3) :], ""
    lines = [whole, text]
    rng.shuffle(lines)
    return b"\n".join(lines), field


def as_csv(row: Mapping[str, Any], rng: random.Random) -> tuple[bytes, str]:
    """Two rows of CSV, of odd texts; or damaged in a place."""
    flat = {name: str(value) for name, value in row.items()}
    field = rng.choice(list(flat))
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(flat))
    writer.writeheader()
    writer.writerows([flat, flat | {"name": "two"} | {field: rng.choice(ODD)}])
    data = written.getvalue().encode()
    if rng.random() < 0.5:
        at = rng.randrange(len(data) + 1)
        data, field = data[:at] + rng.choice((b"", *BYTES)) + data[at + rng.randrange(3) :], ""
    return data, field


def assert_usable(benchmark: Benchmark, rng: random.Random) -> None:
    (task,) = benchmark.tasks
    for sample in benchmark.samples(task):
        for text in (sample.id, sample.prompt, *sample.answers):
            assert type(text) is str
            text.encode()
        for prediction in (rng.choice(ODD), *sample.answers[:1]):
            for name, mark in benchmark.score(sample, task, prediction).items():
                if task.metric.parts:
                    assert -1e-6 <= mark <= 1 + 1e-6, (name, mark, prediction, sample.answers)
                else:
                    assert math.isnan(mark)
    assert benchmark.fingerprint()


def test_a_row_is_refused_by_line_and_field_or_can_be_scored(
    tmp_path: Path, sources: list[Source]
) -> None:
    def attempt(rng: random.Random) -> None:
        source = rng.choice(sources)
        write = as_csv if source.file.endswith(".csv") else as_json
        data, field = write(source.row, rng)
        (tmp_path / source.file).write_bytes(data)
        try:
            assert_usable(source.benchmark(), rng)
        except UserError as error:
            message = str(error)
            named = "line" if re.search("not valid|not UTF-8|first line|values for", message) else field
            # a metric says which answers it cannot judge, and a label set is the whole file's
            if "cannot score against" in message and field in ("answer", "output", "all_classes"):
                named = "answers"
            if named not in message or not re.search(r"line \d+|first line", message):
                raise AssertionError(f"{source.name}: {named} is not named: {error}") from error
        except Exception as error:
            error.add_note(source.name)
            raise

    assert not yields(TRIALS, attempt)
