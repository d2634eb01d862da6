"""How an answer to a needle is scored, 0 to 1."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from benchmarks.metric import Metric, best_of

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


def number(prediction: str, answer: str) -> float:
    """Return 1 if the first run of digits in the prediction is the answer, else 0."""
    digits = re.search(r"\d+", prediction)
    return float(digits is not None and digits[0] == answer)


def recall(prediction: str, answer: str) -> float:
    """Return the share of the answer's different lower-case words that the prediction has.

    Words are split at white space alone.
    """
    expected = set(answer.lower().split())
    return len(expected & set(prediction.lower().split())) / len(expected)


def rouge1_f(prediction: str, answer: str) -> float:
    """Return the F-measure of Google's ROUGE-1 with stemming."""
    return float(_rouge().score(answer, prediction)["rouge1"].fmeasure)


@functools.cache
def _rouge() -> RougeScorer:
    """Return the scorer; importing it loads nltk, a second at the first use."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)


NUMBER, RECALL, ROUGE1_F = (
    Metric(compare.__name__, best_of(compare)) for compare in (number, recall, rouge1_f)
)
METRICS = (NUMBER, RECALL, ROUGE1_F)
