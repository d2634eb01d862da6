"""LongBench v1 by its official protocol: 21 tasks, English, Chinese and code.

Tasks, answer lengths, prompts and scoring follow THUDM/LongBench `LongBench/` at commit 2e00731
(MIT; the notice is in NOTICE.txt).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from benchmarks.longbench.metrics import score_task
from benchmarks.longbench.profiles import find_profile
from benchmarks.rows import TEXT, TEXTS, TEXTS_OR_NULL, Kind, parse_rows, sha256, shown
from benchmarks.source import Archive, HubFile, Source, folder_or_hub
from benchmarks.task import Encoded, PromptFormat, Sample, Task, choose_tasks
from kvmerge.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FEW_SHOT: dict[str, Any] = {"chat": False, "first_line": True}

# Few-shot and code prompts are continued as plain text. samsum alone also stops at a newline.
TASKS: tuple[Task, ...] = (
    Task("narrativeqa", "qa_f1", 128),
    Task("qasper", "qa_f1", 128),
    Task("multifieldqa_en", "qa_f1", 64),
    Task("multifieldqa_zh", "qa_f1_zh", 64),
    Task("hotpotqa", "qa_f1", 32),
    Task("2wikimqa", "qa_f1", 32),
    Task("musique", "qa_f1", 32),
    Task("dureader", "rouge_zh", 128),
    Task("gov_report", "rouge_l", 512),
    Task("qmsum", "rouge_l", 512),
    Task("multi_news", "rouge_l", 512),
    Task("vcsum", "rouge_zh", 512),
    Task("trec", "classification", 64, **_FEW_SHOT),
    Task("triviaqa", "qa_f1", 32, **_FEW_SHOT),
    Task("samsum", "rouge_l", 128, **_FEW_SHOT, stop_at_newline=True, min_new_tokens=1),
    Task("lsht", "classification", 64, **_FEW_SHOT),
    Task("passage_count", "count", 32),
    Task("passage_retrieval_en", "retrieval", 32),
    Task("passage_retrieval_zh", "retrieval_zh", 32),
    Task("lcc", "code_sim", 64, chat=False),
    Task("repobench-p", "code_sim", 64, chat=False),
)
"""All tasks in the official order: name, metric, most new tokens, departures from plain QA."""

_BY_NAME = {task.name: task for task in TASKS}

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


def find_task(name: str) -> Task:
    """Return the task called `name`. Raises UserError listing the tasks if there is none."""
    if name not in _BY_NAME:
        raise unknown("LongBench task", name, _BY_NAME)
    return _BY_NAME[name]


@functools.cache
def template(name: str) -> str:
    """Return the official prompt template of a task, byte for byte."""
    path = files(__package__) / "prompts" / f"{find_task(name).name}.txt"
    # Bytes, because reading text would translate line ends.
    return path.read_bytes().decode("utf-8")


def prompt(row: Mapping[str, Any]) -> str:
    """Return the template of `row["dataset"]` filled with the row, neither cut nor wrapped."""
    return template(row["dataset"]).format_map(row)


def score(
    dataset: str,
    prediction: str,
    answers: Iterable[str],
    all_classes: Sequence[str] | None = None,
) -> float:
    """Return the official score of one prediction, 0 to 1.

    The best over `answers`, 0 if there are none; trec, triviaqa, samsum and lsht look at the first
    line alone. Raises UserError for an unknown dataset, otherwise what the official scorer raises
    (`benchmarks.longbench.metrics`).
    """
    return score_task(find_task(dataset), prediction, answers, all_classes)


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
            _check_answers(row, labels, task, place)
        return [
            Sample(
                id=row["_id"],
                task=task.name,
                prompt=template(task.name).format_map(row),
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
        return {"score": score_task(task, prediction, sample.answers, sample.all_classes)}

    def notes(self) -> list[str]:
        """Return what moves scores: another profile, the code metric, data of another revision."""
        notes = list(self.profile.notes)
        if any(task.metric == "code_sim" for task in self.tasks):
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


def _check_answers(
    row: Mapping[str, Any], labels: Sequence[str] | None, task: Task, place: str
) -> None:
    """Refuse a row that would fail at scoring, hours into a run."""
    try:
        score_task(task, "", row["answers"], labels)
    except Exception as error:
        raise UserError(
            f"{place}: metric {task.metric} cannot score against answers "
            f"{shown(row['answers'])} with all_classes {shown(labels)} "
            f"({type(error).__name__}: {error})."
        ) from error
