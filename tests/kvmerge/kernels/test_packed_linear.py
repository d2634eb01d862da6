from __future__ import annotations

import pytest
import torch
from torch import nn

from kvmerge.kernels import packed_linear
from kvmerge.kernels.packed_linear import PackedLinear, available, pack_linear_layers
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
    monkeypatch.setattr(packed_linear.torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(nn.Linear(2, 2))
    assert pack_linear_layers(model) == 0
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_not_for_onednn(dtype):
    assert not available(torch.ones(1, dtype=dtype))
