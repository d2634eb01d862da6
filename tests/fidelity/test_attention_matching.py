"""Attention matching against the recorded results of its authors' code."""

from __future__ import annotations

import pytest
import torch

from baselines.attention_matching import AttentionMatching
from kvmerge.method import Allowance, PrefillLayer
from kvmerge.softmax import plain
from tests.fidelity.official import attention_matching as official
from tests.fidelity.vectors import close, recorded

WAYS = {
    "highest_attention": {},
    "omp": {"key_choice": "omp"},
    "omp_4": {"key_choice": "omp", "at_once": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_keys_biases_and_values_are_those_of_the_authors(way):
    before = PrefillLayer(*official.states(), None, 0, 1, plain(official.HEAD_DIM))
    method = AttentionMatching(rows=100.0, **WAYS[way])
    kept = method.compress(before, Allowance(official.KEPT, 0.25))
    assert kept.bias is not None
    for head, theirs in enumerate(recorded("attention_matching")[way]):
        assert kept.positions[0, head].tolist() == theirs["positions"]
        close(kept.bias[0, head], theirs["bias"], 1e-4)
        # a key whose factor is clamped to 1e-12 has a value of that much more: the error is relative
        wanted = torch.tensor(theirs["values"])
        torch.testing.assert_close(kept.values[0, head], wanted, atol=1e-4, rtol=1e-5)
