"""Random eviction, the control, and the full cache."""

import pytest
import torch

from baselines.full import Full
from baselines.random import Random
from kvmerge.budget import Budget
from kvmerge.method import Allowance
from tests.tiny import generator, layer


def compress(budget, length, seed=0, method=None, kv_heads=2):
    budget = Budget.parse(budget)
    before = layer(length, head_dim=2, kv_heads=kv_heads, scores=torch.zeros(1, kv_heads, length))
    kept = (method or Random()).compress(
        before, Allowance(budget.entries(length), budget.fraction(length), generator(seed))
    )
    return before, kept


@pytest.mark.parametrize(
    ("budget", "length", "recent"),
    [(0.5, 100, 17), (0.35, 100, 8), (0.1, 100, 2), (0.5, 4, 1), (0.1, 10, 1), (35, 100, 8)],
)
def test_equals_the_slow_version(budget, length, recent):
    """The recent tokens, and of the others those with the highest draws."""
    _, kept = compress(budget, length, seed=7)
    draw = torch.rand(1, 2, length, generator=generator(7))
    n_keep = Budget.parse(budget).entries(length)
    for head in range(2):
        ranked = sorted(range(length - recent), key=lambda i: -draw[0, head, i])
        wanted = sorted(ranked[: n_keep - recent]) + list(range(length - recent, length))
        assert kept.positions[0, head].tolist() == wanted


def test_keeps_whole_tokens_and_draws_for_each_head():
    before, kept = compress(0.35, 60)
    for head in range(2):
        index = kept.positions[0, head]
        assert torch.equal(kept.keys[0, head], before.keys[0, head, index])
        assert torch.equal(kept.values[0, head], before.values[0, head, index])
    assert not torch.equal(kept.positions[0, 0], kept.positions[0, 1])


def test_the_draw_is_uniform():
    """4,000 heads keep 10 of the 19 tokens that are not recent: each about equally often."""
    _, kept = compress(11, 20, method=Random(recent=0.0), kv_heads=4000)
    often = torch.bincount(kept.positions.flatten(), minlength=20) / 4000
    assert often[19] == 1
    assert (often[:19] - 10 / 19).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_recent_never_exceeds_the_budget():
    _, kept = compress(3, 20, method=Random(recent=0.9))
    assert kept.positions.tolist() == [[[17, 18, 19]] * 2]


def test_full_keeps_everything_whatever_the_budget():
    before, kept = compress(0.35, 20, method=Full())
    assert torch.equal(kept.keys, before.keys)
    assert torch.equal(kept.values, before.values)
    assert kept.positions.tolist() == [[list(range(20))] * 2]
