"""Methods that score tokens and keep the best: goldens, slow versions, and edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.chunkkv import ChunkKV, keep_chunks
from baselines.expected_attention import ExpectedAttention, expected_weights, query_statistics
from baselines.key_norm import KeyNorm
from baselines.keydiff import KeyDiff, distinctness
from baselines.lagkv import LagKV, unevenness
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from kvmerge.rope import Rope
from kvmerge.softmax import Softmax
from tests.fidelity.vectors import positions
from tests.kvmerge import oracles
from tests.tiny import layer, normal, quick

ROPE = Rope(0.3 ** torch.arange(2))


def test_the_shortest_keys_stay():
    keys = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [6.0, 8.0], [-1.0, 0.0]])
    before = layer(5, kv_heads=1, head_dim=2)
    object.__setattr__(before, "keys", keys[None, None])
    assert KeyNorm().token_scores(before)[0, 0].tolist() == [-5, -1, -2, -10, -1]
    kept = KeyNorm().compress(before, Allowance(2, 0.4))
    assert positions(kept) == [[1, 4]]
    assert positions(KeyNorm().compress(before, Allowance(1, 0.2))) == [[1]]  # a tie: the lower


def test_the_keys_that_differ_most_from_the_mean_direction_stay():
    """Unit keys (1,0), (1,0), (0,1), and (3,4)/5: their mean is (.65, .45), of length .790569."""
    keys = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [3.0, 4.0]])[None, None]
    wanted = [-0.822192, -0.822192, -0.569210, -0.948683]
    torch.testing.assert_close(distinctness(keys)[0, 0], torch.tensor(wanted), atol=1e-5, rtol=0)
    before = layer(4, kv_heads=1, head_dim=2)
    object.__setattr__(before, "keys", keys)
    assert positions(KeyDiff().compress(before, Allowance(2, 0.5))) == [[0, 2]]


@quick
@given(length=st.integers(1, 12), seed=st.integers(0, 99))
def test_distinctness_equals_the_slow_version(length, seed):
    keys = normal(1, 2, length, 4, seed=seed)
    found = distinctness(keys)
    for head in range(2):
        units = [[x / math.hypot(*key) for x in key] for key in keys[0, head].tolist()]
        anchor = [sum(column) / length for column in zip(*units, strict=True)]
        wanted = [-oracles.cosine(key, anchor) for key in keys[0, head].tolist()]
        torch.testing.assert_close(found[0, head], torch.tensor(wanted), atol=1e-5, rtol=0)


# --- LagKV


def slow_unevenness(states: list[list[float]], lag: int) -> list[list[float]]:
    parts = [states[i : i + lag] for i in range(0, len(states), lag)]
    found = []
    for own, following in itertools.pairwise(parts):
        deviations = []
        for token in own:
            scaled = []
            for channel, x in enumerate(token):
                column = [other[channel] for other in following]
                spread = max(column) - min(column)
                scaled.append((x - min(column)) / spread if spread else 0.0)
            mean = sum(scaled) / len(scaled)
            deviations.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1)))
        total = sum(map(math.exp, deviations))
        found.append([math.exp(each) / total for each in deviations])
    return found


def test_a_token_is_scaled_by_the_range_of_the_next_partition():
    """Range of the second partition: 0 to 2 and 0 to 4. Scaled: (.5, 1) and (0, .25)."""
    states = torch.tensor([[1.0, 4.0], [0.0, 1.0], [0.0, 4.0], [2.0, 0.0]])[None, None]
    deviations = [0.353553, 0.176777]
    total = sum(map(math.exp, deviations))
    wanted = torch.tensor([[math.exp(each) / total for each in deviations]])
    torch.testing.assert_close(unevenness(states, 2)[0, 0], wanted, atol=1e-5, rtol=0)


@quick
@given(partitions=st.integers(2, 4), lag=st.integers(2, 5), flat=st.booleans(), seed=st.integers(0, 99))
def test_unevenness_equals_the_slow_version(partitions, lag, flat, seed):
    states = normal(1, 1, partitions * lag, 3, seed=seed)
    if flat:
        states[..., 1] = 2.0  # a channel without spread
    found = unevenness(states, lag)
    wanted = slow_unevenness(states[0, 0].tolist(), lag)
    torch.testing.assert_close(found[0, 0], torch.tensor(wanted), atol=1e-5, rtol=0)


def test_every_partition_keeps_the_same_share_and_the_ends_stay():
    before = layer(47, head_dim=4)
    kept = LagKV(sinks=3, lag=8).compress(before, Allowance(3 + 12 + 8, 0.5))
    for head in positions(kept):
        assert head[:3] == [0, 1, 2]
        assert head[-12:] == list(range(35, 47))  # one whole partition and the rest
        shares = [sum(first <= token < first + 8 for token in head) for first in (3, 11, 19, 27)]
        assert shares == [2, 2, 2, 2]


def test_a_budget_below_the_ends_keeps_sinks_and_then_the_most_recent():
    before = layer(43)
    method = LagKV(sinks=3, lag=8)
    assert positions(method.compress(before, Allowance(8, 0.2)))[0] == [0, 1, 2, 38, 39, 40, 41, 42]
    assert positions(method.compress(before, Allowance(2, 0.05)))[0] == [0, 1]
    assert positions(LagKV().compress(before, Allowance(6, 0.14)))[0] == [0, 1, 2, 3, 41, 42]


# --- ChunkKV


@pytest.mark.parametrize(
    ("n_keep", "kept"),
    [
        (3, [3, 4, 5]),  # means 1, 2.33, 2: the second chunk
        (5, [3, 4, 5, 6, 7]),
        (6, [2, 3, 4, 5, 6, 7]),  # and the best of the first
        (4, [3, 4, 5, 6]),  # the better of the last: a tie, so the lower
        (8, list(range(8))),
    ],
)
def test_whole_chunks_stay_and_the_best_of_the_one_that_is_cut(n_keep, kept):
    scores = torch.tensor([[0.0, 1, 2, 0, 0, 7, 2, 2]])
    assert keep_chunks(scores, n_keep, chunk=3).tolist() == [kept]


@quick
@given(
    length=st.integers(1, 20), chunk=st.integers(1, 7), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_chunks_equal_the_slow_version(length, chunk, share, seed):
    scores = normal(length, seed=seed).tolist()
    n_keep = max(1, int(share * length))
    chunks = [list(range(i, min(i + chunk, length))) for i in range(0, length, chunk)]
    means = [sum(scores[token] for token in each) / len(each) for each in chunks]
    wanted: list[int] = []
    for index in sorted(range(len(chunks)), key=lambda i: -means[i]):
        best = sorted(chunks[index], key=lambda token: -scores[token])
        wanted += best[: n_keep - len(wanted)]
    assert keep_chunks(torch.tensor([scores]), n_keep, chunk=chunk).tolist() == [sorted(wanted)]


def test_all_kv_heads_keep_the_same_chunks_and_the_window():
    kept = ChunkKV(window=6, chunk=5).compress(layer(52, seed=3), Allowance(23, 0.45))
    [one, other] = positions(kept)
    assert one == other
    assert one[-7:] == list(range(45, 52))  # the chunks of the window: 45 to 49, and the short last one


# --- expected attention


def test_the_expected_weight_of_a_normal_query():
    """E exp(q k) with mean (1, 0) and covariance diag(0, 2): k = (1, 0) gets e, k = (0, 1) gets e."""
    mean = torch.tensor([[[1.0, 0.0]]])
    spread = torch.tensor([[[[0.0, 0.0], [0.0, 2.0]]]])
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]])
    found = expected_weights(mean, spread, keys, Softmax(1.0))
    total = 2 * math.e + 1
    wanted = torch.tensor([[[math.e / total, math.e / total, 1 / total]]])
    torch.testing.assert_close(found, wanted)
    by_mean = expected_weights(mean, None, keys, Softmax(1.0))
    torch.testing.assert_close(by_mean, torch.tensor([[[math.e, 1, 1]]]) / (math.e + 2))


def test_the_expectation_is_that_of_drawn_queries():
    mean, root = normal(4, seed=1), normal(4, 4, seed=2) / 3
    keys = normal(1, 1, 6, 4, seed=3)
    found = expected_weights(mean.view(1, 1, 4), (root @ root.T)[None, None], keys, Softmax(0.5))
    drawn = mean + normal(200_000, 4, seed=4) @ root.T
    wanted = (drawn @ keys[0, 0].T * 0.5).exp().mean(dim=0)
    torch.testing.assert_close(found[0, 0], wanted / wanted.sum(), atol=5e-3, rtol=0)


def test_query_statistics_equal_the_slow_version():
    queries = normal(1, 2, 9, 4, seed=5)
    mean, spread = query_statistics(queries, ROPE, sinks=2, future=3)
    turn = torch.stack(
        [ROPE.rotate(torch.eye(4)[None, None], torch.tensor(9 + step))[0, 0].T for step in range(3)]
    ).mean(dim=0)
    for head in range(2):
        plain = torch.stack(
            [ROPE.rotate(queries[:, :, i : i + 1], torch.tensor(-i))[0, head, 0] for i in range(2, 9)]
        )
        torch.testing.assert_close(mean[0, head], turn @ plain.mean(dim=0), atol=1e-5, rtol=0)
        covariance = torch.cov(plain.T, correction=0)
        torch.testing.assert_close(spread[0, head], turn @ covariance @ turn.T, atol=1e-5, rtol=0)


def test_expected_attention_keeps_the_sinks_and_counts_values_by_their_length():
    before = layer(30, head_dim=4, seed=6)
    object.__setattr__(before, "rope", ROPE)
    method = ExpectedAttention(future=20, sinks=3)
    assert all(head[:3] == [0, 1, 2] for head in positions(method.compress(before, Allowance(9, 0.3))))
    longer = before.values.clone()
    longer[:, :, 17] *= 1e4
    object.__setattr__(before, "values", longer)
    assert all(17 in head for head in positions(method.compress(before, Allowance(4, 0.13))))
    plain = ExpectedAttention(future=20, sinks=3, value_norm=False).token_scores(before)
    torch.testing.assert_close(plain[..., 3:].sum(dim=-1), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LagKV(sinks=-1), "sinks=-1 must be a whole number of tokens, 0 or more"),
        (lambda: LagKV(lag=1), "lag=1 must be a whole number of tokens, 2 or more"),
        (lambda: ChunkKV(chunk=0), "chunk=0 must be a whole number of tokens, 1 or more"),
        (lambda: ExpectedAttention(future=0), "future=0 must be a whole number of positions"),
        (lambda: ExpectedAttention(sinks=-2), "sinks=-2 must be"),
        (lambda: ExpectedAttention(epsilon=math.nan), "epsilon=nan must be 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_refused_and_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
