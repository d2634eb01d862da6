"""Replay: queries asked again after the prompt, a slow version, and how layers and heads compete."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.replay import Replay, asked_again
from kvmerge.errors import UserError
from kvmerge.method import Allowance, PrefillLayer
from kvmerge.rope import Rope
from tests.tiny import layer, quick

ROPE = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]))


def a_layer(length: int, seed: int = 0, **options: int) -> PrefillLayer:
    return replace(layer(length, seed=seed, **options), rope=ROPE)


def turned(state: list[float], by: float) -> list[float]:
    """One state of 8 numbers, its pairs four apart."""
    out = list(state)
    for pair in range(4):
        angle = by * float(ROPE.frequencies[pair])
        cos, sin = torch.tensor(angle).cos().item(), torch.tensor(angle).sin().item()
        first, second = state[pair], state[pair + 4]
        out[pair], out[pair + 4] = first * cos - second * sin, second * cos + first * sin
    return out


@quick
@given(
    length=st.integers(1, 12),
    group=st.integers(1, 2),
    rows=st.sampled_from([None, 1, 3, 50]),
    ahead=st.sampled_from([0, 1, 64]),
    seed=st.integers(0, 50),
)
def test_marks_equal_the_slow_version(length, group, rows, ahead, seed):
    given_layer = a_layer(length, seed, group=group)
    found = asked_again(given_layer.queries, given_layer.keys, ROPE, given_layer.softmax, rows, ahead)
    count = length if rows is None else min(rows, length)
    places = torch.linspace(0, length - 1, count).round().long().tolist()
    for head in range(2):
        keys = given_layer.keys[0, head].tolist()
        largest = [0.0] * length
        for query_head in range(head * group, (head + 1) * group):
            for place in places:
                query = turned(
                    given_layer.queries[0, query_head, place].tolist(), length + ahead - place
                )
                logits = [sum(q * k for q, k in zip(query, key, strict=True)) / 8**0.5 for key in keys]
                weights = torch.tensor(logits).softmax(-1).tolist()
                largest = [max(pair) for pair in zip(largest, weights, strict=True)]
        assert found[0, head].tolist() == pytest.approx(largest, abs=2e-5)


def test_what_one_query_finds_for_certain_is_kept() -> None:
    """One token's query points at one key; all others look everywhere."""
    length, found = 60, 25
    base = a_layer(length)
    keys, queries = 0.01 * base.keys, 0.01 * base.queries
    keys[:, :, found, 3] = 30.0  # a pair that hardly turns
    queries[:, :, 40, 3] = 30.0
    marked = replace(base, keys=keys, queries=queries)
    method = Replay(sinks=1, window=1, floor=1.0)
    assert found in method.compress(marked, Allowance(3, 0.05)).positions[0, 0].tolist()
    marks = asked_again(queries, keys, ROPE, marked.softmax, None, 64)
    assert marks[0, 0, found] > 0.99
    assert asked_again(0.01 * base.queries, keys, ROPE, marked.softmax, None, 64).max() < 0.1


def test_layers_divide_the_budget_by_what_their_tokens_are_worth() -> None:
    """A layer whose queries look at single keys keeps more than one that looks everywhere."""
    flat = replace(a_layer(40), queries=0.01 * a_layer(40).queries)
    sharp = replace(a_layer(40, seed=5), queries=20 * a_layer(40, seed=5).queries)
    method = Replay(layer_floor=0.25, sinks=0, window=0)
    shares = method.allocate([flat, sharp], Allowance(20, 0.5))
    assert sum(shares) == 40
    assert shares[1] > 24
    assert min(shares) >= 5
    assert Replay(layer_floor=1.0).allocate([flat, sharp], Allowance(20, 0.5)) == [20, 20]


@quick
@given(n_keep=st.integers(1, 29), floor=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 20))
def test_heads_meet_the_mean_and_each_keeps_an_entry(n_keep, floor, seed):
    entries = Replay(floor=floor).compress(a_layer(30, seed), Allowance(n_keep, n_keep / 30))
    alike = torch.ones(entries.positions.shape, dtype=torch.long)
    counts = (alike if entries.sizes is None else entries.sizes).sum(dim=-1)[0].tolist()
    assert sum(counts) == 2 * n_keep
    assert min(counts) >= 1


def test_sinks_and_the_window_stay() -> None:
    entries = Replay(sinks=2, window=3, floor=1.0).compress(a_layer(30), Allowance(6, 0.2))
    for head in range(2):
        assert {0, 1, 27, 28, 29} < set(entries.positions[0, head].tolist())


def test_cells_of_one_prompt_share_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "baselines.replay.asked_again", lambda *given: calls.append(1) or torch.rand(1, 2, 30)
    )
    one = a_layer(30)
    Replay().allocate([one], Allowance(5, 0.2))
    for n_keep in (5, 9):
        Replay().compress(one, Allowance(n_keep, n_keep / 30))
    assert len(calls) == 1
    Replay(ahead=9).compress(one, Allowance(5, 0.2))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rows": 0}, "rows=0 must be"),
        ({"rows": 1.5}, "rows=1.5 must be"),
        ({"ahead": -1}, "ahead=-1 must be"),
        ({"floor": 1.1}, "floor=1.1 must be between"),
        ({"layer_floor": float("nan")}, "layer_floor=nan must be between"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, why):
    with pytest.raises(UserError, match=why):
        Replay(**options)
