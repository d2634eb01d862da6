"""MiniLongBench: 237 samples of LongBench's 21 tasks, chosen to rank models as all 4,750 do.

Huang et al., ACL 2025 (arXiv 2505.19959); rows on the hub in `linggm/MiniLongBench`, one file
`data/<task>.jsonl` a task, in LongBench's fields (read from its loader script and from projects that
use it, not from the hub itself). They are run as LongBench's: its templates, its answer lengths, its
metrics.

The authors' own predictions (MilkThink-Lab/MiniLongBench at commit 504c247) were made otherwise: the
prompts of narrativeqa, qasper and multi_news have another wording, and their scorer does not cut the
answers of few-shot tasks to the first line. Their scores are therefore not this benchmark's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.longbench.benchmark import FIELDS, LongBench
from benchmarks.longbench.tasks import TASKS
from benchmarks.source import Files, HubFile, Source
from benchmarks.task import Task

ROWS = {
    "narrativeqa": 6,
    "qasper": 9,
    "multifieldqa_en": 7,
    "multifieldqa_zh": 15,
    "hotpotqa": 13,
    "2wikimqa": 13,
    "musique": 7,
    "dureader": 6,
    "gov_report": 12,
    "qmsum": 6,
    "multi_news": 11,
    "vcsum": 6,
    "trec": 8,
    "triviaqa": 12,
    "samsum": 15,
    "lsht": 8,
    "passage_count": 4,
    "passage_retrieval_en": 15,
    "passage_retrieval_zh": 15,
    "lcc": 26,
    "repobench-p": 23,
}
"""Rows that each task has: the number of the authors' published predictions."""

REPOSITORY = "linggm/MiniLongBench"
REVISION = "0ba7bf46265f1f783653693fb6b581f617f37275"
"""The hub's commit of February 2026, as another public project pins it with these 237 rows."""

_FILES = {
    task.name: HubFile(
        repo=REPOSITORY,
        filename=f"data/{task.name}.jsonl",
        revision=REVISION,
        licence="MIT (dataset card); the texts keep the terms of their datasets",
    )
    for task in TASKS
}
FILES = tuple(_FILES.values())

# What the hub's rows hold in `dataset` was not seen; the file's name says the task.
_FIELDS = {name: kind for name, kind in FIELDS.items() if name != "dataset"}


class MiniLongBench(LongBench):
    """The benchmark: rows from a folder of `<task>.jsonl`, or from the hub.

    Args:
        data_dir: folder to read; None takes the files of the hub's `linggm/MiniLongBench` instead.
        tasks: names of the tasks to run; None means all 21.
        revision: commit, branch or tag of the hub repository; None takes the pinned commit.
        profile: how prompts are cut and wrapped, as in LongBench.

    Raises UserError for a task or profile that does not exist, for a missing folder or file, and for a
    revision of a folder.
    """

    name = "minilongbench"
    title = "MiniLongBench"
    pinned = FILES[0]
    fields = _FIELDS

    def check_dataset(self, row: Mapping[str, Any], task: Task, place: str) -> None:
        """Accept every row."""

    def hub(self) -> Source:
        """Return the source of the rows where no folder is given."""
        return Files({name: file.at(self.revision) for name, file in _FILES.items()})

    def notes(self) -> list[str]:
        """Return what LongBench notes, and which tasks do not have MiniLongBench's number of rows."""
        counts = {task.name: len(self.samples(task)) for task in self.tasks}
        other = [
            f"{name} ({count}, not {ROWS[name]})"
            for name, count in counts.items()
            if count != ROWS[name]
        ]
        notes = super().notes()
        if other:
            notes.append(
                f"These are not MiniLongBench's rows, their number differs: {', '.join(other)}."
            )
        return notes
