"""LOOK-M, KeepKV and ZSMerge: goldens, slow versions, and edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.keepkv import KeepKV, merge_by_weight, recent_strength
from baselines.look_m import LookM, pivot_merge
from baselines.zsmerge import ZSMerge, faded_sums
from kvmerge.errors import UserError
from kvmerge.method import Allowance, PrefillLayer
from kvmerge.softmax import Softmax, plain
from tests.fidelity.vectors import positions
from tests.kvmerge import oracles
from tests.tiny import layer, normal, quick

KEYS = torch.tensor([[[[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]]]])
"""The first and the last are kept; cosines of the others with them: .6 and .8, .8 and .6."""
VALUES = torch.tensor([[[[0.0], [2.0], [4.0], [6.0]]]])
KEPT = torch.tensor([[[0, 3]]])


def close(found, wanted):
    torch.testing.assert_close(found, torch.as_tensor(wanted), atol=1e-5, rtol=0)


def nearest_of(keys: list[list[float]], token: int, kept: list[int]) -> tuple[float, int]:
    """The largest cosine with a kept key, and that key's place among them; of equal ones the first."""
    cosines = [oracles.cosine(keys[token], keys[other]) for other in kept]
    return max(cosines), cosines.index(max(cosines))


# --- LOOK-M


def test_a_pivot_becomes_the_mean_of_itself_and_of_its_averages():
    """Pivot 0 takes token 2, ((1, 0) + (.9, .3)) / 2; pivot 3 takes 1, ((0, 1) + (.3, .9)) / 2."""
    keys, values = pivot_merge(KEYS, VALUES, KEPT)
    close(keys[0, 0], [[0.95, 0.15], [0.15, 0.95]])
    close(values[0, 0], [[1.0], [5.0]])
    both, _ = pivot_merge(KEYS, VALUES, torch.tensor([[[0]]]))
    close(both[0, 0], [[(1 + 0.8 + 0.9 + 0.5) / 4, (0.4 + 0.3 + 0.5) / 4]])


