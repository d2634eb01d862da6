"""Anyone's own long-context task: a dataset, a prompt template, and one of the project's metrics.

Prompts are cut in the middle and wrapped in the model's chat format as LongBench's are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from benchmarks.encoding import encode_truncating_middle
from benchmarks.metric import Metric
from benchmarks.metrics import find_metric
from benchmarks.rows import ANY, TEXT, parse_csv, parse_rows, read_bytes, sha256, shown
from benchmarks.source import load_rows
from benchmarks.task import Encoded, PromptFormat, Sample, Task
from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Place = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and the row."""


_DEEPEST = 20
"""Lists in each other that a field may hold; beyond it a file is broken or means harm."""


class Custom:
    """The benchmark: one task, its rows from a file, or from the hub by the `datasets` library.

    Fields are named in the template and in `answers`; `a.b` is the field `b` of the field `a`. A list
    of texts fills its place joined by newlines, and lists in it joined by spaces.

    Args:
        dataset: a JSONL, CSV or parquet file, or the id of a dataset on the hub.
        template: text file of the prompt with `{field}`s; braces that are meant are doubled.
        answers: field of the gold answers: a text, a number, or a list of them.
        metric: how answers are judged (`benchmarks.metrics`).
        max_new_tokens: longest answer.
        split: of the hub's dataset, e.g. `test`; a file has none.
        subset: of the hub's dataset, where it has several.
        revision: commit of the hub's dataset; None takes the newest.
        id: field that names a row; None numbers the rows from 0.
        classes: label set, for the metric `classification`.
        chat: whether prompts are wrapped in the model's chat format.
        name: what results call the benchmark; None takes the dataset's name.

    Raises UserError for a setting that is missing or does not fit.
    """

    def __init__(
        self,
        dataset: str | None = None,
        template: str | None = None,
        answers: str | None = None,
        metric: str = "qa_f1",
        max_new_tokens: int = 64,
        split: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        id: str | None = None,
        classes: Sequence[str | int] | None = None,
        chat: bool = True,
        name: str | None = None,
    ) -> None:
        needed = {"dataset": dataset, "template": template, "answers": answers}
        missing = [f"benchmark.{key}=" for key, value in needed.items() if not value]
        if missing:
            raise UserError(
                f"benchmark=custom needs {', '.join(missing)}; docs/custom_benchmark.md has an example."
            )
        self.dataset, self.answers = str(dataset), str(answers)
        self.split, self.subset, self.revision, self.id = split, subset, revision, id
        self.file = _file(self.dataset)
        if self.file is not None and (split or subset or revision):
            raise UserError(
                f"benchmark.dataset={dataset} is a file, which has no split, subset or revision. Leave "
                "them out, or give the id of a dataset on the hub."
            )
        if self.file is None and not split:
            raise UserError(
                f"benchmark.dataset={dataset} is taken for a dataset on the hub, as there is no such "
                "file: give benchmark.split= as well, e.g. benchmark.split=test."
            )
        self.classes = None if classes is None else tuple(str(label) for label in classes)
        judged = find_metric(metric)
        _check_metric(judged, self.classes)
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise UserError(f"benchmark.max_new_tokens={max_new_tokens!r} must be 1 or more.")
        self.template = _Template(Path(str(template)).expanduser())
        own = self.file.stem if self.file else self.dataset.replace("/", "-")
        self.name = str(name or own)
        self.tasks: Sequence[Task] = (Task(self.name, judged, max_new_tokens, chat=bool(chat)),)

    def samples(self, task: Task) -> list[Sample]:
        """Return all rows, in the order of the dataset.

        Raises UserError naming the row, and its line in a JSONL file, that lacks a field or whose
        answers the metric cannot judge.
        """
        return list(self._samples)

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Return the token ids fed to prefill (`benchmarks.encoding`)."""
        return Encoded(encode_truncating_middle(tokenizer, sample.prompt, fmt, wrap=task.chat))

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Return the marks of one prediction."""
        return task.mark(prediction, sample.answers, sample.all_classes)

    def notes(self) -> list[str]:
        """Return what was run: nobody else's numbers are of this."""
        where = f"split {self.split} of {self.dataset}" if self.file is None else str(self.file)
        return [f"Rows of {where}, prompt of {self.template.path}, answers in {self.answers!r}."]

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of all prompts and answers: of the data, the template and the fields."""
        asked = [[s.id, s.prompt, s.answers] for s in self._samples]
        return {self.name: sha256(json.dumps(asked).encode("utf-8"))}

    @functools.cached_property
    def _samples(self) -> tuple[Sample, ...]:
        metric = self.tasks[0].metric
        samples = []
        seen: dict[str, str] = {}
        for number, (place, row) in enumerate(self._rows()):
            name = _text(_lookup(row, self.id, place), self.id, place) if self.id else str(number)
            if name in seen:
                raise UserError(
                    f"{place}: {self.id} {name!r} is already that of {seen[name]}; give a field "
                    "that names each row, or leave benchmark.id out to number them."
                )
            seen[name] = place
            answers = _answers(_lookup(row, self.answers, place), self.answers, place)
            metric.check_answers(answers, self.classes, place)
            prompt = self.template.fill(row, place)
            samples.append(Sample(name, self.name, prompt, answers, all_classes=self.classes))
        if not samples:
            raise UserError(f"{self.dataset} holds no rows.")
        return tuple(samples)

    def _rows(self) -> Iterator[Place]:
        if self.file is None:
            rows = load_rows(self.dataset, self.subset, split=self.split, revision=self.revision)
        elif self.file.suffix == ".parquet":
            rows = load_rows(self.file)
        else:  # line by line, so that a message names the line (docs/decisions.md)
            data, place = read_bytes(self.file), str(self.file)
            is_csv = self.file.suffix == ".csv"
            yield from parse_csv(data, place) if is_csv else parse_rows(data, place, ANY, id_field=None)
            return
        for number, row in enumerate(rows, start=1):
            yield f"{self.dataset}, row {number}", row


class _Template:
    """A prompt with `{field}`s."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = read_bytes(path).decode("utf-8")
            self.parts = [(before, field) for before, field, *_ in Formatter().parse(text)]
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} cannot be read as a template: {error}. It is UTF-8 text with {{field}}s; "
                "braces that are meant are doubled."
            ) from error
        if any(field == "" for _, field in self.parts):
            raise UserError(f"{path} holds {{}}: name a field, or double braces that are meant.")
        if not any(field for _, field in self.parts):
            raise UserError(f"{path} names no {{field}}: every prompt would be the same.")

    def fill(self, row: Mapping[str, Any], place: str) -> str:
        """Return the prompt of a row. Raises UserError naming a field that it lacks."""
        filled = []
        for before, field in self.parts:
            filled.append(before)
            if field is not None:
                filled.append(_text(_lookup(row, field, place), field, place))
        return "".join(filled)


