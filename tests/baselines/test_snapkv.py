"""SnapKV: the goldens of the method notes, a slow version, and its edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.snapkv import SnapKV, keep, pool, pooled_scores
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from kvmerge.softmax import Softmax
from tests.fidelity.vectors import positions
from tests.kvmerge import oracles
from tests.tiny import layer, normal, quick

SUMS = torch.tensor([[[0.1, 0, 0.6, 0, 0, 0.3]]])


@pytest.mark.parametrize(
    ("pooling", "pooled", "n_past", "best"),
    [
        ("avg", [0.033333, 0.233333, 0.2, 0.2, 0.1, 0.1], 1, [1]),
        ("max", [0.1, 0.6, 0.6, 0.6, 0.3, 0.3], 2, [1, 2]),  # a tie of three: the lower ones
    ],
)
def test_each_pooling_keeps_its_own_best_tokens(pooling, pooled, n_past, best):
    found = pool(SUMS, 3, pooling)
    torch.testing.assert_close(found[0, 0], torch.tensor(pooled), atol=1e-5, rtol=0)
    assert keep(found, n_past, window=2).tolist() == [[[*best, 6, 7]]]


@quick
@given(
    length=st.integers(1, 9),
    window=st.integers(1, 9),
    group=st.integers(1, 2),
    kernel=st.sampled_from([1, 3, 5]),
    pooling=st.sampled_from(["max", "avg"]),
    seed=st.integers(0, 99),
)
def test_pooled_scores_equal_the_slow_version(length, window, group, kernel, pooling, seed):
    window = min(window, length)
    queries = 2 * normal(1, 2 * group, length, 4, seed=seed)
    keys = normal(1, 2, length, 4, seed=seed + 1)
    found = pooled_scores(queries, keys, window=window, kernel=kernel, pooling=pooling)
    assert found.shape == (1, 2, length - window)
    for head in range(2):
        wanted = oracles.snapkv_scores(
            queries[0, group * head : group * (head + 1)],
            keys[0, head],
            window=window,
            kernel=kernel,
            pooling=pooling,
        )
        torch.testing.assert_close(found[0, head], torch.tensor(wanted), atol=1e-6, rtol=0)


def test_the_layers_own_scale_is_used():
    before = layer(20)
    flat = pooled_scores(
        before.queries, before.keys, window=4, kernel=1, pooling="max", softmax=Softmax(0.0)
    )
    wanted = sum(1 / (17 + row) for row in range(4))  # each row spreads evenly over what it sees
    torch.testing.assert_close(flat, torch.full_like(flat, wanted))


@pytest.mark.parametrize(("n_keep", "window"), [(40, 32), (33, 32), (32, 16), (9, 4), (1, 1)])
def test_the_window_gives_way_to_a_small_budget(n_keep, window):
    assert SnapKV().window_for(n_keep) == window
    kept = SnapKV().compress(layer(60), Allowance(n_keep, n_keep / 60))
    assert kept.positions.shape == (1, 2, n_keep)
    assert positions(kept)[0][-window:] == list(range(60 - window, 60))


def test_compress_takes_the_best_of_each_head():
    before = layer(40, seed=3)
    kept = SnapKV(window=5, kernel=3, pooling="avg").compress(before, Allowance(12, 0.3))
    for head in range(2):
        scores = oracles.snapkv_scores(
            before.queries[0, 2 * head : 2 * head + 2],
            before.keys[0, head],
            window=5,
            kernel=3,
            pooling="avg",
        )
        wanted = [*oracles.best_positions(scores, 7), *range(35, 40)]
        assert positions(kept)[head] == wanted
        assert torch.equal(kept.keys[0, head], before.keys[0, head, wanted])
    assert positions(kept)[0] != positions(kept)[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0 must be a whole number of tokens"),
        ({"kernel": 4}, "kernel=4 must be an odd number"),
        ({"pooling": "mean"}, "unknown pooling 'mean'"),
    ],
)
def test_a_setting_out_of_range_is_refused_and_named(settings, message):
    with pytest.raises(UserError, match=message):
        SnapKV(**settings)
