"""Moving cached keys between positions, against the models' own rotation."""

import pytest
import torch

from kvmerge.errors import UserError
from kvmerge.hook import forward, hooked
from kvmerge.rope import Rope
from tests.tiny import FAMILIES, AnySession, new_model, normal, prompt, shared_model


def keys_at(model, input_ids, first):
    """Keys of the first layer after RoPE, with the prompt placed at `first`, `first + 1`, …"""
    seen = []

    class Recorder(AnySession):
        def attend(self, layer_idx, queries, keys, values, scale):
            seen.append(keys)
            return torch.zeros_like(queries)

    with hooked(model), torch.inference_mode():
        forward(model, Recorder(), input_ids, first + torch.arange(input_ids.shape[1])[None])
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", [0, 1, 30, -7])
def test_rotation_equals_the_models_own(family, by):
    model = shared_model(family)
    before, after = keys_at(model, prompt(6), 10), keys_at(model, prompt(6), 10 + by)
    moved = Rope.of(model).rotate(before, torch.tensor(by))
    torch.testing.assert_close(moved, after, atol=1e-4, rtol=0)


def test_each_entry_moves_by_its_own_distance():
    model = shared_model()
    rope = Rope.of(model)
    states = normal(1, 2, 3, 16)
    by = torch.tensor([[[0, 4, -2], [1, 0, 9]]])
    found = rope.rotate(states, by)
    for head in range(2):
        for entry in range(3):
            alone = rope.rotate(states[:, head : head + 1, entry : entry + 1], by[0, head, entry])
            torch.testing.assert_close(found[:, head : head + 1, entry : entry + 1], alone)
    assert torch.equal(found[0, 0, 0], states[0, 0, 0])  # not moved


def test_partial_rotation_leaves_the_rest():
    rope = Rope(torch.tensor([1.0, 0.1]))
    states = normal(1, 1, 2, 10)
    found = rope.rotate(states, torch.tensor(3))
    assert torch.equal(found[..., 4:], states[..., 4:])
    assert not torch.equal(found[..., :4], states[..., :4])


def test_half_precision_is_rotated_in_float32():
    rope = Rope.of(shared_model())
    states = normal(1, 2, 5, 16)
    found = rope.rotate(states.bfloat16(), torch.tensor(100))
    assert found.dtype == torch.bfloat16
    wanted = rope.rotate(states.bfloat16().float(), torch.tensor(100)).bfloat16()
    assert torch.equal(found, wanted)


def test_angles_that_depend_on_the_length_are_refused():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = new_model(rope_parameters=scaled)
    with pytest.raises(UserError, match=r"llama with RoPE type 'dynamic' cannot rotate.*default"):
        Rope.of(model)


def test_the_mean_rotation_is_the_mean_of_the_rotations():
    rope = Rope(torch.tensor([1.0, 0.1]))
    states, by = normal(2, 3, 6), torch.tensor([4, 5, 11])
    wanted = torch.stack([rope.rotate(states[None], at)[0] for at in by]).mean(dim=0)
    torch.testing.assert_close(rope.rotate_by_mean(states, by), wanted)
