"""The tasks of LongBench v1 and their prompt templates.

From THUDM/LongBench `LongBench/` at commit 2e00731 (MIT; the notice is in NOTICE.txt).
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

from benchmarks.longbench.metrics import (
    CLASSIFICATION,
    CODE_SIM,
    COUNT,
    QA_F1,
    QA_F1_ZH,
    RETRIEVAL,
    RETRIEVAL_ZH,
    ROUGE_L,
    ROUGE_ZH,
)
from benchmarks.task import Task
from kvmerge.errors import unknown

_FEW_SHOT: dict[str, Any] = {"chat": False, "first_line": True}

# Few-shot and code prompts are continued as plain text. samsum alone also stops at a newline.
TASKS: tuple[Task, ...] = (
    Task("narrativeqa", QA_F1, 128),
    Task("qasper", QA_F1, 128),
    Task("multifieldqa_en", QA_F1, 64),
    Task("multifieldqa_zh", QA_F1_ZH, 64),
    Task("hotpotqa", QA_F1, 32),
    Task("2wikimqa", QA_F1, 32),
    Task("musique", QA_F1, 32),
    Task("dureader", ROUGE_ZH, 128),
    Task("gov_report", ROUGE_L, 512),
    Task("qmsum", ROUGE_L, 512),
    Task("multi_news", ROUGE_L, 512),
    Task("vcsum", ROUGE_ZH, 512),
    Task("trec", CLASSIFICATION, 64, **_FEW_SHOT),
    Task("triviaqa", QA_F1, 32, **_FEW_SHOT),
    Task("samsum", ROUGE_L, 128, **_FEW_SHOT, stop_at_newline=True, min_new_tokens=1),
    Task("lsht", CLASSIFICATION, 64, **_FEW_SHOT),
    Task("passage_count", COUNT, 32),
    Task("passage_retrieval_en", RETRIEVAL, 32),
    Task("passage_retrieval_zh", RETRIEVAL_ZH, 32),
    Task("lcc", CODE_SIM, 64, chat=False),
    Task("repobench-p", CODE_SIM, 64, chat=False),
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
