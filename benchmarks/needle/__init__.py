"""Needle in a haystack: one sentence at a known depth of a long text, asked for at its end.

The construction, the sandwich needle and its two scores are the common ones, as in
`run_needle_in_haystack.py` and `scripts/scripts_needle/visualize.py` of Zefan-Cai/KVCache-Factory at
commit c97f9d7 (MIT; the notice is in NOTICE.txt). The sandwich has a guessable answer and scores that
depend on its wording, so the task to report is `number`: seven random digits, found or not.
"""

from __future__ import annotations

from benchmarks.needle.tasks import find_task


def score(task: str, prediction: str, answer: str) -> float:
    """Return the score of one prediction, 0 to 1 (`benchmarks.needle.metrics`).

    `sandwich_rouge1` is held against the whole needle. Raises UserError for an unknown task.
    """
    return find_task(task).mark(prediction, [answer])["score"]
