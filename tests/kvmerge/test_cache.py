"""Rows of different length in one batch, against each row on its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmerge.cache import LayerCache, SteppedRow
from kvmerge.method import Entries
from kvmerge.rope import Rope
from kvmerge.softmax import Softmax
from tests.kvmerge import oracles
from tests.tiny import normal, quick

HEADS, KV_HEADS, DIM = 4, 2, 8


def entries(length, seed, bias=False):
    return Entries(
        normal(1, KV_HEADS, length, DIM, seed=seed),
        normal(1, KV_HEADS, length, DIM, seed=seed + 1),
        torch.arange(length).expand(1, KV_HEADS, length),
        bias=normal(1, KV_HEADS, length, seed=seed + 2) if bias else None,
    )


class Alone:
    """One row's cache as plain tensors."""

    def __init__(self, entry):
        self.keys, self.values = entry.keys[0], entry.values[0]
        self.bias = torch.zeros(self.keys.shape[:2]) if entry.bias is None else entry.bias[0]

    def attend(self, queries, keys, values):
        self.keys = torch.cat([self.keys, keys], dim=1)
        self.values = torch.cat([self.values, values], dim=1)
        self.bias = torch.cat([self.bias, torch.zeros(keys.shape[:2])], dim=1)
        return oracles.attend(queries, self.keys, self.values, 0.3, self.bias)


def step(cache, alone, order, n_new, seed):
    """Feed new tokens to the active rows of both, and compare."""
    queries = normal(len(order), n_new, HEADS, DIM, seed=seed).transpose(1, 2)
    keys = normal(len(order), KV_HEADS, n_new, DIM, seed=seed + 1)
    values = normal(len(order), KV_HEADS, n_new, DIM, seed=seed + 2)
    found = cache.attend(order, queries, keys, values, Softmax(0.3))
    for slot, row in enumerate(order):
        wanted = alone[row].attend(queries[slot], keys[slot], values[slot])
        torch.testing.assert_close(found[slot], wanted, atol=1e-5, rtol=0)


@quick
@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 4, 6]), st.booleans()), min_size=1, max_size=6),
    events=st.lists(st.integers(-1, 5), max_size=8),
    replay=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 1000),
)
def test_a_batch_of_rows_is_each_row_alone(rows, events, replay, seed):
    """Decode with rows leaving (an event names one), then rewind and replay in chunks."""
    kept = [entries(length, seed + 10 * i, bias) for i, (length, bias) in enumerate(rows)]
    cache = LayerCache(kept, capacity=9)
    alone = [Alone(entry) for entry in kept]
    order = list(range(len(rows)))
    for number, leaving in enumerate(events):
        if leaving in order:
            order.remove(leaving)
            cache.retire(leaving)
        if not order:
            break
        step(cache, alone, order, 1, seed + 100 * number)
    for _ in range(2):
        cache.rewind()
        alone = [Alone(entry) for entry in kept]
        for number, n_new in enumerate(replay):
            step(cache, alone, list(range(len(rows))), n_new, seed + 1000 * number)


def test_rows_of_one_length_share_a_buffer():
    cache = LayerCache([entries(n, n) for n in (4, 6, 4, 4)], capacity=2)
    assert sorted(group.rows for group in cache.groups) == [[0, 2, 3], [1]]
    assert [group.keys.shape[2] for group in cache.groups] == [6, 8]


def test_entries_are_copied():
    """The cache owns its states: a row must not see what another row does to a shared layer."""
    kept = entries(4, 0)
    cache = LayerCache([kept], capacity=1)
    kept.keys.zero_()
    assert cache.groups[0].keys[0, :, :4].abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_a_full_buffer_grows(bias):
    """Nothing already stored changes when a buffer is replaced by a larger one."""
    kept = [entries(4, 0, bias), entries(4, 10), entries(6, 20, bias)]
    cache = LayerCache(kept, capacity=1)
    alone = [Alone(entry) for entry in kept]
    order = [0, 1, 2]
    for number in range(12):
        if number == 5:
            order.remove(0)
            cache.retire(0)
        step(cache, alone, order, 1 + number % 2, seed=100 * number)
    cache.rewind()
    alone = [Alone(entry) for entry in kept]
    step(cache, alone, [0, 1, 2], 30, seed=7)


