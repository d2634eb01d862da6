"""TOVA: the golden of the method notes, a slow version, and holding."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.tova import TOVA, keep
from kvmerge.method import Allowance, DecodeStep, keep_all
from tests.fidelity.vectors import positions
from tests.kvmerge import oracles
from tests.tiny import layer, quick


def test_the_mean_of_the_heads_decides():
    """The mean of two heads decides, not either of them."""
    weights = torch.tensor([[[0.5, 0.1, 0.2, 0.2], [0.1, 0.4, 0.1, 0.4]]])
    torch.testing.assert_close(weights.mean(1)[0], torch.tensor([0.3, 0.25, 0.15, 0.3]))
    assert keep(weights, 2).tolist() == [[0, 3]]


@quick
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(1, 8),
)
def test_keep_equals_the_slow_version(heads, n_keep):
    found = keep(torch.tensor([heads], dtype=torch.float64), n_keep)
    wanted = oracles.best_positions([sum(column) for column in zip(*heads, strict=True)], n_keep)
    assert found.tolist() == [wanted]


def test_compress_reads_the_last_row_of_every_query_head():
    before = layer(30)
    rows = [
        oracles.attention_map(before.queries[0, head], before.keys[0, head // 2])[-1]
        for head in range(4)
    ]
    wanted = oracles.best_positions([sum(column) for column in zip(*rows, strict=True)], 9)
    kept = TOVA().compress(before, Allowance(9, 0.3))
    assert positions(kept) == [wanted] * 2
    assert torch.equal(kept.values, before.values[:, :, wanted])


def test_hold_may_drop_the_newest():
    entries = keep_all(layer(4))
    weights = torch.tensor([[[0.4, 0.1, 0.3, 0.2]] * 4])
    for n_keep, wanted in ((3, [0, 2, 3]), (2, [0, 2]), (4, [0, 1, 2, 3])):
        held = TOVA().hold(entries, DecodeStep(weights, 3, 0, 0, Allowance(n_keep, 0.5)))
        assert positions(held) == [wanted] * 2
