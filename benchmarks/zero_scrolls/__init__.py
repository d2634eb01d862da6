"""ZeroSCROLLS by its official protocol: ten tasks on long English texts, without examples.

Tasks, answer lengths and truncation follow tau-nlp/zero_scrolls at commit c994676, scoring the
dataset `tau/zero_scrolls` itself (arXiv 2305.14196). Answers of the test split are withheld: its
predictions go to a submission file (`harness.report.submission`); the validation split is scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.zero_scrolls.tasks import find_task


def prompt(row: Mapping[str, Any]) -> str:
    """Return a row's prompt, neither cut nor wrapped: its `input` as given."""
    return str(row["input"])


def score(task: str, prediction: str, references: Iterable[str]) -> float:
    """Return the official score of one prediction, 0 to 1, the best over the references.

    For summaries the geometric mean of the prediction's own ROUGE-1, ROUGE-2 and ROUGE-L; a task's
    score is made of their averages instead. Raises UserError for an unknown task, otherwise what
    the metric raises (`benchmarks.zero_scrolls.metrics`).
    """
    return find_task(task).mark(prediction, tuple(references))["score"]