def test_bytes_are_those_of_the_entries_stored():
    cache = LayerCache([entries(4, 0), entries(4, 1), entries(6, 2)], capacity=50)
    entry_bytes = 2 * KV_HEADS * DIM * 4
    assert cache.nbytes() == (4 + 4 + 6) * entry_bytes
    new = [normal(3, heads, 2, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    cache.attend([0, 1, 2], *new, Softmax(0.3))
    assert cache.nbytes() == (6 + 6 + 8) * entry_bytes


# --- rows that take new tokens one at a time


def test_a_stepped_row_without_a_rule_only_appends():
    kept = [entries(5, 0, bias=True), entries(5, 10)]
    cache = LayerCache(kept, capacity=9, stepped={0: SteppedRow(0, kept[0], 20, None)})
    for _ in range(2):
        alone = [Alone(entry) for entry in kept]
        step(cache, alone, [0, 1], 1, seed=3)
        step(cache, alone, [1, 0], 3, seed=4)
        cache.retire(0)
        step(cache, alone, [1], 1, seed=5)
        cache.rewind()


def test_a_rule_sees_the_weights_and_replaces_the_entries():
    """The rule drops the oldest entry: each step attends over what is left and the new token."""
    seen = []

    def drop_first(stored, weights, number):
        seen.append((stored.positions[0, 0].tolist(), weights, number))
        return Entries(stored.keys[:, :, 1:], stored.values[:, :, 1:], stored.positions[..., 1:])

    kept = entries(3, 0)
    row = SteppedRow(0, kept, 20, drop_first)
    cache = LayerCache([kept], capacity=0, stepped={0: row})
    queries = normal(1, HEADS, 3, DIM, seed=1)
    keys, values = normal(1, KV_HEADS, 3, DIM, seed=2), normal(1, KV_HEADS, 3, DIM, seed=3)
    everything = [torch.cat([kept.keys[0], keys[0]], 1), torch.cat([kept.values[0], values[0]], 1)]
    for _ in range(2):
        found = cache.attend([0], queries, keys, values, Softmax(0.3))[0]
        for token in range(3):
            window = slice(token, token + 4)
            wanted = oracles.attend(
                queries[0, :, token : token + 1], *(s[:, window] for s in everything), 0.3
            )
            torch.testing.assert_close(found[:, token : token + 1], wanted, atol=1e-5, rtol=0)
        assert [(positions, number) for positions, _, number in seen] == [
            ([0, 1, 2, 20], 0),
            ([1, 2, 20, 21], 1),
            ([2, 20, 21, 22], 2),
        ]
        logits = everything[0][:, :4].repeat_interleave(2, 0) @ queries[0, :, 0, :, None] * 0.3
        torch.testing.assert_close(seen[0][1], logits[..., 0].softmax(-1)[None], atol=1e-6, rtol=0)
        seen.clear()
        cache.rewind()


def test_rolled_positions_are_places_in_the_cache():
    """Entries at 0, 5, 9 and a token at 12 attend as if they stood at 0, 1, 2, 3."""
    rope = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]))
    raw = normal(1, KV_HEADS, 3, DIM, seed=1)
    values = normal(1, KV_HEADS, 3, DIM, seed=2)
    positions = torch.tensor([0, 5, 9]).expand(1, KV_HEADS, 3)
    kept = Entries(rotated(raw, positions, rope), values, positions)
    query, key = normal(1, HEADS, 2, DIM, seed=3), normal(1, KV_HEADS, 2, DIM, seed=4)
    value = normal(1, KV_HEADS, 2, DIM, seed=5)
    true = torch.tensor([12, 13])
    cache = LayerCache([kept], capacity=0, stepped={0: SteppedRow(0, kept, 12, None, rope)})
    found = cache.attend([0], rotated(query, true, rope), rotated(key, true, rope), value, Softmax(0.3))
    wanted = oracles.attend(
        rotated(query, torch.tensor([3, 4]), rope)[0],
        rotated(torch.cat([raw, key], 2), torch.arange(5), rope)[0],
        torch.cat([values, value], 2)[0],
        0.3,
    )
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)


def rotated(states, positions, rope):
    """RoPE by complex numbers: dimension `i` is paired with `i + head_dim / 2`."""
    first, second = states.chunk(2, dim=-1)
    turn = torch.polar(
        torch.ones(()), positions.unsqueeze(-1).float() * rope.frequencies.expand(DIM // 2)
    )
    out = torch.complex(first, second) * turn
    return torch.cat([out.real, out.imag], dim=-1)
