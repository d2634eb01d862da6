"""The controls of KVMerger: equal weights, equal chunks, pivots only, and a draw of everything."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.meanpool_chunks import MeanpoolChunks, chunk_sets
from baselines.pivot_only import PivotOnly
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance
from kvmerge.resolve import load_method
from tests.fidelity.vectors import positions
from tests.kvmerge import oracles
from tests.tiny import generator, layer, quick

ALLOWANCE = Allowance(35, 0.35)


# --- meanpool_sets


def test_meanpool_sets_are_kvmergers_sets_with_plain_means():
    before = layer(100)
    merged, pooled = (
        load_method(name).compress(before, ALLOWANCE) for name in ("kvmerger", "meanpool_sets")
    )
    assert torch.equal(pooled.positions, merged.positions)
    assert torch.equal(pooled.sizes, merged.sizes)
    ends = pooled.sizes[0, 0].cumsum(0).tolist()
    assert max(pooled.sizes.flatten()) > 2
    for place, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        mean = before.keys[0, 0, begin:end].mean(0)
        torch.testing.assert_close(pooled.keys[0, 0, place], mean)


# --- meanpool_chunks


def test_chunks_are_of_equal_length_the_larger_ones_first():
    ids = chunk_sets(torch.zeros(1, 1, 7, dtype=torch.bool), 3)
    assert ids.tolist() == [[[0, 0, 0, 1, 1, 2, 2]]]


def test_chunks_may_span_protected_tokens():
    protected = torch.tensor([[[False, False, True, False, False, True]]])
    assert chunk_sets(protected, 4).tolist() == [[[0, 0, 1, 2, 2, 3]]]
    assert chunk_sets(protected, 3).tolist() == [[[0, 0, 1, 0, 0, 2]]]


@quick
@given(st.integers(2, 14), st.integers(0, 99), st.data())
def test_chunks_equal_the_slow_version(length, seed, data):
    n_protected = data.draw(st.integers(0, length - 1))
    n_keep = data.draw(st.integers(n_protected + 1, length))
    order = torch.rand(1, 3, length, generator=generator(seed)).argsort(-1)
    protected = order < n_protected
    found = chunk_sets(protected, n_keep)
    for head in range(3):
        wanted = oracles.chunk_sets(protected[0, head].tolist(), n_keep)
        assert found[0, head].tolist() == wanted


def test_meanpool_chunks_averages_its_chunks():
    before = layer(100)
    kept = MeanpoolChunks().compress(before, ALLOWANCE)
    assert kept.keys.shape[2] == 35
    n_recent, n_top = KVMerger().protected_counts(ALLOWANCE, 100)
    free = 100 - n_recent - n_top
    wanted = [1] * (n_recent + n_top) + [free // (35 - n_recent - n_top)] * (35 - n_recent - n_top)
    wanted = sorted(wanted)
    for extra in range(100 - sum(wanted)):
        wanted[-1 - extra] += 1
    for head in range(2):
        assert sorted(kept.sizes[0, head].tolist()) == wanted
        assert positions(kept)[head] == sorted(set(positions(kept)[head]))
        protected = KVMerger().protected(before.scores, 100, ALLOWANCE)[0, head]
        ids = torch.tensor(oracles.chunk_sets(protected.tolist(), 35))
        for set_id in range(35):
            members = before.values[0, head, ids == set_id]
            torch.testing.assert_close(kept.values[0, head, set_id], members.mean(0))


def test_meanpool_chunks_takes_kvmergers_value_scale_and_bias():
    before = layer(100)
    plain = MeanpoolChunks().compress(before, ALLOWANCE)
    sized = MeanpoolChunks(value_scale="size").compress(before, ALLOWANCE)
    torch.testing.assert_close(sized.values, plain.values * plain.sizes[..., None])
    biased = MeanpoolChunks(attn_bias="log_size").compress(before, ALLOWANCE)
    torch.testing.assert_close(biased.bias, plain.sizes.float().log())
    assert plain.bias is None


# --- pivot_only


def test_pivot_only_keeps_kvmergers_pivots_as_they_are():
    before = layer(100)
    kept = PivotOnly().compress(before, ALLOWANCE)
    merged = KVMerger().compress(before, ALLOWANCE)
    assert torch.equal(kept.positions, merged.positions)
    for head in range(2):
        index = kept.positions[0, head]
        assert torch.equal(kept.keys[0, head], before.keys[0, head, index])
        assert torch.equal(kept.values[0, head], before.values[0, head, index])
    assert kept.sizes is None
    assert not torch.equal(kept.keys, merged.keys)


@pytest.mark.parametrize("control", [MeanpoolChunks, PivotOnly])
def test_controls_take_kvmergers_protected_shares(control):
    kept = control(recent=0.2, top=0.0).compress(layer(100), ALLOWANCE)
    assert all(head[-20:] == list(range(80, 100)) for head in positions(kept))
    with pytest.raises(UserError, match=r"recent=1\.5 must be a fraction"):
        control(recent=1.5)


# --- random_all


def test_random_all_draws_from_everything_but_keeps_the_last():
    before = layer(100)
    kept = load_method("random_all").compress(before, Allowance(35, 0.35, generator(0)))
    assert all(head[-1] == 99 for head in positions(kept))
    recent = load_method("random").compress(before, Allowance(35, 0.35, generator(0)))
    assert all(head[-8:] == list(range(92, 100)) for head in positions(recent))
    assert any(head[-8:] != list(range(92, 100)) for head in positions(kept))
