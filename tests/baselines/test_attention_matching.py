"""Attention matching: its least-squares problems, and its edges."""

from __future__ import annotations

import pytest
import torch

from baselines.attention_matching import AttentionMatching
from baselines.least_squares import bounded_fit, least_squares, pursuit
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from tests.tiny import layer, normal


def test_factors_stay_within_their_bounds_and_find_what_is_between():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    inside = bounded_fit(matrix, matrix @ torch.tensor([0.5, 2.0]), 2, 0.1, 10.0)
    torch.testing.assert_close(inside, torch.tensor([0.5, 2.0]))
    outside = bounded_fit(matrix, matrix @ torch.tensor([-1.0, 50.0]), 0, 0.1, 10.0)
    assert outside.tolist() == pytest.approx([0.1, 10.0])


def test_pursuit_takes_what_explains_most_and_of_equal_columns_the_lower():
    matrix = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert pursuit(matrix, matrix.sum(dim=1), 2, 1, 1e-12, 1e3).tolist() == [1, 0]
    wanted = normal(6, 3, seed=1) @ normal(3, 2, seed=2)
    found = least_squares(normal(6, 3, seed=1), wanted)
    torch.testing.assert_close(found, normal(3, 2, seed=2), atol=1e-5, rtol=0)


def test_values_and_biases_may_be_left_alone():
    before = layer(20, group=2)
    kept = AttentionMatching(rows=9.0).compress(before, Allowance(19, 0.95))
    assert kept.keys.shape == (1, 2, 19, 8)
    own = AttentionMatching(values="own", bias="none").compress(before, Allowance(7, 0.35))
    assert own.bias is None
    assert torch.equal(
        own.values, before.values.gather(2, own.positions[..., None].expand(-1, -1, -1, 8))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_choice": "best"}, "unknown key_choice 'best'"),
        ({"rows": 0.5}, "rows=0.5 must be 1 or more"),
        ({"at_once": 2}, "at_once=2 has no effect without key_choice=omp"),
        ({"key_choice": "omp", "at_once": 0}, "at_once=0 must be a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_named(settings, message):
    with pytest.raises(UserError, match=message):
        AttentionMatching(**settings)