@quick
@given(n=st.integers(2, 10), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_pivot_merge_equals_the_slow_version(n, share, seed):
    keys, values = normal(1, 1, n, 3, seed=seed), normal(1, 1, n, 2, seed=seed + 1)
    kept = sorted(
        torch.randperm(n, generator=torch.Generator().manual_seed(seed))[
            : max(1, int(share * n))
        ].tolist()
    )
    found = pivot_merge(keys, values, torch.tensor([[kept]]))
    for states, merged in zip((keys, values), found, strict=True):
        rows = states[0, 0].tolist()
        members = [[rows[token]] for token in kept]
        for token in set(range(n)) - set(kept):
            _, place = nearest_of(keys[0, 0].tolist(), token, kept)
            pivot = rows[kept[place]]
            members[place].append([(a + b) / 2 for a, b in zip(rows[token], pivot, strict=True)])
        close(
            merged[0, 0],
            [[sum(column) / len(each) for column in zip(*each, strict=True)] for each in members],
        )


def test_look_m_spares_the_first_tokens_and_the_recent_ones():
    for head in positions(LookM().compress(layer(50), Allowance(20, 0.4))):
        assert head[:4] == [0, 1, 2, 3]
        assert head[-10:] == list(range(40, 50))


# --- KeepKV


def test_members_weigh_as_they_are_attended_to_if_they_are_near_enough():
    """Token 2 has cosine .8 with the first, token 1 with the last; weights 1, 3, 1, 1."""
    before = PrefillLayer(KEYS, KEYS, VALUES, None, 0, 1, plain(2))
    weights = torch.tensor([[[1.0, 3.0, 1.0, 1.0]]])
    kept = merge_by_weight(before, KEPT, weights, 0.79)
    close(kept.keys[0, 0], [[0.9, 0.3], [0.45, 0.85]])
    close(kept.values[0, 0], [[2.0], [3.0]])
    assert kept.sizes.tolist() == [[[2, 2]]]
    close(kept.bias[0, 0], [math.log(2), math.log(2)])
    strict = merge_by_weight(before, KEPT, weights, 0.81)
    assert torch.equal(strict.keys, KEYS[:, :, [0, 3]])
    assert strict.sizes.tolist() == [[[1, 1]]]


@quick
@given(
    length=st.integers(1, 12),
    recent=st.integers(1, 12),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_recent_strength_equals_the_slow_version(length, recent, group, seed):
    recent = min(recent, length)
    before = layer(length, group=group, head_dim=4, seed=seed)
    strength, weighted, shift = recent_strength(before, recent, 1.5)
    for head in range(2):
        sums, growing = [0.0] * length, [0.0] * length
        for q in range(group):
            query = before.queries[0, group * head + q].tolist()
            for row in range(length - recent, length):
                place = row - (length - recent)
                growth = 1 + 0.5 * place / (recent - 1) if recent > 1 else 1.0
                for token in range(row + 1):
                    dot = sum(
                        a * b
                        for a, b in zip(query[row], before.keys[0, head, token].tolist(), strict=True)
                    )
                    sums[token] += math.exp(dot / 2) / group
                    growing[token] += growth * math.exp(dot / 2) / group
        scale = math.exp(float(shift[0, head]))
        wanted = [each / min(recent, length - token) for token, each in enumerate(sums)]
        torch.testing.assert_close(
            strength[0, head] * scale, torch.tensor(wanted), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            weighted[0, head] * scale, torch.tensor(growing), rtol=1e-4, atol=1e-5
        )


def test_logits_that_would_overflow_are_no_matter():
    before = layer(40, head_dim=4)
    object.__setattr__(before, "softmax", Softmax(200.0))
    kept = KeepKV(threshold=-1.0).compress(before, Allowance(14, 0.35))
    assert kept.keys.isfinite().all()
    assert kept.values.isfinite().all()
    assert kept.sizes.sum(-1).tolist() == [[40, 40]]


@pytest.mark.parametrize(("n_keep", "recent"), [(14, 7), (2, 1), (1, 1)])
def test_keepkv_keeps_sinks_and_the_recent_tokens(n_keep, recent):
    kept = KeepKV().compress(layer(40), Allowance(n_keep, n_keep / 40))
    for head in positions(kept):
        assert len(head) == n_keep
        assert head[-recent:] == list(range(40 - recent, 40))
        sinks = min(4, n_keep - recent)
        assert head[:sinks] == list(range(sinks))


def test_recent_strength_in_blocks_of_rows_is_the_same(monkeypatch):
    whole = recent_strength(layer(40), 33, 1.5)
    monkeypatch.setattr("kvmerge.scores._BLOCK_ELEMENTS", 1)  # 16 rows a block
    for found, wanted in zip(recent_strength(layer(40), 33, 1.5), whole, strict=True):
        close(found, wanted)


# --- ZSMerge


@quick
@given(
    length=st.integers(1, 10),
    shrink=st.sampled_from([1.0, 0.9, 0.5, 0.02]),
    group=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_faded_sums_equal_the_slow_version(length, shrink, group, seed):
    """With .02 the rows that are left out begin at the fifth from the end."""
    before = layer(length, group=group, head_dim=4, seed=seed)
    found = faded_sums(before.queries, before.keys, shrink)
    for head in range(2):
        wanted = [0.0] * length
        for q in range(group):
            rows = oracles.attention_map(
                before.queries[0, group * head + q], before.keys[0, head], scale=0.5
            )
            for age, row in enumerate(reversed(rows)):
                for token, weight in enumerate(row[: length - age]):
                    wanted[token] += shrink**age * weight
        close(found[0, head], wanted)


def test_what_is_neither_recent_nor_liked_becomes_one_mean():
    before = layer(40, seed=2)
    kept = ZSMerge(scale=0.5).compress(before, Allowance(10, 0.25))
    faded = faded_sums(before.queries, before.keys, 0.98)
    for head in range(2):
        liked = oracles.best_positions(faded[0, head, :36].tolist(), 5)
        others = [token for token in range(36) if token not in liked]
        assert kept.positions[0, head].tolist() == sorted([others[0], *liked, *range(36, 40)])
        [slot] = (kept.sizes[0, head] > 1).nonzero()[0].tolist()
        assert int(kept.sizes[0, head, slot]) == 31
        close(kept.bias[0, head, slot], 0.5 * math.log(31))
        close(kept.keys[0, head, slot], before.keys[0, head, others].mean(dim=0))
        close(kept.values[0, head, slot], before.values[0, head, others].mean(dim=0))
        others_kept = [i for i in range(10) if i != slot]
        tokens = kept.positions[0, head, others_kept]
        assert torch.equal(kept.keys[0, head, others_kept], before.keys[0, head, tokens])


@pytest.mark.parametrize(
    ("n_keep", "settings", "counts"),
    [
        (50, {}, (20, 1)),
        (50, {"dense": 7}, (20, 7)),
        (50, {"dense": 0.5}, (20, 15)),
        (4, {}, (2, 1)),
        (2, {}, (1, 1)),
        (1, {}, (0, 1)),
        (3, {"dense": 9}, (2, 1)),
    ],
)
def test_the_counts_give_way_to_a_small_budget(n_keep, settings, counts):
    assert ZSMerge(**settings).counts(n_keep) == counts
    kept = ZSMerge(**settings).compress(layer(60), Allowance(n_keep, n_keep / 60))
    assert kept.positions.shape == (1, 2, n_keep)
    assert kept.sizes.sum(-1).tolist() == [[60, 60]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KeepKV(threshold=1.5), "threshold=1.5 must be a cosine"),
        (lambda: KeepKV(distance_weight=0.0), "distance_weight=0.0 must be above 0"),
        (lambda: KeepKV(sinks=-1), "sinks=-1 must be a whole number"),
        (lambda: KeepKV(epsilon=-1.0), "epsilon=-1.0 must be 0 or more"),
        (lambda: ZSMerge(tail=1.0), "tail=1.0 must be a fraction of the budget"),
        (lambda: ZSMerge(dense=2.5), "dense=2.5 must be a number of entries, or a fraction"),
        (lambda: ZSMerge(dense=0), "dense=0 must be a number of entries"),
        (lambda: ZSMerge(shrink=0.0), "shrink=0.0 must be above 0"),
        (lambda: ZSMerge(scale=math.inf), "scale=inf must be 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_refused_and_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
