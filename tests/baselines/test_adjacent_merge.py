"""Adjacent merging: a golden, slow versions, and edges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines import adjacent_merge_ours
from baselines.adjacent_merge_ours import (
    AdjacentMerge,
    every_other,
    key_importance,
    merge_neighbours,
    received,
)
from kvmerge import merging
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from kvmerge.rope import Rope
from tests.kvmerge import oracles
from tests.tiny import layer, normal, quick

ROPE = Rope(torch.tensor([1.0, 0.1]))


def close(found, wanted):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), atol=1e-5, rtol=0)


def turned_layer(length: int, **settings):
    """A random layer of two KV heads whose keys can be turned."""
    return replace(layer(length, head_dim=4, **settings), rope=ROPE)


@dataclass
class Slow:
    """An entry: of each KV head its attention, its importance, and each token's share of its key."""

    mass: list[float]
    importance: list[float]
    shares: list[dict[int, float]]


def slow_pair(one: Slow, other: Slow, totals: list[float]) -> Slow:
    """The two as one."""
    both = Slow([], [], [])
    for head, total in enumerate(totals):
        a, b = one.mass[head] / total, other.mass[head] / total
        h, g = one.importance[head], other.importance[head]
        joint = a * b * (h / (a * (1 - 2 * a)) + g / (b * (1 - 2 * b)))
        first = min(1.0, max(0.0, (h - joint) / (h - joint + g - joint)))
        both.mass.append(one.mass[head] + other.mass[head])
        both.importance.append(first**2 * h + (1 - first) ** 2 * g)
        own = {token: first * share for token, share in one.shares[head].items()}
        given = {token: (1 - first) * share for token, share in other.shares[head].items()}
        both.shares.append(own | given)
    return both


def slow_merge(mass: list, importance: list, n_keep: int, late: float) -> list[Slow]:
    """Pass after pass; arguments `[head][token]`."""
    heads, totals = range(len(mass)), [sum(of_head) for of_head in mass]
    entries = [
        Slow(
            [row[token] for row in mass],
            [row[token] for row in importance],
            [{token: 1.0} for _ in heads],
        )
        for token in range(len(mass[0]))
    ]
    while len(entries) > n_keep:
        n_pairs, costs = len(entries) - 1, []
        for place in range(n_pairs):
            one, other = entries[place : place + 2]
            tokens = len(one.shares[0]) + len(other.shares[0])
            costs.append((sum(one.mass) + sum(other.mass)) * tokens / late ** ((place + 1) / n_pairs))
        wanted = sorted(range(n_pairs), key=lambda place: costs[place])[: len(entries) - n_keep]
        place, after = 0, []
        while place < len(entries):
            if place in wanted:
                after.append(slow_pair(entries[place], entries[place + 1], totals))
                place += 2
            else:
                after.append(entries[place])
                place += 1
        entries = after
    return entries


def test_the_pair_that_is_attended_to_least_is_merged_by_importance():
    """Tokens 1 and 2 have attention .1 each; h is .08 and .16, d 1 and 2, so c = .1 .1 (1 + 2)."""
    mass = torch.tensor([[[0.4, 0.1, 0.1, 0.4]]])
    importance = torch.tensor([[[0.08, 0.08, 0.16, 0.08]]])
    entry, share = merge_neighbours(mass, importance, 3)
    assert entry.tolist() == [[[0, 1, 1, 2]]]
    close(share[0, 0], [1, 0.05 / 0.18, 0.13 / 0.18, 1])


def test_a_run_of_pairs_is_merged_two_by_two():
    chosen = torch.tensor([True, True, True, False, True, True, False])
    assert every_other(chosen).tolist() == [True, False, True, False, True, False, False]


