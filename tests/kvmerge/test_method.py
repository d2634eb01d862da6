"""The helpers that every selecting method shares."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmerge.method import keep_all, select, top_positions
from tests.kvmerge import oracles
from tests.tiny import layer, quick


@quick
@given(
    scores=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    count=st.integers(0, 12),
)
def test_top_positions_breaks_ties_to_the_lower_index(scores, count):
    found = top_positions(torch.tensor(scores, dtype=torch.float32), count)
    assert found.tolist() == oracles.best_positions(scores, count)


def test_top_positions_breaks_long_ties():
    """An unstable sort passes on short inputs; `torch.sort` changes algorithm with the length."""
    assert top_positions(torch.zeros(2, 5000), 7).tolist() == [list(range(7))] * 2


def test_select_takes_each_heads_own_tokens():
    before = layer(6)
    positions = torch.tensor([[[0, 5], [2, 3]]])
    kept = select(before, positions)
    assert torch.equal(kept.keys[0, 0], before.keys[0, 0, [0, 5]])
    assert torch.equal(kept.keys[0, 1], before.keys[0, 1, [2, 3]])
    assert torch.equal(kept.values[0, 1], before.values[0, 1, [2, 3]])
    assert kept.sizes is None
    assert kept.bias is None


def test_what_cells_ask_alike_is_answered_once_a_layer():
    before, calls = layer(5), []
    answers = [before.once("rows", lambda: calls.append(1) or torch.ones(1)) for _ in range(2)]
    assert answers[0] is answers[1]
    assert len(calls) == 1
    assert before.once("columns", lambda: 2) == 2
    assert replace(before, layer_idx=1).once("rows", lambda: 3) == 3  # another layer is asked anew


def test_keep_all_is_the_layer_itself():
    before = layer(5)
    kept = keep_all(before)
    assert torch.equal(kept.keys, before.keys)
    assert torch.equal(kept.values, before.values)
    assert kept.positions.tolist() == [[list(range(5))] * 2]
