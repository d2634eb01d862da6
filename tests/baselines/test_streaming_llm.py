"""StreamingLLM: the golden of the method notes, its edges, and holding."""

import pytest
import torch

from baselines.streaming_llm import StreamingLLM, keep
from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from kvmerge.session import Policy, Row
from tests.fidelity.vectors import Replay, positions
from tests.tiny import layer, normal


def test_the_first_four_and_the_last_tokens_stay():
    assert keep(10, 6, sinks=4).tolist() == [0, 1, 2, 3, 8, 9]


@pytest.mark.parametrize(
    ("stored", "n_keep", "sinks", "wanted"),
    [
        (10, 5, 4, [0, 1, 2, 3, 9]),
        (10, 4, 4, [0, 1, 2, 9]),  # one recent token at least
        (10, 1, 4, [9]),
        (10, 3, 0, [7, 8, 9]),
        (3, 9, 4, [0, 1, 2]),
    ],
)
def test_sinks_give_way_where_the_budget_is_small(stored, n_keep, sinks, wanted):
    assert keep(stored, n_keep, sinks=sinks).tolist() == wanted


def test_compress_keeps_whole_tokens_in_every_head():
    before = layer(30)
    kept = StreamingLLM().compress(before, Allowance(10, 1 / 3))
    wanted = [0, 1, 2, 3, 24, 25, 26, 27, 28, 29]
    assert positions(kept) == [wanted] * 2
    assert torch.equal(kept.keys, before.keys[:, :, wanted])
    assert torch.equal(kept.values, before.values[:, :, wanted])


def test_hold_drops_the_oldest_after_the_sinks():
    states = tuple(normal(1, 2, 30, 4, seed=seed) for seed in range(3))
    replay = Replay(Row(StreamingLLM(2), Budget(5)), [states], 20, policy=Policy("hold"))
    for end in range(21, 26):
        replay.step()
        assert positions(replay.entries()) == [[0, 1, end - 3, end - 2, end - 1]] * 2


@pytest.mark.parametrize("sinks", [-1, 2.5])
def test_sinks_must_be_a_count(sinks):
    with pytest.raises(UserError, match=rf"sinks={sinks} must be a whole number"):
        StreamingLLM(sinks)