def _file(dataset: str) -> Path | None:
    """Return the file that a dataset's name is; None for an id of the hub.

    Raises UserError for a name that looks like a file which is not there, or of an unknown kind.
    """
    path = Path(dataset).expanduser()
    kinds = (".jsonl", ".json", ".csv", ".parquet")
    if path.suffix in kinds or path.exists() or dataset.startswith((".", "/", "~")):
        if not path.is_file():
            raise UserError(f"benchmark.dataset={dataset} is not there, or is not a file.")
        if path.suffix not in kinds:
            raise UserError(f"benchmark.dataset={dataset} must be one of {', '.join(kinds)}.")
        return path
    return None


def _check_metric(metric: Metric, classes: Sequence[str] | None) -> None:
    if metric.continuation or not metric.parts:
        raise UserError(f"benchmark.metric={metric.name} judges no answers; take another one.")
    if metric.name == "classification" and not classes:
        raise UserError("benchmark.metric=classification needs benchmark.classes=[label,...].")


def _lookup(row: Mapping[str, Any], field: str, place: str) -> Any:
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(map(str, value)) if isinstance(value, Mapping) else shown(value)
            raise UserError(f"{place}: there is no field {field!r}. Found: {there or 'none'}.")
        value = value[part]
    return value


def _text(value: Any, field: str, place: str, depth: int = 0) -> str:
    """Return a field as it stands in a prompt; `depth` counts the lists around it."""
    if TEXT.fits(value):
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        joint = " " if depth else "\n"
        return joint.join(_text(each, field, place, depth + 1) for each in value)
    raise UserError(
        f"{place}: field {field!r} must be a text, a number or a list of them, got {shown(value)}."
    )


def _answers(value: Any, field: str, place: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(each, list | tuple) for each in listed):
        raise UserError(
            f"{place}: answers in {field!r} must be a text or a list of texts, got {shown(value)}."
        )
    return tuple(_text(each, field, place) for each in listed)
