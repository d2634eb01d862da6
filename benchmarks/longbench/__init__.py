"""LongBench v1 by its official protocol: 21 tasks, English, Chinese and code.

Tasks, answer lengths, prompts and scoring follow THUDM/LongBench `LongBench/` at commit 2e00731
(MIT; the notice is in NOTICE.txt).
"""

from __future__ import annotations

import functools
import logging
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.encoding import encode_truncating_middle
from benchmarks.loading import (
    TEXT,
    TEXTS,
    TEXTS_OR_NULL,
    parse_rows,
    read_bytes,
    sha256,
    shown,
)
from benchmarks.longbench.metrics import score_task
from benchmarks.task import Encoded, PromptFormat, Sample, Task, choose_tasks
from kvmerge.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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

REPOSITORY = "THUDM/LongBench"
REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
ARCHIVE = "data.zip"
ARCHIVE_SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"
"""SHA-256 of the archive at `REVISION`."""


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
        revision: commit, branch or tag of the hub repository. The archive of the default one is
            checked against its known SHA-256.

    Raises UserError for a task that does not exist, and for a missing folder or file.
    """

    name = "longbench"

    def __init__(
        self,
        data_dir: str | None = None,
        tasks: Sequence[str] | None = None,
        revision: str = REVISION,
    ) -> None:
        self.tasks = choose_tasks(TASKS, tasks, "LongBench")
        self.revision = revision
        self.data_dir = None if data_dir is None else Path(data_dir).expanduser()
        if self.data_dir is not None:
            _check_folder(self.data_dir, self.tasks)

    def samples(self, task: Task) -> list[Sample]:
        """Return all rows of `task`, in file order.

        Raises UserError naming the file, and the line of a row that breaks the official schema.
        """
        data, source = self._read(task)
        rows = parse_rows(data, source, FIELDS, id_field="_id")
        # The official scorer uses the label set of the last record for every record.
        labels = rows[-1][1]["all_classes"]
        for place, row in rows:
            _check_row(row, labels, task, place)
        return [
            Sample(
                id=row["_id"],
                task=task.name,
                prompt=prompt(row),
                answers=tuple(row["answers"]),
                all_classes=None if labels is None else tuple(labels),
                row=row,
            )
            for _, row in rows
        ]

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Return the token ids fed to prefill (`benchmarks.encoding`)."""
        return Encoded(encode_truncating_middle(tokenizer, sample.prompt, fmt, wrap=task.chat))

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Return the official score of one prediction, 0 to 1."""
        return {"score": score_task(task, prediction, sample.answers, sample.all_classes)}

    def notes(self) -> list[str]:
        """Return what the code metric is computed with, if it is used: it moves scores."""
        if any(task.metric == "code_sim" for task in self.tasks):
            return ["code_sim is fuzzywuzzy's ratio on difflib, as without python-Levenshtein."]
        return []

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each chosen task's file; it is the same in a folder and a zip."""
        return {task.name: sha256(self._read(task)[0]) for task in self.tasks}

    def _read(self, task: Task) -> tuple[bytes, str]:
        """Return a task's file and how to name it in messages."""
        file_name = f"{task.name}.jsonl"
        if self.data_dir is not None:
            path = self.data_dir / file_name
            return read_bytes(path), str(path)
        try:
            with zipfile.ZipFile(self._archive) as archive:
                for member in archive.namelist():
                    if member.rpartition("/")[2] == file_name:
                        return archive.read(member), f"{self._archive}, {member}"
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {self._archive}: {error}.") from error
        raise UserError(f"{self._archive} holds no {file_name}.")

    @functools.cached_property
    def _archive(self) -> Path:
        """The official archive in the hub's cache, downloaded if it is not there yet."""
        from huggingface_hub import hf_hub_download

        wanted = f"{ARCHIVE} of the hub's dataset {REPOSITORY} (revision {self.revision})"
        logger.info("Fetching %s, 114 MB unless it is in the hub's cache", wanted)
        try:
            path = Path(
                hf_hub_download(
                    repo_id=REPOSITORY,
                    filename=ARCHIVE,
                    repo_type="dataset",
                    revision=self.revision,
                )
            )
        except Exception as error:
            # A broken download arrives as an OSError, or as httpx's or the Xet client's own error.
            raise UserError(
                f"cannot fetch {wanted}: {error}\n"
                f"If you have the files, pass benchmark.data_dir=DIR, a folder with <task>.jsonl."
            ) from error
        if self.revision == REVISION and (found := sha256(read_bytes(path))) != ARCHIVE_SHA256:
            raise UserError(
                f"{path} is damaged: its SHA-256 is {found}, expected {ARCHIVE_SHA256}. "
                f"Delete it and run again."
            )
        return path


def _check_folder(folder: Path, tasks: Sequence[Task]) -> None:
    """Say what is missing before anything runs."""
    if not folder.is_dir():
        raise UserError(
            f"benchmark.data_dir {folder} is not a folder. It must hold one <task>.jsonl a task."
        )
    missing = [f"{task.name}.jsonl" for task in tasks if not (folder / f"{task.name}.jsonl").is_file()]
    if missing:
        there = [task.name for task in TASKS if (folder / f"{task.name}.jsonl").is_file()]
        hint = f" To run what is there: benchmark.tasks=[{','.join(there)}]." if there else ""
        raise UserError(f"benchmark.data_dir {folder} has no {', '.join(missing)}.{hint}")


def _check_row(row: Mapping[str, Any], labels: Sequence[str] | None, task: Task, place: str) -> None:
    """Refuse a row of another task, and one that would fail at scoring, hours into a run."""
    if row["dataset"] != task.name:
        raise UserError(f"{place}: dataset is {row['dataset']!r}, expected {task.name!r}.")
    try:
        score_task(task, "", row["answers"], labels)
    except Exception as error:
        raise UserError(
            f"{place}: metric {task.metric} cannot score against answers "
            f"{shown(row['answers'])} with all_classes {shown(labels)} "
            f"({type(error).__name__}: {error})."
        ) from error
