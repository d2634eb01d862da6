"""H2O: the goldens of the method notes, a slow version, and its limiting cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.h2o import H2O, keep
from kvmerge.budget import Budget
from kvmerge.method import Allowance
from tests.kvmerge import oracles
from tests.tiny import layer, quick

# The attention map of the goldens, and its column sums.
MAP = torch.tensor(
    [
        [1, 0, 0, 0, 0],
        [0.6, 0.4, 0, 0, 0],
        [0.5, 0.1, 0.4, 0, 0],
        [0.3, 0.1, 0.4, 0.2, 0],
        [0.2, 0.1, 0.3, 0.1, 0.3],
    ],
    dtype=torch.float64,
)


def test_the_heaviest_before_the_recent_tokens_stays():
    scores = MAP.sum(0)
    torch.testing.assert_close(
        scores, torch.tensor([2.6, 0.7, 1.1, 0.3, 0.3], dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert keep(scores[None, None], heavy=1, recent=2).tolist() == [[[0, 3, 4]]]


def test_the_heads_of_a_group_vote_with_their_sum():
    """The heads of a group vote with their sum: neither head alone decides."""
    one, other = torch.tensor([0.9, 0.5, 0.6]), torch.tensor([0.1, 1.0, 0.2])
    both = (one + other)[None, None]
    torch.testing.assert_close(both[0, 0], torch.tensor([1.0, 1.5, 0.8]))
    assert keep(both, heavy=1, recent=0).tolist() == [[[1]]]


@quick
@given(
    scores=st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=3),
    heavy=st.integers(0, 9),
    recent=st.integers(0, 9),
)
def test_keep_equals_the_slow_version(scores, heavy, recent):
    scores = torch.tensor(scores, dtype=torch.float32)[None]
    found = keep(scores, heavy=heavy, recent=recent)
    assert found.dtype == torch.int64
    assert found.shape == (1, scores.shape[1], min(7, heavy + recent))
    for head in range(scores.shape[1]):
        assert found[0, head].tolist() == oracles.h2o_keep(scores[0, head], heavy=heavy, recent=recent)


def test_without_heavy_hitters_it_is_a_sliding_window():
    scores = layer(30).scores
    assert keep(scores, heavy=0, recent=8).tolist() == [[list(range(22, 30))] * 2]


def test_without_recent_tokens_it_is_pure_top_k():
    scores = layer(30).scores
    found = keep(scores, heavy=8, recent=0)
    for head in range(2):
        assert set(found[0, head].tolist()) == set(scores[0, head].topk(8).indices.tolist())


@pytest.mark.parametrize(
    ("budget", "length", "heavy", "recent"),
    [
        (0.5, 3500, 875, 875),
        (0.35, 3500, 613, 612),
        (0.35, 20, 4, 3),
        (0.5, 2, 1, 0),
        (11, 20, 6, 5),
    ],
)
def test_half_of_the_budget_is_recent_and_the_rest_heavy(budget, length, heavy, recent):
    """All the heavy hitters are at the front here, so the gap tells the two shares apart."""
    scores = torch.arange(length, 0, -1).float().expand(1, 2, length)
    before = layer(length, head_dim=2, scores=scores)
    budget = Budget.parse(budget)
    kept = H2O().compress(before, Allowance(budget.entries(length), budget.fraction(length)))
    assert kept.positions[0, 0].tolist() == [*range(heavy), *range(length - recent, length)]
    assert torch.equal(kept.positions[0, 0], kept.positions[0, 1])


def test_compress_keeps_whole_tokens():
    before = layer(40, seed=8)
    kept = H2O().compress(before, Allowance(20, 0.5))
    for head in range(2):
        wanted = oracles.h2o_keep(before.scores[0, head], heavy=10, recent=10)
        assert kept.positions[0, head].tolist() == wanted
        assert torch.equal(kept.keys[0, head], before.keys[0, head, wanted])
        assert torch.equal(kept.values[0, head], before.values[0, head, wanted])
    assert kept.sizes is None
    assert kept.bias is None
