"""D2O: the goldens of the method notes, a slow version, and what its settings do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.d2o import D2O, layer_shares, merge_evicted, variance_level
from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from kvmerge.session import Policy, Row
from tests.fidelity.vectors import Replay, positions
from tests.kvmerge import oracles
from tests.tiny import layer, normal, quick

DOUBLE = torch.float64

HOLD = Policy("hold")


# --- goldens


def test_layer_shares_are_a_softmax_of_the_levels():
    found = layer_shares(torch.tensor([0.1, 0.3, 0.5]), 0.2)
    wanted = torch.tensor([0.241056, 0.197360, 0.161585], dtype=DOUBLE)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_only_what_reaches_the_mean_similarity_is_merged():
    """Only the second evicted key reaches the mean similarity; the weights are not normalised."""
    keys = torch.tensor([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], dtype=DOUBLE)[None, None]
    values = torch.tensor([1.0, 2, 3, 4], dtype=DOUBLE).view(1, 1, 4, 1)
    merged, merged_values, threshold = merge_evicted(keys, values, torch.tensor([[[1, 3]]]))
    wanted = torch.tensor([[0.688, 0.684], [0, 1]], dtype=DOUBLE)
    torch.testing.assert_close(merged[0, 0], wanted)
    assert merged_values.flatten().tolist() == pytest.approx([(2 + 0.96 * 3) / 2, 4])
    assert float(threshold) == pytest.approx(0.88)


# --- merging


@st.composite
def evictions(draw):
    """Keys, values, kept slots: of two heads that keep different entries."""
    stored = draw(st.integers(2, 9))
    n_kept = draw(st.integers(1, stored - 1))
    seed = draw(st.integers(0, 999))
    order = torch.rand(1, 2, stored, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    keys = normal(1, 2, stored, 3, seed=seed, dtype=DOUBLE)
    values = normal(1, 2, stored, 2, seed=seed + 1, dtype=DOUBLE)
    return keys, values, order[..., :n_kept].sort(-1).values


@quick
@given(evictions(), st.sampled_from([None, -0.5, 0.9]))
def test_merge_equals_the_slow_version(problem, before):
    keys, values, kept = problem
    old = None if before is None else torch.tensor([before], dtype=DOUBLE)
    found_keys, found_values, found = merge_evicted(keys, values, kept, old, alpha=0.25, beta=0.75)
    best = []
    for head in range(2):
        k, slots = keys[0, head].tolist(), kept[0, head].tolist()
        for slot in set(range(len(k))) - set(slots):
            best.append(max(oracles.cosine(k[slot], k[other]) for other in slots))
    mean = sum(best) / len(best)
    threshold = mean if before is None else 0.25 * before + 0.75 * mean
    assert float(found) == pytest.approx(threshold)
    # one rounding may separate an entry from the threshold that it alone sets
    bar = threshold - 1e-12
    for head in range(2):
        wanted = oracles.d2o_merge(keys[0, head], values[0, head], kept[0, head].tolist(), bar)
        for merged, slow in zip((found_keys, found_values), wanted, strict=True):
            torch.testing.assert_close(merged[0, head], torch.tensor(slow, dtype=DOUBLE))


def test_by_position_all_heads_merge_the_same_places():
    """The second evicted entry is near its kept key in one head only: the mean decides for both."""
    near, far = [0.8, 0.6], [0.0, 1.0]
    keys = torch.tensor([[[1, 0], far, near], [[1, 0], near, near]], dtype=DOUBLE)[None]
    values = torch.zeros(1, 2, 3, 1, dtype=DOUBLE)
    kept = torch.zeros(1, 2, 1, dtype=torch.int64)
    own = merge_evicted(keys, values, kept)[0]
    shared = merge_evicted(keys, values, kept, by_position=True)[0]
    # similarities [0, .8] and [.8, .8], mean .6; by place: .4 and .8
    one = torch.tensor([(1 + 0.64) / 2, 0.24], dtype=DOUBLE)
    both = torch.tensor([(1 + 0.64 + 0.64) / 3, 0.32], dtype=DOUBLE)
    torch.testing.assert_close(own[0, :, 0], torch.stack([one, both]))
    torch.testing.assert_close(shared[0, :, 0], torch.stack([one, one]))


def test_a_zero_key_is_near_nothing():
    keys = torch.tensor([[1.0, 0], [0, 0], [0.9, 0.1]])[None, None]
    merged, _, threshold = merge_evicted(keys, keys, torch.tensor([[[0]]]))
    assert float(threshold) == pytest.approx(0.9 / 0.82**0.5 / 2)
    assert merged.isfinite().all()


def test_long_prompts_are_compared_in_blocks():
    keys = normal(1, 1, 1500, 4, dtype=DOUBLE)
    kept = torch.arange(0, 1500, 3)[None, None]
    merged, _, _ = merge_evicted(keys, keys, kept)
    evicted = [slot for slot in range(1500) if slot % 3]
    unit = keys[0, 0] / keys[0, 0].norm(dim=-1, keepdim=True)
    best = (unit[evicted] @ unit[::3].T).max(-1)
    merges = best.values >= best.values.mean()
    for place in (0, 7, 499):
        given = [
            best.values[i] * keys[0, 0, evicted[i]]
            for i in torch.nonzero(merges & (best.indices == place)).flatten().tolist()
        ]
        wanted = torch.stack([keys[0, 0, 3 * place], *given]).mean(0)
        torch.testing.assert_close(merged[0, 0, place], wanted)


def test_half_precision_is_merged_in_float32():
    keys, values = normal(1, 2, 60, 8).half(), normal(1, 2, 60, 8, seed=1).half()
    kept = torch.arange(0, 60, 2).expand(1, 2, -1)
    merged = merge_evicted(keys, values, kept)
    exact = merge_evicted(keys.double(), values.double(), kept)
    for found, wanted in zip(merged[:2], exact[:2], strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), wanted, atol=1e-3, rtol=1e-3)


# --- allocation


def test_variance_level_by_hand():
    """Variances 0, 1 and 4 scale to 0, 1/4 and 1."""
    sums = torch.tensor([[[1.0, 1, 1], [0, 1, 2], [0, 2, 4]]], dtype=DOUBLE)
    assert float(variance_level(sums)) == pytest.approx(1.25 / 3, abs=1e-6)


def test_heads_alike_are_at_level_zero():
    assert float(variance_level(torch.ones(1, 3, 5))) == 0


def test_shares_stay_within_the_prompt_and_above_a_hundredth():
    found = layer_shares(torch.tensor([0.0, 9.0, 0.1]), 0.9)
    assert found.tolist() == pytest.approx([1.0, 0.01, 1.0])


def variance_row(**settings):
    return Row(D2O(alloc="variance", **settings), Budget(0.4))


def states(layers, length=46):
    """Layers of grouped queries: one sharp head in the first layer, one more in each."""
    out = []
    for index in range(layers):
        sharp = torch.where(torch.arange(4) <= index % 3, 3.0, 0.3)
        queries = sharp.view(1, 4, 1, 1) * normal(1, 4, length, 8, seed=3 * index)
        out.append((queries, *(normal(1, 2, length, 8, seed=3 * index + i) for i in (1, 2))))
    return out


def test_variance_gives_layers_different_budgets_which_hold_keeps():
    replay = Replay(variance_row(), states(3), 40, policy=HOLD)
    after_prefill = [replay.entries(index).keys.shape[2] for index in range(3)]
    assert len(set(after_prefill)) == 3
    assert sum(after_prefill) == pytest.approx(3 * 16, abs=3)
    for _ in range(6):
        replay.step()
    assert [replay.entries(index).keys.shape[2] for index in range(3)] == after_prefill


def test_a_budget_of_everything_is_not_allocated():
    replay = Replay(Row(D2O(alloc="variance"), Budget(1.0)), states(3), 40, policy=HOLD)
    assert [replay.entries(index).keys.shape[2] for index in range(3)] == [40] * 3


def test_bug_compat_waits_for_the_first_step_and_spares_three_layers():
    replay = Replay(Row(D2O(bug_compat=True), Budget(0.4)), states(5), 40)
    assert [replay.entries(index).keys.shape[2] for index in range(5)] == [40] * 5
    for step in range(1, 4):
        replay.step()
        lengths = [replay.entries(index).keys.shape[2] for index in range(5)]
        assert lengths == [40 + step, 40 + step, 16, 16, 40 + step]


# --- the method


def test_compress_keeps_sinks_heavy_hitters_and_recent_tokens():
    scores = torch.arange(40.0).expand(1, 2, 40)  # the first tokens have least
    kept = D2O().compress(layer(40, scores=scores), Allowance(20, 0.5))
    assert positions(kept) == [[0, 1, 2, 3, *range(24, 40)]] * 2
    assert torch.equal(kept.scores, scores[..., kept.positions[0, 0]])  # the sinks keep their own


def test_compress_merges_what_it_evicts():
    before = layer(40, seed=5)
    kept = D2O().compress(before, Allowance(14, 0.35))
    changed = (kept.keys != before.keys.gather(2, kept.positions[..., None].expand_as(kept.keys))).any(
        -1
    )
    assert changed.any()
    for head in range(2):
        wanted = oracles.d2o_merge(
            before.keys[0, head].double(),
            before.values[0, head].double(),
            positions(kept)[head],
            float(kept.state),
        )
        torch.testing.assert_close(
            kept.keys[0, head].double(), torch.tensor(wanted[0], dtype=DOUBLE), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            kept.values[0, head].double(), torch.tensor(wanted[1], dtype=DOUBLE), atol=1e-5, rtol=0
        )


def test_the_threshold_moves_with_every_step():
    replay = Replay(Row(D2O(), Budget(0.4)), states(1), 40, policy=HOLD)
    seen = [float(replay.entries().state)]
    for _ in range(3):
        replay.step()
        seen.append(float(replay.entries().state))
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alloc": "variances"}, "unknown alloc 'variances'.* Did you mean 'variance'"),
    ],
)
def test_an_unknown_allocation_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        D2O(**settings)