@quick
@given(
    length=st.integers(1, 14),
    share=st.floats(0, 1),
    late=st.sampled_from([1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_merging_neighbours_equals_the_slow_version(length, share, late, seed):
    n_keep = max(1, int(share * length))
    mass = normal(1, 2, length, seed=seed, dtype=torch.float64).exp()
    importance = mass * normal(1, 2, length, seed=seed + 1, dtype=torch.float64).exp()
    entry, shares = merge_neighbours(mass, importance, n_keep, late=late)
    wanted = slow_merge(mass[0].tolist(), importance[0].tolist(), n_keep, late)
    assert len(wanted) == n_keep
    for head in range(2):
        members = [sorted(each.shares[head]) for each in wanted]
        assert entry[0, head].tolist() == [place for place, each in enumerate(members) for _ in each]
        close(
            shares[0, head],
            [each.shares[head][t] for each in wanted for t in sorted(each.shares[head])],
        )


@quick
@given(length=st.integers(1, 40), share=st.floats(0, 1), zeros=st.booleans(), seed=st.integers(0, 99))
def test_exactly_the_allowed_entries_are_left_and_shares_are_a_mean(length, share, zeros, seed):
    """Also where much has no attention at all, and in samples that need other numbers of passes."""
    n_keep = max(1, int(share * length))
    mass = normal(3, 2, length, seed=seed).mul(4).exp()
    mass[1] = 1.0
    if zeros:
        mass = mass * (normal(3, 2, length, seed=seed + 1) > 0)
    importance = key_importance(mass, normal(3, 2, length, 4, seed=seed + 2))
    entry, shares = merge_neighbours(mass, importance, n_keep, late=50.0)
    assert entry[..., 0].eq(0).all()
    assert entry[..., -1].eq(n_keep - 1).all()
    assert torch.isin(entry.diff(dim=-1), torch.tensor([0, 1])).all()
    assert torch.equal(entry[:, 0], entry[:, 1])
    assert bool(((shares >= 0) & (shares <= 1)).all())
    close(merging.sum_over_sets(entry, shares), torch.ones(3, 2, n_keep))
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = merge_neighbours(mass[one], importance[one], n_keep, late=50.0)
        assert torch.equal(alone[0], entry[one])
        close(alone[1], shares[one])


def test_each_pass_does_at_least_half_of_what_is_left(monkeypatch):
    """Also where all pairs cost the same, and so overlap."""
    excess = []
    chosen = adjacent_merge_ours.cheapest
    monkeypatch.setattr(
        adjacent_merge_ours, "cheapest", lambda costs, n: excess.append(int(n)) or chosen(costs, n)
    )
    entry, _ = merge_neighbours(torch.ones(1, 1, 64), torch.ones(1, 1, 64), 4)
    assert int(entry.max()) == 3
    assert excess[0] == 60
    assert all(2 * after <= before for before, after in pairwise([*excess, 0]))


@quick
@given(
    length=st.integers(2, 10),
    count=st.integers(1, 10),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_received_and_importance_equal_the_slow_versions(length, count, group, seed):
    rows = sorted(
        torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    )
    before = turned_layer(length, group=group, seed=seed)
    mass = received(before, torch.tensor(rows))
    importance = key_importance(mass, before.values)
    for head in range(2):
        wanted = [0.0] * length
        for q in range(group):
            attention = oracles.attention_map(before.queries[0, group * head + q], before.keys[0, head])
            for row in rows:
                for token in range(row + 1):
                    wanted[token] += attention[row][token] / group
        close(mass[0, head], wanted)
        values, total = before.values[0, head].tolist(), sum(wanted)
        output = [sum(a / total * v[d] for a, v in zip(wanted, values, strict=True)) for d in range(4)]
        close(
            importance[0, head],
            [
                a / total * (1 - 2 * a / total) * sum(abs(v[d] - output[d]) for d in range(4))
                for a, v in zip(wanted, values, strict=True)
            ],
        )


@pytest.mark.parametrize(
    ("n_keep", "held"), [(900, (32, 256)), (200, (32, 100)), (21, (5, 10)), (3, (1, 1)), (1, (0, 0))]
)
def test_sinks_and_window_give_way_to_a_small_budget(n_keep, held):
    assert AdjacentMerge().held(n_keep) == held


def test_observers_are_spread_over_the_window():
    assert AdjacentMerge(rows=4).observers(100, 10).tolist() == [99, 97, 94, 92]
    assert AdjacentMerge(rows=4).observers(100, 3).tolist() == [99, 98, 97]
    assert AdjacentMerge().observers(100, 0).tolist() == [99]


@pytest.mark.parametrize("n_keep", [1, 2, 9, 20, 39])
def test_an_entry_is_the_mean_of_its_values_at_its_last_token(n_keep):
    before = turned_layer(40, seed=3)
    kept = AdjacentMerge().compress(before, Allowance(n_keep, n_keep / 40))
    assert kept.positions.shape == (1, 2, n_keep)
    assert kept.sizes.sum(dim=-1).tolist() == [[40, 40]]
    close(kept.bias, kept.sizes.float().log())
    plain = ROPE.rotate(before.keys, -torch.arange(40))
    stored = ROPE.rotate(kept.keys, -kept.positions)
    for head in range(2):
        ends = kept.positions[0, head].tolist()
        assert ends[-1] == 39
        for slot, (begin, end) in enumerate(zip([-1, *ends], ends, strict=False)):
            members = slice(begin + 1, end + 1)
            close(kept.values[0, head, slot], before.values[0, head, members].mean(dim=0))
            low, high = plain[0, head, members].aminmax(dim=0)
            assert bool((stored[0, head, slot] > low - 1e-5).all())
            assert bool((stored[0, head, slot] < high + 1e-5).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinks": -1}, "sinks=-1 must be a whole number"),
        ({"window": 0}, "window=0 must be a whole number"),
        ({"rows": 0.5}, "rows=0.5 must be a whole number"),
        ({"late": 0.0}, "late=0.0 must be above 0"),
        ({"late": math.inf}, "late=inf must be above 0"),
    ],
)
def test_a_setting_out_of_range_is_refused_and_named(settings, message):
    with pytest.raises(UserError, match=message):
        AdjacentMerge(**settings)
