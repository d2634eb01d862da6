from __future__ import annotations

import pytest
import torch
from torch import nn

from kvmerge import onednn
from kvmerge.onednn import PackedLinear, available, pack_linear_layers
from tests.tiny import FAMILIES, new_model, prompt

needs_onednn = pytest.mark.skipif(
    not available(torch.ones(1)), reason="this torch has no oneDNN linear for the CPU"
)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (2, 700, 24)])
def test_a_packed_layer_is_the_layer(bias, shape):
    linear = nn.Linear(24, 40, bias=bias)
    states = torch.randn(shape)
    wanted = linear.double()(states.double()).float()
    with torch.inference_mode():
        found = PackedLinear(linear.float())(states)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_gives_the_same_logits(family):
    model = new_model(family)
    ids = prompt(50)
    with torch.inference_mode():
        wanted = model(ids).logits
        linear = sum(type(module) is nn.Linear for module in model.modules())
        assert pack_linear_layers(model) == linear > 8
        assert not any(type(module) is nn.Linear for module in model.modules())
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


@needs_onednn
def test_weights_are_stored_once_but_for_a_tied_output_layer():
    def stored(model):
        return sum(parameter.numel() for parameter in model.parameters())

    model = new_model(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.numel()
    before = stored(model)
    packed = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
    pack_linear_layers(model)
    assert stored(model) == before - (packed - embedding)


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(2, 2, dtype=torch.bfloat16),
        nn.Linear(2, 2, device="meta"),
        nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2),
    ],
)
def test_other_layers_are_left_alone(other):
    model = nn.Sequential(other)
    assert pack_linear_layers(model) == 0
    assert model[0] is other


def test_nothing_is_packed_without_onednn(monkeypatch):
    monkeypatch.setattr(onednn.torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(2, 2))
    assert pack_linear_layers(model) == 0
    assert type(model[0]) is nn.Linear


def exact_attention(queries, keys, values, scale):
    """Output and column sums of `(1, heads, T, head_dim)` states, in float64, the map whole."""
    group = queries.shape[1] // keys.shape[1]
    wide_keys, wide_values = (s.double().repeat_interleave(group, dim=1) for s in (keys, values))
    logits = queries.double() @ wide_keys.mT * scale
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return weights @ wide_values, weights.sum(dim=2).unflatten(1, (-1, group)).sum(dim=2)


@needs_onednn
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 128, 129, 300])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
def test_attention_and_sums_are_those_of_the_map(length, heads):
    generator = torch.Generator().manual_seed(length)
    states = [
        torch.randn(1, length, count, 24, generator=generator).transpose(1, 2)  # as models hand them
        for count in (heads[0], heads[1], heads[1])
    ]
    wanted, sums = exact_attention(*states, 0.3)
    found, scores = onednn.prefill_attention(*states, 0.3, scored=True)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.double(), sums, atol=1e-5, rtol=1e-5)
    again, none = onednn.prefill_attention(*states, 0.3, scored=False)
    assert torch.equal(again, found)
    assert none is None


@needs_onednn
@pytest.mark.parametrize("tile", [1, 2**12, 2**30])
def test_the_size_of_a_block_changes_nothing(monkeypatch, tile):
    monkeypatch.setattr(onednn, "_TILE", tile)
    states = [torch.randn(1, count, 300, 16) for count in (4, 2, 2)]
    wanted, sums = exact_attention(*states, 0.25)
    found, scores = onednn.prefill_attention(*states, 0.25, scored=True)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.double(), sums, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_large_logits_neither_overflow_nor_vanish():
    states = [torch.randn(1, count, 100, 16) * 30 for count in (4, 2, 2)]
    wanted, sums = exact_attention(*states, 0.25)
    found, scores = onednn.prefill_attention(*states, 0.25, scored=True)
    torch.testing.assert_close(found.double(), wanted, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(scores.double(), sums, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_not_for_it(dtype):
    assert not available(torch.ones(1, dtype=dtype))
