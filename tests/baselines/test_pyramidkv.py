"""PyramidKV: the schedules of the method notes, exact budgets, and its tie to SnapKV."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.pyramidkv import PyramidKV, layer_counts
from baselines.snapkv import SnapKV
from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from kvmerge.session import CacheSession, Policy, Row
from tests.fidelity.vectors import positions
from tests.tiny import layer, quick


@pytest.mark.parametrize(
    ("n_keep", "first", "last", "step", "total"),
    [(512, 983, 53, 30, 16832), (1750, 3397, 111, 106, 56384)],
)
def test_golden_of_the_authors_rounding(n_keep, first, last, step, total):
    counts = layer_counts(n_keep, 3500, 32, window=8, beta=20, exact=False)
    assert [count - 8 for count in counts] == list(range(first, last - 1, -step))
    assert sum(counts) == total


@quick
@given(
    length=st.integers(2, 400),
    share=st.floats(0.01, 0.99),
    layers=st.integers(1, 40),
    window=st.integers(1, 40),
    beta=st.integers(1, 30),
)
def test_exact_counts_mean_the_budget_and_never_rise(length, share, layers, window, beta):
    n_keep = max(1, int(share * length))
    counts = layer_counts(n_keep, length, layers, window=window, beta=beta, exact=True)
    rounded = layer_counts(n_keep, length, layers, window=window, beta=beta, exact=False)
    assert len(counts) == layers
    assert sum(counts) == n_keep * layers <= sum(rounded)
    assert counts == sorted(counts, reverse=True)
    assert max(counts) <= length
    assert min(counts) >= min(window, n_keep)
    cut = max(counts)  # only the top is cut: layers below it keep the authors' count
    assert all(own == theirs or own >= cut - 1 for own, theirs in zip(counts, rounded, strict=True))


def test_surplus_is_taken_from_the_largest_layers_by_hand():
    assert layer_counts(20, 100, 4, window=4, beta=16, exact=False) == [35, 25, 15, 5]
    assert layer_counts(19, 100, 4, window=4, beta=16, exact=False) == [34, 24, 14, 4]
    assert layer_counts(21, 100, 4, window=4, beta=16, exact=False) == [37, 27, 17, 7]
    assert layer_counts(21, 100, 4, window=4, beta=16, exact=True) == [33, 27, 17, 7]
    assert layer_counts(12, 99, 11, window=4, beta=8, exact=False) == list(range(19, 8, -1))
    cut = [13, 13, 13, 13, 13, 13, 12, 12, 11, 10, 9]
    assert layer_counts(12, 99, 11, window=4, beta=8, exact=True) == cut


def test_short_prompts_and_small_budgets_are_even():
    assert layer_counts(60, 100, 3, window=8, beta=20, exact=False) == [60] * 3
    assert layer_counts(8, 100, 3, window=8, beta=20, exact=False) == [8] * 3
    assert layer_counts(30, 100, 1, window=8, beta=20, exact=False) == [30]


def test_a_layer_is_snapkv_at_its_own_count():
    before = layer(60)
    method, plain = PyramidKV(window=8, kernel=3), SnapKV(window=8, kernel=3)
    for n_keep in (9, 30, 7):
        allowance = Allowance(n_keep, n_keep / 60)
        wanted = positions(plain.compress(before, allowance))
        assert positions(method.compress(before, allowance)) == wanted
    last = method.compress(before, Allowance(8, 8 / 60))
    assert positions(last) == [list(range(52, 60))] * 2  # a layer may keep no more than its window


def test_the_session_keeps_each_layers_count():
    before = layer(60)
    session = CacheSession([Row(PyramidKV(beta=8), Budget(20))], 3)
    session.begin([60], 4)
    for layer_idx in range(3):
        session.attend(layer_idx, before.queries, before.keys, before.values, before.softmax)
    counts = layer_counts(20, 60, 3, window=8, beta=8, exact=True)
    assert session.stats[0].entries == [[count] * 2 for count in counts]
    assert len(set(counts)) == 3


def test_layers_cannot_be_skipped_besides():
    with pytest.raises(UserError, match="layers_skip cannot be combined"):
        CacheSession([Row(PyramidKV(), Budget(0.5))], 3, policy=Policy(layers_skip=(0,)))


def test_beta_must_be_a_count():
    with pytest.raises(UserError, match=r"beta=0 must be a whole number"):
        PyramidKV(beta=0)
