"""Methods that kvpress has, too, against what it keeps of the same prompt on the same model."""

from __future__ import annotations

import pytest
import torch

from baselines.chunkkv import ChunkKV
from baselines.expected_attention import ExpectedAttention
from baselines.key_norm import KeyNorm
from baselines.keydiff import KeyDiff
from baselines.lagkv import LagKV
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.method import Method
from kvmerge.session import Row
from tests.fidelity.official import _inputs
from tests.fidelity.official.kvpress import (
    CHUNK,
    FUTURE,
    KEPT,
    KERNEL,
    KV_HEADS,
    LAG,
    PRESSES,
    SINKS,
    WINDOW,
)
from tests.fidelity.vectors import close, positions, recorded

METHODS: dict[str, Method] = {
    "key_norm": KeyNorm(),
    "keydiff": KeyDiff(),
    "lagkv": LagKV(SINKS, LAG),
    "lagkv_short": LagKV(SINKS, 30),
    "chunkkv": ChunkKV(WINDOW, KERNEL, "avg", CHUNK),
    "expected_attention": ExpectedAttention(FUTURE, SINKS),
    "expected_attention_mean": ExpectedAttention(FUTURE, SINKS, covariance=False, epsilon=0.01),
}
COMPARED = {
    "key_norm": slice(None),
    "keydiff": slice(None),
    "lagkv": slice(SINKS, SINKS + 3 * LAG),
    "expected_attention": slice(SINKS, None),
    "expected_attention_mean": slice(SINKS, None),
}
"""Tokens whose scores mean the same on both sides: those that always stay have others there."""


@pytest.fixture(scope="module")
def official():
    return recorded("kvpress")["presses"]


def layers_of(method: Method, n_keep: int):
    seen = []
    run_sample(
        _inputs.tiny_llama(KV_HEADS),
        _inputs.tokens()[:, : _inputs.PROMPT],
        [Row(method, Budget(n_keep))],
        Stop(1, frozenset()),
        observer=lambda _, __, layer, kept: seen.append((layer, kept)),
    )
    return seen


def test_every_press_is_compared():
    assert set(METHODS) == set(PRESSES)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_tokens_stay_as_in_kvpress(name, official):
    theirs = official[name]
    n_keep = len(theirs["positions"][0][0])
    assert n_keep == (16 if name == "chunkkv" else KEPT)  # two whole chunks, and the short last one
    for (layer, kept), wanted in zip(
        layers_of(METHODS[name], n_keep), theirs["positions"], strict=True
    ):
        assert positions(kept) == wanted
        for head, tokens in enumerate(wanted):
            assert torch.equal(kept.keys[0, head], layer.keys[0, head, tokens])


@pytest.mark.parametrize("name", COMPARED)
def test_tokens_score_as_in_kvpress(name, official):
    method, tokens = METHODS[name], COMPARED[name]
    for (layer, _), wanted in zip(layers_of(method, KEPT), official[name]["scores"], strict=True):
        close(method.token_scores(layer)[0][..., tokens], torch.tensor(wanted)[..., tokens])
