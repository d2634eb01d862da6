"""LongBench v1 by its official protocol: 21 tasks, English, Chinese and code.

Tasks, answer lengths, prompts and scoring follow THUDM/LongBench `LongBench/` at commit 2e00731
(MIT; the notice is in NOTICE.txt).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.longbench.tasks import find_task, template


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
    return find_task(dataset).mark(prediction, tuple(answers), all_classes)["score"]
