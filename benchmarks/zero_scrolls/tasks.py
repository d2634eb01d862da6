"""The tasks of ZeroSCROLLS, from tau-nlp/zero_scrolls at commit c994676."""

from __future__ import annotations

from benchmarks.task import Task
from benchmarks.zero_scrolls.metrics import ACCURACY, CONCORDANCE_INDEX, EXP_SIMILARITY, F1, ROUGE_GM
from kvmerge.errors import unknown

TASKS: tuple[Task, ...] = (
    Task("gov_report", ROUGE_GM, 1024),
    Task("summ_screen_fd", ROUGE_GM, 512),
    Task("qmsum", ROUGE_GM, 512),
    Task("squality", ROUGE_GM, 512),
    Task("qasper", F1, 128),
    Task("narrative_qa", F1, 64),
    Task("quality", ACCURACY, 10),
    Task("musique", F1, 32),
    Task("space_digest", EXP_SIMILARITY, 36),
    Task("book_sum_sort", CONCORDANCE_INDEX, 256),
)
"""All tasks in the official order: name, metric, longest answer of the official run on chat APIs."""

_BY_NAME = {task.name: task for task in TASKS}

SUMMARIES = frozenset({"gov_report", "summ_screen_fd", "qmsum", "squality"})
"""Tasks whose instruction gets no format request in the official run on chat APIs."""

PAPER_TASKS = frozenset(
    {"gov_report", "summ_screen_fd", "qmsum", "squality", "qasper", "narrative_qa", "quality"}
)
"""Our reading of the seven tasks that the KVMerger paper averages without naming them."""


def find_task(name: str) -> Task:
    """Return the task called `name`. Raises UserError listing the tasks if there is none."""
    if name not in _BY_NAME:
        raise unknown("ZeroSCROLLS task", name, _BY_NAME)
    return _BY_NAME[name]
