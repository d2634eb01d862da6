"""Budgets: what is accepted, and how each is rounded (docs/methods.md)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmerge.budget import Budget, count
from kvmerge.errors import UserError
from tests.tiny import quick


@pytest.mark.parametrize(
    ("given_", "value"),
    [
        (0.35, 0.35),
        ("0.35", 0.35),
        (1, 1.0),
        (1.0, 1.0),
        ("1", 1.0),
        ("1.0", 1.0),
        (1e-9, 1e-9),
        (2, 2),
        ("1024", 1024),
    ],
)
def test_fractions_and_counts_are_read_with_their_types(given_, value):
    budget = Budget.parse(given_)
    assert budget.value == value
    assert type(budget.value) is type(value)


@pytest.mark.parametrize(
    "given_",
    [0, -1, 0.0, -0.5, 1.5, 2.0, "2.0", "1.01", "half", "", None, True, [0.5], math.nan, math.inf],
)
def test_other_budgets_are_refused_with_what_is_allowed(given_):
    with pytest.raises(UserError, match=r"in \(0, 1\].*2 or more") as caught:
        Budget.parse(given_)
    assert f"budget={given_!r}" in str(caught.value) or f"budget={given_}" in str(caught.value)


@pytest.mark.parametrize(
    ("budget", "length", "entries"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999…
        (0.57, 100, 57),
        (0.35, 3500, 1225),
        (0.5, 3500, 1750),
        (0.5, 7, 3),
        (0.5, 1, 1),
        (0.01, 50, 1),
        (1, 17, 17),
        (1024, 3500, 1024),
        (1024, 1024, 1024),
        (1024, 1000, 1000),
        (2, 1, 1),
    ],
)
def test_a_budget_keeps_the_floor_and_at_least_one_entry(budget, length, entries):
    assert Budget.parse(budget).entries(length) == entries


def test_fraction_of_an_integer_budget_follows_the_prompt():
    assert Budget.parse(20).fraction(80) == 0.25
    assert Budget.parse(20).fraction(10) == 1.0
    assert Budget.parse(0.3).fraction(7) == 0.3  # as requested, not as rounded


@pytest.mark.parametrize(
    ("budget", "text"), [(1, "1"), (1.0, "1"), (0.35, "0.35"), (0.5, "0.5"), (1024, "1024")]
)
def test_a_budget_prints_as_it_is_read_back(budget, text):
    assert str(Budget.parse(budget)) == text
    assert Budget.parse(text) == Budget.parse(budget)


@quick
@given(percent=st.integers(1, 99), length=st.integers(1, 5000))
def test_count_is_the_exact_floor(percent, length):
    assert count(percent / 100, length) == percent * length // 100


@quick
@given(fraction=st.floats(1e-6, 1), length=st.integers(1, 5000))
def test_entries_stay_within_the_prompt(fraction, length):
    assert 1 <= Budget.parse(fraction).entries(length) <= length
