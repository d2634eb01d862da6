"""SnapKV, PyramidKV, TOVA and StreamingLLM against the recorded results of their authors' code."""

from __future__ import annotations

import pytest
import torch

from baselines.pyramidkv import PyramidKV, layer_counts
from baselines.snapkv import SnapKV, pooled_scores
from baselines.streaming_llm import StreamingLLM
from baselines.tova import TOVA
from kvmerge.budget import Budget
from kvmerge.method import Allowance, PrefillLayer
from kvmerge.rope import Rope
from kvmerge.session import Policy, Row
from kvmerge.softmax import plain
from tests.fidelity.official import pyramidkv, snapkv, streaming_llm, tova
from tests.fidelity.official._inputs import PROMPT, STEPS
from tests.fidelity.vectors import Replay, close, positions, recorded


def layer(kv_heads: int, layer_idx: int = 0, layers: int = 1) -> PrefillLayer:
    queries, keys, values = snapkv.states(kv_heads)
    return PrefillLayer(queries, keys, values, None, layer_idx, layers, plain(snapkv.HEAD_DIM))


@pytest.mark.parametrize(
    ("family", "name", "pooling", "kv_heads"),
    [
        ("snapkv", "max", "max", 4),
        ("snapkv", "avg", "avg", 4),
        ("pyramidkv", "snapkv_2_kv_heads", "avg", 2),
    ],
)
def test_snapkv_pools_and_keeps_as_the_authors_do(family, name, pooling, kv_heads):
    """The same pooled scores, and the same tokens but for ties, whose order theirs leaves open."""
    official = recorded(family)[name]
    before = layer(kv_heads)
    pooled = pooled_scores(
        before.queries, before.keys, window=snapkv.WINDOW, kernel=snapkv.KERNEL, pooling=pooling
    )
    close(pooled[0], official["pooled"], 1e-6)
    method = SnapKV(snapkv.WINDOW, snapkv.KERNEL, pooling)
    kept = method.compress(before, Allowance(snapkv.CAPACITY, 0.3))
    assert kept.keys.shape[2] == snapkv.CAPACITY
    for head, theirs in enumerate(official["positions"]):
        ours = positions(kept)[head]
        if pooling == "avg":
            assert ours == theirs
            continue
        past = snapkv.LENGTH - snapkv.WINDOW
        score = [*official["pooled"][head], *[torch.inf] * snapkv.WINDOW]
        least = min(score[token] for token in theirs if token < past)
        assert {score[token] for token in set(ours) ^ set(theirs)} <= {least}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_pyramidkv_keeps_the_same_tokens(kv_heads):
    official = recorded("pyramidkv")[f"pyramidkv_{kv_heads}_kv_heads"]
    method = PyramidKV(snapkv.WINDOW, snapkv.KERNEL, "avg", pyramidkv.BETA, exact=False)
    layers = [layer(kv_heads, index, pyramidkv.LAYERS) for index in range(pyramidkv.LAYERS)]
    counts = method.allocate(layers, Allowance(snapkv.CAPACITY, 0.3))
    assert len(set(counts)) > 1
    for each, n_keep, theirs in zip(layers, counts, official, strict=True):
        assert positions(method.compress(each, Allowance(n_keep, 0.3))) == theirs


def test_pyramidkv_divides_the_budget_as_the_authors_do():
    official = recorded("pyramidkv")["counts"]
    for (n_keep, length, layers, window, beta), theirs in zip(
        pyramidkv.SCHEDULES, official, strict=True
    ):
        ours = layer_counts(n_keep, length, layers, window=window, beta=beta, exact=False)
        assert ours == theirs


def test_tova_keeps_the_authors_tokens_step_by_step():
    official = recorded("tova")["positions"]
    row = Row(TOVA(), Budget(tova.KEPT))
    replay = Replay(row, [tova.states()], PROMPT, policy=Policy("hold"))
    assert positions(replay.entries()) == [official[0]] * tova.KV_HEADS
    for theirs in official[1:]:
        replay.step()
        assert positions(replay.entries()) == [theirs] * tova.KV_HEADS
    assert len(official) == STEPS + 1


def test_streaming_llm_keeps_the_authors_tokens_step_by_step():
    """The same entries, and with rolled positions the same attention output."""
    official = recorded("streaming_llm")
    queries, keys, values = streaming_llm.states()
    half = streaming_llm.HEAD_DIM // 2
    rope = Rope(10000.0 ** -(torch.arange(half) / half))
    at = torch.arange(PROMPT + STEPS)
    states = (rope.rotate(queries, at), rope.rotate(keys, at), values)
    budget = Budget(streaming_llm.SINKS + streaming_llm.RECENT)
    row = Row(StreamingLLM(streaming_llm.SINKS), budget)
    replay = Replay(row, [states], PROMPT, rope, Policy("hold", "rolled"))
    assert positions(replay.entries()) == [official["positions"][0]] * streaming_llm.KV_HEADS
    for theirs, output in zip(official["positions"][1:], official["outputs"], strict=True):
        [found] = replay.step()
        close(found.flatten(), output)
        assert positions(replay.entries()) == [theirs] * streaming_llm.KV_HEADS
