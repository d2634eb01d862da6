"""Metrics against values worked out by hand or printed by the official scorer, and slow oracles."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from benchmarks import zero_scrolls
from benchmarks.metrics import find_metric
from benchmarks.zero_scrolls.metrics import (
    METRICS,
    PERCENTAGE,
    concordance_index,
    exp_similarity,
    rouge_gm,
)
from benchmarks.zero_scrolls.tasks import TASKS
from harness.report.bootstrap import gather, score_task
from kvmerge.errors import UserError
from tests.synthetic_run import record

BY_NAME = {metric.name: metric for metric in METRICS}


def task_score(lines):
    metric = find_metric("rouge_gm")
    return score_task("gov_report", gather(lines, metric), metric).value


# Summaries


def test_rouge_is_the_printed_example_of_the_official_scorer():
    pairs = [
        ("exact match example", ["exact match example"]),
        ("hello there", ["hello", "hi there"]),
        ("general kenobi", ["commander kenobi"]),
    ]
    parts = [rouge_gm(prediction, references) for prediction, references in pairs]
    means = {name: np.mean([part[name] for part in parts]) for name in parts[0]}
    assert 100 * means["rouge1"] == pytest.approx(72.2222, abs=5e-5)
    assert 100 * means["rouge2"] == pytest.approx(33.3333, abs=5e-5)
    assert 100 * means["rougel"] == pytest.approx(72.2222, abs=5e-5)
    lines = [record(str(i), part.pop("score"), extra=part) for i, part in enumerate(map(dict, parts))]
    assert task_score(lines) == pytest.approx(55.8136, abs=5e-5)
    assert 100 * means["score"] != pytest.approx(55.8136, abs=1)


def test_a_tasks_score_is_the_geometric_mean_of_averages():
    shares = [(0.2, 0.16, 0.08), (0.4, 0.0, 0.28)]
    lines = [
        record(str(i), 0.5, extra=dict(zip(("rouge1", "rouge2", "rougel"), parts, strict=True)))
        for i, parts in enumerate(shares)
    ]
    assert task_score(lines) == pytest.approx(16.286506, abs=5e-7)  # of 30, 8 and 18


def test_each_rouge_part_takes_its_own_best_reference():
    # The first reference has the words, the second the word pairs.
    references = ["d c b a", "a b x y z"]
    alone = [rouge_gm("a b c d", [reference]) for reference in references]
    assert alone[0]["rouge1"] > alone[1]["rouge1"]
    assert alone[0]["rouge2"] < alone[1]["rouge2"]
    both = rouge_gm("a b c d", references)
    for part in ("rouge1", "rouge2", "rougel"):
        assert both[part] == max(one[part] for one in alone)
    assert both["score"] == pytest.approx((both["rouge1"] * both["rouge2"] * both["rougel"]) ** (1 / 3))
    assert both["score"] > max(one["score"] for one in alone)


def test_rouge_does_not_stem():
    assert rouge_gm("dogs", ["dog"])["rouge1"] == 0


@pytest.mark.parametrize("prediction", ["", " \n", "...", "北京", "\ufffd"])
def test_a_summary_without_words_scores_zero(prediction):
    assert set(rouge_gm(prediction, ["a report"]).values()) == {0.0}


# Questions


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The answer is Paris, France.", ["Paris"], 0.4),
        ("red", ["green", "red", "blue sky red"], 1),
        ("The U.S.", ["us"], 1),
        ("a café", ["The Cafe!"], 1),
        ("“Zürich”", ['"Zurich"'], 0),  # ASCII quotes go before transliteration, these come with it
        ("unanswerable", ["Paris"], 0),
        ("", ["Paris"], 0),
        ("the", ["a"], 0),
    ],
)
def test_f1_is_that_of_normalised_words_in_ascii(prediction, references, expected):
    assert zero_scrolls.score("qasper", prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", 1),
        ("(B) the war", 1),
        ("The answer is B.", 1),
        ("b", 0),
        ("A good question; B", 0),  # the article counts as a choice
        ("DNA, then B", 1),  # a letter inside a word does not
        ("E or B", 1),
        ("none", 0),
        ("", 0),
    ],
)
def test_accuracy_takes_the_first_letter_that_stands_alone(prediction, expected):
    assert zero_scrolls.score("quality", prediction, ["(B) because"]) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("72%", 0.435275),
        ("60%", 1),
        ("About 60.0% of them, not 10%", 1),
        ("50%", 0.5),
        ("62.5%", 0.840896),
        ("60", 0),
        ("60 %", 0),
        ("sixty percent", 0),
    ],
)
def test_exp_similarity_compares_the_first_percentages(prediction, expected):
    assert zero_scrolls.score("space_digest", prediction, ["60%"]) == pytest.approx(expected, abs=5e-7)


@given(st.text("0123.%a ٣", max_size=12))
def test_percentages_are_those_that_the_official_pattern_finds(text):
    official, ours = re.search(r"(\d+\.?\d*)%", text), PERCENTAGE.search(text)
    assert (official and official.span(1)) == (ours and ours.span(1))


def test_a_number_without_end_is_scored_at_once():
    assert exp_similarity("9" * 100_000, "40%") == 0
    assert exp_similarity("9" * 400 + "%", "40%") == 0
    assert exp_similarity("9" * 400 + "%", "8" * 400 + "%") == 1


@given(st.integers(0, 100), st.integers(0, 100))
def test_exp_similarity_halves_each_ten_points(one, other):
    value = exp_similarity(f"{one}%", f"{other}%")
    assert value == exp_similarity(f"{other}%", f"{one}%")
    assert value / 2 == pytest.approx(exp_similarity(f"{max(one, other) + 10}%", f"{min(one, other)}%"))


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("3,2,1,4", 5 / 6),
        ("3, 1, 2, 4", 1),
        ("The order is: 3 1 2 4.", 1),
        ("4,2,1,3", 0),
        ("3,1,2", 0),
        ("3,1,2,4,4", 0),
        ("3,1,2,2", 0),
        ("3,1,2,4,5", 0),
        ("3124", 0),
        ("", 0),
        ("9" * 5000, 0),
    ],
)
def test_concordance_index_is_the_share_of_pairs_in_order(prediction, expected):
    assert zero_scrolls.score("book_sum_sort", prediction, ["3,1,2,4"]) == pytest.approx(expected)


orders = st.integers(2, 9).flatmap(lambda n: st.tuples(*[st.permutations(range(1, n + 1))] * 2))


def listed(order):
    return ", ".join(map(str, order))


@given(orders)
def test_concordance_index_is_rescaled_kendall_tau(pair):
    prediction, reference = pair
    places = [[order.index(number) for number in sorted(order)] for order in pair]
    expected = (kendalltau(*places).statistic + 1) / 2
    assert concordance_index(listed(prediction), listed(reference)) == pytest.approx(expected)


@given(orders)
def test_concordance_index_of_the_reverse_is_the_rest(pair):
    prediction, reference = pair
    forth, back = (
        concordance_index(listed(p), listed(reference)) for p in (prediction, prediction[::-1])
    )
    assert forth + back == pytest.approx(1)


@given(orders, st.integers(0, 9))
def test_a_list_that_is_no_rearrangement_scores_zero(pair, number):
    prediction, reference = pair
    assert concordance_index(listed([*prediction, number]), listed(reference)) == 0


# All of them


@pytest.mark.parametrize(
    ("task", "reference", "error"),
    [
        ("quality", "none of these", AssertionError),
        ("quality", "", AssertionError),
        ("space_digest", "60", ValueError),
        ("book_sum_sort", "1", ValueError),
        ("book_sum_sort", "1,2,2", ValueError),
        ("book_sum_sort", "one", ValueError),
    ],
)
def test_an_unusable_reference_raises(task, reference, error):
    for prediction in ("", "A 60% 1,2,3"):
        with pytest.raises(error):
            zero_scrolls.score(task, prediction, [reference])


def test_no_references_raise():
    for task in TASKS:
        with pytest.raises(ValueError):  # noqa: PT011 - what max() says of nothing
            zero_scrolls.score(task.name, "1", [])


def test_an_unknown_task_has_no_score():
    with pytest.raises(UserError, match=r"ZeroSCROLLS task 'qaspr'.*qasper"):
        zero_scrolls.score("qaspr", "x", ["x"])


def test_references_may_come_from_any_iterable():
    assert zero_scrolls.score("gov_report", "a b", iter(["x", "a b"])) == pytest.approx(1)


REFERENCES = {
    "rouge_gm": "A report of 12 pages.",
    "f1": "the report",
    "accuracy": "C",
    "exp_similarity": "40%",
    "concordance_index": "2, 1, 3",
}


@given(st.sampled_from(sorted(BY_NAME)), st.text(max_size=30), st.randoms(use_true_random=False))
def test_scores_stay_in_range(name, prediction, rng: random.Random):
    words = [*prediction, "12%", "C", " report ", "2,1,3"]
    rng.shuffle(words)
    parts = BY_NAME[name].sample("".join(words), [REFERENCES[name]])
    assert all(type(value) is float and 0 <= value <= 1 for value in parts.values())


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_a_reference_scores_full_marks_against_itself(name):
    assert BY_NAME[name].sample(REFERENCES[name], ["0%, A, 1,2,3", REFERENCES[name]])["score"] == 1
