"""Whole rows by their slots, against one element after the other."""

import torch

from kvmerge import rows
from tests.tiny import generator, normal


def states(*shape):
    """As a model hands them over: tokens before heads in memory."""
    batch, heads, length, width = shape
    return normal(batch, length, heads, width).transpose(1, 2)


def test_every_head_takes_its_own_rows():
    slots = torch.randint(0, 7, (2, 3, 5), generator=generator(0))
    before = states(2, 3, 7, 4)
    wanted = before.gather(2, slots.unsqueeze(-1).expand(-1, -1, -1, 4))
    assert torch.equal(rows.take(before, slots), wanted)


def test_rows_are_added_to_their_heads_slots_and_what_they_are_added_to_stays():
    slots = torch.randint(0, 3, (2, 3, 5), generator=generator(0))
    before, given = states(2, 3, 3, 4), states(2, 3, 5, 4)
    as_it_was = before.clone()
    wanted = before.scatter_add(2, slots.unsqueeze(-1).expand(-1, -1, -1, 4), given)
    torch.testing.assert_close(rows.add(before, slots, given), wanted)
    assert torch.equal(before, as_it_was)
