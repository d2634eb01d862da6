"""The options that the H2O methods share, against plain maps, and H2O's decoding golden."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.h2o import H2O, keep
from baselines.heavy_hitters import HeavyHitters
from kvmerge.cache import append_entry
from kvmerge.check.naive import map_column_sums
from kvmerge.errors import UserError
from kvmerge.method import Allowance, DecodeStep, keep_all, select
from kvmerge.scores import column_sums, head_column_sums
from tests.tiny import layer, normal


def attention(layer_) -> Tensor:
    """The whole map `(1, heads, T, T)`."""
    group = layer_.queries.shape[1] // layer_.keys.shape[1]
    keys = layer_.keys.repeat_interleave(group, dim=1)
    logits = layer_.queries @ keys.transpose(2, 3) * layer_.softmax.scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(dim=-1)


# --- goldens


def test_a_new_token_pushes_the_lightest_out() -> None:
    """Tokens 0, 3, 4 with scores 2.6, .3, .3; the new one pushes token 3 out."""
    small = layer(5, kv_heads=1, group=1)
    before = replace(small, scores=torch.tensor([[[2.6, 0.7, 1.1, 0.3, 0.3]]]))
    allowance = Allowance(3, 0.6)
    entries = H2O(heavy=1, recent=2).compress(before, allowance)
    assert entries.positions.tolist() == [[[0, 3, 4]]]
    assert entries.scores[0, 0].tolist() == pytest.approx([2.6, 0.3, 0.3])
    stored = append_entry(entries, before.keys[:, :, :1], before.values[:, :, :1], 5)
    step = DecodeStep(torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), 5, 0, 0, allowance)
    held = H2O(heavy=1, recent=2).hold(stored, step)
    assert held.positions.tolist() == [[[0, 4, 5]]]
    assert held.scores[0, 0].tolist() == pytest.approx([2.7, 0.6, 0.4])


# --- counts


@pytest.mark.parametrize(
    ("settings", "heavy", "recent"),
    [
        ({}, 10, 10),
        ({"recent": 8}, 12, 8),
        ({"heavy": 3}, 3, 17),
        ({"heavy": 0}, 0, 20),
        ({"recent": 20}, 0, 20),
        ({"heavy": 15, "recent": 5}, 15, 5),
    ],
)
def test_a_fixed_count_leaves_the_rest_of_the_budget_to_the_other(
    settings: dict[str, int], heavy: int, recent: int
) -> None:
    assert H2O(**settings).counts(Allowance(20, 0.5), 40) == (heavy, recent)


def test_fixed_counts_that_hold_the_whole_prompt() -> None:
    """With a budget of 64 entries the cache of a short prompt may still grow to the fixed counts."""
    everything = Allowance(40, 1.0)
    assert H2O(heavy=32, recent=32).counts(everything, 40) == (32, 32)
    assert H2O(recent=64).counts(everything, 40) == (0, 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heavy": 5, "recent": 5}, "make 10 entries, but the budget is 20 of 40"),
        ({"recent": 21}, "recent=21 is more than the budget of 20 of 40"),
        ({"heavy": 21}, "heavy=21 is more than the budget of 20 of 40"),
    ],
)
def test_fixed_counts_that_do_not_fit_the_budget_are_refused(
    settings: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        H2O(**settings).compress(layer(40), Allowance(20, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_dtype": "half"}, "unknown score_dtype 'half'"),
        ({"recent": -1}, "recent=-1 is negative"),
    ],
)
def test_a_setting_out_of_range_is_refused_and_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        H2O(**settings)


# --- scores


@pytest.mark.parametrize("length", [1, 15, 40, 300])
def test_head_column_sums_equal_the_map(length: int) -> None:
    some = layer(length)
    found = head_column_sums(some.queries, some.keys)
    torch.testing.assert_close(found, attention(some).sum(dim=2), atol=1e-5, rtol=0)
    summed = found.unflatten(1, (2, 2)).sum(dim=2)
    torch.testing.assert_close(summed, column_sums(some.queries, some.keys), atol=1e-4, rtol=0)
    plain = map_column_sums(some.queries, some.keys, some.softmax.scale)
    torch.testing.assert_close(summed, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_the_models_dtype(dtype: torch.dtype) -> None:
    exact = layer(40)
    half = replace(exact, queries=exact.queries.to(dtype), keys=exact.keys.to(dtype))
    weights = attention(replace(half, queries=half.queries.float(), keys=half.keys.float()))
    by_head = weights.to(dtype).float().sum(dim=2).to(dtype).float()
    wanted = by_head.unflatten(1, (2, 2)).sum(dim=2).to(dtype).float()
    found = H2O(score_dtype="model").prompt_scores(half)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, atol=0, rtol=step)  # one step where a sum is on the edge
    assert torch.equal(found, found.to(dtype).float())


def test_each_heads_weight_is_rounded_before_the_group_is_summed() -> None:
    some = layer(40, group=3)
    half = replace(some, keys=some.keys.half(), values=some.values.half())
    entries = replace(keep_all(half), scores=torch.zeros(1, 2, 40))
    weights = normal(1, 6, 40).softmax(dim=-1)
    step = DecodeStep(weights, 40, 0, 0, Allowance(40, 1.0))
    found = H2O(score_dtype="model").updated_scores(entries, step)
    grouped = weights.unflatten(1, (2, 3))
    assert torch.equal(found, grouped.half().float().sum(dim=2).half().float())
    assert not torch.equal(found, grouped.sum(dim=2).half().float())


def test_the_default_is_the_plain_selection() -> None:
    some = layer(40, seed=8)
    found = H2O().compress(some, Allowance(20, 0.5))
    wanted = select(some, keep(some.scores, heavy=10, recent=10))
    assert torch.equal(found.positions, wanted.positions)
    assert torch.equal(found.keys, wanted.keys)
    assert isinstance(H2O(), HeavyHitters)
    assert torch.equal(keep_all(some).scores, some.scores)
