"""D2O against the recorded results of its authors' code."""

from __future__ import annotations

import torch

from baselines.d2o import D2O, layer_shares, variance_level
from kvmerge.budget import Budget
from kvmerge.scores import column_sums
from kvmerge.session import Policy, Row
from tests.fidelity.official import d2o
from tests.fidelity.official._inputs import PROMPT, STEPS
from tests.fidelity.vectors import Replay, close, recorded


def test_layers_get_the_shares_that_the_authors_give():
    sums = []
    for index in range(d2o.LAYERS):
        queries, keys, _ = (state[:, :, :PROMPT] for state in d2o.states(index))
        sums.append(column_sums(queries, keys))
    levels = torch.cat([variance_level(of_layer) for of_layer in sums])
    shares = layer_shares(levels, 2 * d2o.RATIO)
    close(shares, recorded("d2o")["whole"]["shares"], 1e-6)


def test_bug_compat_equals_the_authors_code_step_by_step():
    """`bug_compat` with the authors' allocation: attention output, threshold and merged entries."""
    official = recorded("d2o")["whole"]
    row = Row(D2O(alloc="variance", bug_compat=True), Budget(2 * d2o.RATIO))
    replay = Replay(row, [d2o.states(index) for index in range(d2o.LAYERS)], PROMPT)
    compressed = range(2, d2o.LAYERS - 1)
    for step in range(STEPS):
        found = replay.step()
        for place, index in enumerate(compressed):
            close(found[index][d2o.SHOWN] @ d2o.probe(), official["outputs"][step][place])
            close(replay.entries(index).state, [official["thresholds"][step][place]], 1e-6)
        if step in (0, STEPS - 1):
            lengths = [replay.entries(index).keys.shape[2] for index in range(d2o.LAYERS)]
            assert lengths == official["lengths"][step > 0]
    for place, index in enumerate(compressed):
        entries = replay.entries(index)
        close(entries.keys[0, d2o.SHOWN] @ d2o.probe(), official["keys"][place])
        close(entries.values[0, d2o.SHOWN] @ d2o.probe(), official["values"][place])


def test_the_default_equals_the_earlier_class_step_by_step():
    """The default equals their earlier class: it compresses the prompt, and each head decides alone."""
    official = recorded("d2o")["prompt"]
    row = Row(D2O(), Budget(2 * d2o.RATIO))
    replay = Replay(row, [d2o.states(1, heads=1)], PROMPT, policy=Policy("hold"))
    for step in range(STEPS + 1):
        if step:
            replay.step()
        entries = replay.entries()
        close(entries.state, [official["thresholds"][step]], 1e-6)
        close(entries.keys[0, 0] @ d2o.probe(), official["keys"][step])
        close(entries.values[0, 0] @ d2o.probe(), official["values"][step])
