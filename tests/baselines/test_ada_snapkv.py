"""Ada-SnapKV: how heads divide a budget, a slow version, and its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.ada_snapkv import AdaSnapKV, head_counts
from baselines.snapkv import SnapKV
from kvmerge.errors import UserError
from kvmerge.method import Allowance, ragged
from tests.fidelity.vectors import positions
from tests.tiny import layer, normal, quick

SCORES = torch.tensor([[[0.9, 0.1, 0.8, 0.7], [0.3, 0.2, 0.6, 0.1]]])


@pytest.mark.parametrize(
    ("floor", "counts"),
    [(0.0, [3, 1]), (0.5, [3, 1]), (0.2, [3, 1]), (1.0, [2, 2])],
)
def test_heads_get_what_their_best_tokens_win(floor, counts):
    """The four best are .9, .8, .7 of the first head and .6 of the second; of a half: 2.5 and 1.5."""
    assert head_counts(SCORES, 2, floor=floor, exact=True).tolist() == [counts]


def test_the_authors_round_each_count_by_itself():
    """2.5 and 1.5 become 2 and 2: halves go to the even number."""
    assert head_counts(SCORES, 2, floor=0.5, exact=False).tolist() == [[2, 2]]
    assert head_counts(SCORES, 2, floor=0.2, exact=False).tolist() == [[2, 1]]  # 2.4 + 0, .8 + 0


@quick
@given(
    heads=st.integers(1, 4),
    n=st.integers(1, 9),
    share=st.floats(0, 1),
    floor=st.sampled_from([0.0, 0.2, 0.5, 0.77, 1.0]),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 99),
)
def test_counts_equal_the_slow_version(heads, n, share, floor, levels, seed):
    """Ties among them where there are but two levels."""
    scores = (normal(1, heads, n, seed=seed).sigmoid() * levels).round() / levels
    mean = int(share * n)
    found = head_counts(scores, mean, floor=floor, exact=True)[0].tolist()
    best_first = [sorted(scores[0, head].tolist(), reverse=True) for head in range(heads)]
    places = [(-best_first[head][rank], rank, head) for head in range(heads) for rank in range(n)]
    won = [sum(head == other for *_, other in sorted(places)[: heads * mean]) for head in range(heads)]
    shares = [(1 - floor) * each + floor * mean for each in won]
    wanted = [int(each + 1e-9) for each in shares]
    order = sorted(range(heads), key=lambda head: (-round(shares[head] - wanted[head], 9), head))
    for head in order[: heads * mean - sum(wanted)]:
        wanted[head] += 1
    assert found == wanted
    assert sum(found) == heads * mean
    assert max(found) <= n


def test_shorter_heads_are_padded_and_padding_is_hidden():
    before = layer(6)
    tokens = torch.tensor([[[4, 1, 0], [5, 2, 3]]])
    kept = ragged(before, tokens, torch.tensor([[1, 3]]))
    assert positions(kept) == [[0, 1, 4], [2, 3, 5]]
    assert kept.sizes.tolist() == [[[0, 0, 1], [1, 1, 1]]]
    assert kept.bias.tolist() == [[[-torch.inf, -torch.inf, 0], [0, 0, 0]]]
    assert kept.is_ragged
    even = ragged(before, tokens, torch.tensor([[3, 3]]))
    assert even.sizes is None
    assert even.bias is None


def test_a_floor_of_1_is_snapkv():
    before = layer(60, seed=4)
    kept = AdaSnapKV(floor=1.0, window=9).compress(before, Allowance(21, 0.35))
    assert positions(kept) == positions(SnapKV(window=9).compress(before, Allowance(21, 0.35)))


@pytest.mark.parametrize(("n_keep", "window"), [(40, 32), (32, 16), (2, 1), (1, 1)])
def test_every_head_keeps_the_window_whatever_it_wins(n_keep, window):
    kept = AdaSnapKV().compress(layer(60), Allowance(n_keep, n_keep / 60))
    for head in range(2):
        real = kept.positions[0, head]
        real = real if kept.sizes is None else real[kept.sizes[0, head] > 0]
        assert real.tolist()[-window:] == list(range(60 - window, 60))


def test_a_floor_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"floor=1.5 must be between 0 and 1"):
        AdaSnapKV(floor=1.5)
