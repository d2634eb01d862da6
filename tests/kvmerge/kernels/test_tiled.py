"""Attention and its column sums, on every way to multiply, against the whole map in float64."""

from __future__ import annotations

import pytest
import torch

from kvmerge.kernels import packed_linear, tiled
from kvmerge.kernels.tiled import attend, suits
from kvmerge.softmax import Softmax


@pytest.fixture(params=["oneDNN", "torch", "torch, gradients may flow"])
def way(request, monkeypatch):
    with_onednn = request.param == "oneDNN"
    if with_onednn and not packed_linear.available(torch.ones(1)):
        pytest.skip("this torch has no oneDNN linear for the CPU")
    monkeypatch.setattr(tiled, "faster_products", lambda _: "onednn" if with_onednn else "torch")
    with torch.set_grad_enabled(request.param.endswith("flow")):
        yield


def exact_attention(queries, keys, values, scale):
    """Output and column sums of `(1, heads, T, head_dim)` states, in float64, the map whole."""
    group = queries.shape[1] // keys.shape[1]
    wide_keys, wide_values = (s.double().repeat_interleave(group, dim=1) for s in (keys, values))
    logits = queries.double() @ wide_keys.mT * scale
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return weights @ wide_values, weights.sum(dim=2).unflatten(1, (-1, group)).sum(dim=2)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 128, 129, 300])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
def test_attention_and_sums_are_those_of_the_map(length, heads):
    generator = torch.Generator().manual_seed(length)
    states = [
        torch.randn(1, length, count, 24, generator=generator).transpose(1, 2)  # as models hand them
        for count in (heads[0], heads[1], heads[1])
    ]
    wanted, sums = exact_attention(*states, 0.3)
    found, scores = attend(*states, Softmax(0.3), scored=True)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.double(), sums, atol=1e-5, rtol=1e-5)
    again, none = attend(*states, Softmax(0.3), scored=False)
    assert torch.equal(again, found)
    assert none is None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tile", [1, 2**12, 2**30])
def test_the_size_of_a_block_changes_nothing(monkeypatch, tile):
    monkeypatch.setattr(tiled, "_TILE", tile)
    states = [torch.randn(1, count, 300, 16) for count in (4, 2, 2)]
    wanted, sums = exact_attention(*states, 0.25)
    found, scores = attend(*states, Softmax(0.25), scored=True)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.double(), sums, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(8))
def test_large_logits_neither_overflow_nor_vanish(seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = (
        torch.randn(1, count, 100, 16, generator=generator) * 30 for count in (4, 2, 2)
    )
    wanted, sums = exact_attention(queries, keys, values, 0.25)
    found, scores = attend(queries, keys, values, Softmax(0.25), scored=True)
    # A logit is a sum of 16 products, each rounded: what is wrong with it by then moves a weight by
    # as large a share, and with it the output by twice that share of the largest value.
    wide = keys.repeat_interleave(2, dim=1)
    logit_error = 16 * 2**-24 * float((queries.abs() @ wide.abs().mT).max()) * 0.25
    assert logit_error < 0.05
    torch.testing.assert_close(
        found.double(), wanted, atol=2 * logit_error * float(values.abs().max()), rtol=0
    )
    torch.testing.assert_close(scores.double(), sums, atol=1e-5, rtol=2 * logit_error)


def test_gradients_are_those_of_the_map(monkeypatch):
    monkeypatch.setattr(tiled, "faster_products", lambda _: "torch")
    states = [torch.randn(1, count, 70, 16, requires_grad=True) for count in (4, 2, 2)]
    found = torch.autograd.grad(attend(*states, Softmax(0.25), scored=False)[0].square().sum(), states)
    wanted = torch.autograd.grad(exact_attention(*states, 0.25)[0].square().sum(), states)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_it_suits_float32_on_the_cpu_alone():
    assert suits(torch.ones(1))
    assert not suits(torch.ones(1, dtype=torch.bfloat16))
    assert not suits(torch.ones(1, device="meta"))
