"""LongBench-E: thirteen of LongBench's tasks on rows of evenly spread length.

Prompts, answer lengths and metrics are LongBench's. The files `<task>_e.jsonl` of its archive hold
other rows, and scores are also reported by length, in the buckets of the official `eval.py`
(THUDM/LongBench at commit 2e00731).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.longbench.benchmark import ARCHIVE, FIELDS, LongBench
from benchmarks.longbench.tasks import find_task
from benchmarks.rows import Kind
from benchmarks.task import Task
from kvmerge.errors import UserError

ROWS = {
    "qasper": 224,
    "multifieldqa_en": 150,
    "hotpotqa": 300,
    "2wikimqa": 300,
    "gov_report": 300,
    "multi_news": 294,
    "trec": 300,
    "triviaqa": 300,
    "samsum": 300,
    "passage_count": 300,
    "passage_retrieval_en": 300,
    "lcc": 300,
    "repobench-p": 300,
}
"""Rows that each task officially has (`task.md`), in the official order of tasks."""

TASKS = tuple(find_task(name) for name in ROWS)
FILES = (ARCHIVE,)

_WHOLE = Kind("a whole number of 0 or more", lambda v: type(v) is int and v >= 0)


def bucket(length: int) -> str:
    """Return the bucket of a row's `length`, in words (characters for Chinese), not tokens."""
    if length < 4000:
        return "0-4k"
    return "4-8k" if length < 8000 else "8k+"


class LongBenchE(LongBench):
    """The benchmark: rows from a folder of `<task>_e.jsonl`, or from the official archive.

    Args:
        data_dir: folder to read; None takes `data.zip` of the hub's `THUDM/LongBench` instead.
        tasks: names of the tasks to run, without `_e`; None means all 13.
        revision: commit, branch or tag of the hub repository; None takes the pinned commit.
        profile: how prompts are cut and wrapped, as in LongBench.

    Raises UserError for a task or profile that does not exist, for a missing folder or file, and for a
    revision of a folder.
    """

    name = "longbench_e"
    title = "LongBench-E"
    all_tasks = TASKS
    fields = FIELDS | {"length": _WHOLE}
    suffix = "_e.jsonl"

    def groups(self, row: Mapping[str, Any]) -> dict[str, str | int]:
        """Return the length bucket of a row."""
        return {"length": bucket(row["length"])}

    def check_dataset(self, row: Mapping[str, Any], task: Task, place: str) -> None:
        """Refuse a row of another task; both ways to name a LongBench-E task are met."""
        if row["dataset"] not in (task.name, f"{task.name}_e"):
            raise UserError(
                f"{place}: dataset is {row['dataset']!r}, expected {task.name!r} (or with _e)."
            )
