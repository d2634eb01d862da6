"""The benchmark LongBench: its rows, and how they become prompts and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.longbench.metrics import CODE_SIM
from benchmarks.longbench.profiles import find_profile
from benchmarks.longbench.tasks import TASKS, template
from benchmarks.questions import after_context
from benchmarks.rows import TEXT, TEXTS, TEXTS_OR_NULL, Kind, parse_rows, sha256
from benchmarks.source import Archive, HubFile, Source, folder_or_hub
from benchmarks.task import Encoded, PromptFormat, Sample, Task, choose_tasks
from kvmerge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = {
    "input": TEXT,
    "context": TEXT,
    "answers": TEXTS,
    "all_classes": TEXTS_OR_NULL,
    "dataset": TEXT,
    "_id": TEXT,
}
"""Official fields in use; `length` and `language` may be present and are ignored."""

ARCHIVE = HubFile(
    repo="THUDM/LongBench",
    filename="data.zip",
    revision="5e628be450b7e67fb7ae6e201bd6d8f7056f7672",
    sha256="cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64",
    size=113_932_529,
    licence="MIT (repository); the texts keep the terms of their datasets",
)
FILES = (ARCHIVE,)
"""What the benchmark reads from the hub."""

ROWS = {task.name: 200 for task in TASKS} | {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}
"""Rows that each task officially has."""


class LongBench:
    """The benchmark: rows from a folder of `<task>.jsonl`, or from the official archive.

    Args:
        data_dir: folder to read; None takes `data.zip` of the hub's `THUDM/LongBench` instead.
        tasks: names of the tasks to run; None means all 21.
        revision: commit, branch or tag of the hub repository; None takes the pinned commit, whose
            archive has a known SHA-256. The results note another.
        profile: how prompts are cut and wrapped: `official`, or `kcf` for KVCache-Factory's way
            (`benchmarks.longbench.profiles`).

    Raises UserError for a task or profile that does not exist, for a missing folder or file, and
    for a revision of a folder.
    """

    name = "longbench"
    title = "LongBench"
    all_tasks: Sequence[Task] = TASKS
    fields: Mapping[str, Kind] = FIELDS
    suffix = ".jsonl"
    """What follows a task's name in the name of its file."""
    pinned = ARCHIVE
    """A file of the hub repository, at the revision that is taken by default."""

    def __init__(
        self,
        data_dir: str | None = None,
        tasks: Sequence[str] | None = None,
        revision: str | None = None,
        profile: str = "official",
    ) -> None:
        self.profile = find_profile(profile)
        chosen = choose_tasks(self.all_tasks, tasks, self.title)
        self.tasks = tuple(self.profile.adapt(task) for task in chosen)
        self.revision = revision
        self.source = folder_or_hub(
            data_dir,
            revision,
            self.hub,
            [task.name for task in self.tasks],
            known=[task.name for task in self.all_tasks],
            suffix=self.suffix,
        )

    def samples(self, task: Task) -> list[Sample]:
        """Return all rows of `task`, in file order.

        Raises UserError naming the file, and the line of a row that breaks the official schema.
        """
        data, place = self.source.read(task.name)
        rows = parse_rows(data, place, self.fields, id_field="_id")
        # The official scorer uses the label set of the last record for every record.
        labels = rows[-1][1]["all_classes"]
        for place, row in rows:
            self.check_dataset(row, task, place)
            task.metric.check_answers(row["answers"], labels, place)
        return [
            Sample(
                id=row["_id"],
                task=task.name,
                prompt=template(task.name).format_map(row),
                question=after_context(template(task.name), row),
                answers=tuple(row["answers"]),
                all_classes=None if labels is None else tuple(labels),
                groups=self.groups(row),
                row=row,
            )
            for _, row in rows
        ]

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Return the token ids fed to prefill, by the profile."""
        return Encoded(self.profile.encode(tokenizer, sample.prompt, task, fmt))

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Return the official score of one prediction, 0 to 1."""
        return task.mark(prediction, sample.answers, sample.all_classes)

    def notes(self) -> list[str]:
        """Return what moves scores: another profile, the code metric, data of another revision."""
        notes = list(self.profile.notes)
        if any(task.metric is CODE_SIM for task in self.tasks):
            notes.append("code_sim is fuzzywuzzy's ratio on difflib, as without python-Levenshtein.")
        return [*notes, *self.pinned.notes(self.revision)]

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each chosen task's file; it is the same in a folder and a zip."""
        return {task.name: sha256(self.source.read(task.name)[0]) for task in self.tasks}

    def check_dataset(self, row: Mapping[str, Any], task: Task, place: str) -> None:
        """Refuse a row of another task."""
        if row["dataset"] != task.name:
            raise UserError(f"{place}: dataset is {row['dataset']!r}, expected {task.name!r}.")

    def groups(self, row: Mapping[str, Any]) -> dict[str, str | int]:
        """Return what a row's scores are also reported by: nothing (`Sample.groups`)."""
        return {}

    def hub(self) -> Source:
        """Return the source of the rows where no folder is given."""
        return Archive(ARCHIVE.at(self.revision), suffix=self.suffix)
