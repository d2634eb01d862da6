"""The official ZeroSCROLLS metrics: how one prediction is scored against its references.

Written from the behaviour of the scorer in the hub's dataset `tau/zero_scrolls` (`metrics/` at
commit b6de31d) and, for what was not read there (`f1.py`, `zero_scrolls.py`), of public copies of
it. Everything is on a scale of 0 to 1; the official scorer reports percent.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from unidecode import unidecode

from benchmarks.longbench.metrics import normalize, token_f1
from benchmarks.metric import Array, Metric, best_of

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

CHOICE = re.compile(r"\b[A-D]\b")
PERCENTAGE = re.compile(r"(?<!\d)(\d++\.?+\d*+)%")
"""Finds what the official `(\\d+\\.?\\d*)%` finds, which takes minutes for a text of 5,000 digits."""


def rouge_gm(
    prediction: str, references: Sequence[str], all_classes: Sequence[str] | None = None
) -> dict[str, float]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L F of Google's `rouge_score`, and their geometric mean.

    Each part is the best over the references by itself. No stemming. The official scorer first puts
    each sentence on a line of its own, which these three parts do not see. A text without a word
    (`a` to `z` and digits) scores 0. A task's score is the geometric mean of the *averages* of the
    parts, not the average of the samples' `score`.
    """
    found = _rouge().score_multi(references, prediction)
    parts = {name.lower(): float(score.fmeasure) for name, score in found.items()}
    return {"score": math.cbrt(math.prod(parts.values())), **parts}


@functools.cache
def _rouge() -> RougeScorer:
    """Return the scorer; importing it loads nltk, a second at the first use."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def f1(prediction: str, reference: str) -> float:
    """Return the token F1 of the normalised words, transliterated to ASCII after normalisation."""
    return token_f1(*(unidecode(normalize(text)).split() for text in (prediction, reference)))


def accuracy(prediction: str, reference: str) -> float:
    """Return 1 if the first of the letters A to D that stands alone is the reference's, else 0.

    Capitals only. A prediction that opens with the article `A` has chosen A. Raises AssertionError,
    as the official scorer does, if the reference has no such letter.
    """
    chosen, right = (CHOICE.search(text) for text in (prediction, reference))
    if right is None:
        raise AssertionError(f"the reference {reference!r} holds none of the letters A to D")
    return float(chosen is not None and chosen.group() == right.group())


def exp_similarity(prediction: str, reference: str) -> float:
    """Return 1, halved for each 10 points between the first percentages; 0 if the prediction has none.

    A number without its percent sign is none. Raises ValueError if the reference has none.
    """
    guess, right = (PERCENTAGE.search(text) for text in (prediction, reference))
    if right is None:
        raise ValueError(f"the reference {reference!r} holds no percentage")
    if guess is None:
        return 0.0
    ours, theirs = float(guess.group(1)), float(right.group(1))
    difference = 0.0 if ours == theirs else abs(ours - theirs)  # infinity less infinity is no number
    return float(0.5 ** (difference / 10))


def concordance_index(prediction: str, reference: str) -> float:
    """Return the share of the pairs of numbers that stand in the same order in both lists.

    A list is read from whatever digits, commas and spaces a text holds. One that is not a
    rearrangement of the reference (missing, repeated or further numbers) scores 0; a random one
    scores 0.5 on average. Raises ValueError if the reference has fewer than two numbers or repeats
    one; the official scorer fails on most of these too, or scores them 0.
    """
    order = _numbers(reference)
    if len(order) < 2 or len(set(order)) < len(order):
        raise ValueError(f"the reference {reference!r} is no list of two or more different numbers")
    predicted = _numbers(prediction)
    if sorted(predicted) != sorted(order):
        return 0.0
    place = {number: position for position, number in enumerate(predicted)}
    pairs = list(itertools.combinations(order, 2))
    return sum(place[first] < place[second] for first, second in pairs) / len(pairs)


def _numbers(text: str) -> list[int]:
    words = re.sub(r"[^0-9\s,]", "", text).replace(",", " ").split()
    try:
        return [int(word) for word in words]
    except ValueError:  # more digits than Python converts
        return []


def _geometric_mean(means: Array) -> Array:
    return 100 * np.cbrt(np.prod(means, axis=-1))


ROUGE_GM = Metric("rouge_gm", rouge_gm, parts=("rouge1", "rouge2", "rougel"), score=_geometric_mean)
F1, ACCURACY, EXP_SIMILARITY, CONCORDANCE_INDEX = (
    Metric(compare.__name__, best_of(compare))
    for compare in (f1, accuracy, exp_similarity, concordance_index)
)

METRICS = (ROUGE_GM, F1, ACCURACY, EXP_SIMILARITY, CONCORDANCE_INDEX)
"""Each raises ValueError without references."""
