"""Soft caps, attention sinks and windows, in every kernel against the whole map in float64."""

from __future__ import annotations

import pytest
import torch

from kvmerge.kernels import tiled
from kvmerge.kernels.attention import (
    attention_and_scores,
    cached_attention,
    masked_attention,
    weighted_attention,
)
from kvmerge.scores import attention_rows, column_sums, head_column_sums
from kvmerge.softmax import Softmax, plain
from tests.tiny import normal

KINDS = {
    "plain": Softmax(0.4),
    "softcap": Softmax(0.4, softcap=0.7),
    "sinks": Softmax(0.4, sinks=torch.linspace(-2, 3, 6)),
    "both": Softmax(0.4, 0.7, torch.linspace(-2, 3, 6)),
}
every_kind = pytest.mark.parametrize("softmax", KINDS.values(), ids=KINDS)
every_window = pytest.mark.parametrize("window", [None, 1, 2, 5, 40, 400])


def the_logits(queries, keys, softmax):
    """`(1, heads, rows, columns)`, without a mask."""
    wide = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = queries.double() @ wide.mT * softmax.scale
    cap = softmax.softcap
    return logits if cap is None else cap * (logits / cap).tanh()


def normalised(logits, visible, sinks):
    """A sink counts among the others and has no value."""
    shares = logits.exp() * visible
    total = shares.sum(-1, keepdim=True)
    return shares / (total if sinks is None else total + sinks.double().exp()[:, None, None])


def the_map(queries, keys, softmax, visible):
    return normalised(the_logits(queries, keys, softmax), visible, softmax.sinks)


def causal(rows, columns, window=None):
    """What the last `rows` of `columns` tokens see."""
    row = torch.arange(columns - rows, columns)[:, None]
    column = torch.arange(columns)
    return (column <= row) & (column > row - (window or columns))


def output(weights, values):
    return weights @ values.double().repeat_interleave(weights.shape[1] // values.shape[1], dim=1)


def by_group(weights, kv_heads):
    return weights.sum(dim=2).unflatten(1, (kv_heads, -1)).sum(dim=2)


def states(length, rows=None):
    """Queries of six heads, keys and values of two."""
    queries = normal(1, 6, rows or length, 16, seed=1)
    return queries, normal(1, 2, length, 16, seed=2), normal(1, 2, length, 16, seed=3)


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@every_kind
@every_window
@pytest.mark.parametrize("products", ["torch", "onednn"])
@pytest.mark.parametrize("length", [1, 33, 300])
def test_a_prompt_in_tiles(softmax, window, products, length):
    some = states(length)
    weights = the_map(*some[:2], softmax, causal(length, length, window))
    with torch.inference_mode():
        found, sums = tiled.attend(*some, softmax, scored=True, window=window, products=products)
    close(found, output(weights, some[2]))
    torch.testing.assert_close(sums.double(), by_group(weights, 2), atol=1e-4, rtol=1e-5)


@every_kind
@every_window
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_in_half_precision(softmax, window, dtype):
    some = [each.to(dtype) for each in states(50)]
    weights = the_map(*some[:2], softmax, causal(50, 50, window))
    found, sums = attention_and_scores(*some, softmax, scored=True, window=window)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), output(weights, some[2]), atol=0.03, rtol=0.02)
    torch.testing.assert_close(sums.double(), by_group(weights, 2), atol=0.03, rtol=0.02)


@every_kind
@every_window
@pytest.mark.parametrize(("new", "length"), [(1, 1), (1, 30), (4, 4), (4, 30)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_new_tokens_over_a_cache(softmax, window, new, length, with_bias):
    some = states(length, new)
    bias = normal(1, 2, length, seed=9) if with_bias else None
    found = cached_attention(*some, softmax, bias, window)
    logits = the_logits(*some[:2], softmax)
    if bias is not None:
        logits = logits + bias.repeat_interleave(3, dim=1).unsqueeze(2)
    weights = normalised(logits, causal(new, length, window), softmax.sinks)
    close(found, output(weights, some[2]))


@every_kind
def test_one_new_token_and_its_weights(softmax):
    some = states(30, 1)
    weights = the_map(*some[:2], softmax, causal(1, 30))
    found, of_heads = weighted_attention(*some, softmax)
    close(found, output(weights, some[2]))
    close(of_heads, weights[:, :, 0])


@every_kind
def test_a_mask_of_ones_own(softmax):
    some = states(20)
    visible = causal(20, 20) & (torch.arange(20) % 3 != 1) | torch.eye(20, dtype=torch.bool)
    found = masked_attention(*some, softmax, visible.expand(1, 2, 20, 20))
    close(found, output(the_map(*some[:2], softmax, visible), some[2]))


@every_kind
def test_scores_without_attention(softmax):
    """Rows of the map, its sums by head, and by KV head."""
    queries, keys, _ = states(60)
    weights = the_map(queries, keys, softmax, causal(60, 60))
    close(attention_rows(queries, keys, 10, 25, softmax=softmax), weights[:, :, 10:25, :25])
    close(head_column_sums(queries, keys, softmax=softmax), weights.sum(dim=2))
    close(column_sums(queries, keys, softmax=softmax), by_group(weights, 2))


def test_a_plain_softmax_has_the_usual_scale():
    assert plain(64) == Softmax(0.125)
    assert plain(64).is_plain
    assert not KINDS["softcap"].is_plain
    assert not KINDS["sinks"].is_plain
