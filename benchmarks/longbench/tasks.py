"""The tasks of LongBench v1 and their prompt templates.

From THUDM/LongBench `LongBench/` at commit 2e00731 (MIT; the notice is in NOTICE.txt).
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

from benchmarks.task import Task
from kvmerge.errors import unknown

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
