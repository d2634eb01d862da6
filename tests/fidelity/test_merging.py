"""LOOK-M, ZSMerge and KeepKV against the recorded results of their authors' code."""

from __future__ import annotations

import pytest

from baselines.keepkv import KeepKV
from baselines.look_m import LookM
from baselines.zsmerge import ZSMerge, faded_sums
from kvmerge.budget import Budget
from kvmerge.method import Allowance, PrefillLayer
from kvmerge.session import Policy, Row
from kvmerge.softmax import plain
from tests.fidelity.official import keepkv, look_m, zsmerge
from tests.fidelity.official._inputs import PROMPT, STEPS
from tests.fidelity.vectors import Replay, close, recorded


def test_look_m_stores_what_the_authors_do_step_by_step():
    official = recorded("look_m")
    row = Row(LookM(), Budget(2 * look_m.RATIO))
    replay = Replay(row, [look_m.states()], PROMPT, policy=Policy("hold"))
    for step in range(STEPS + 1):
        if step:
            replay.step()
        entries = replay.entries()
        close(entries.keys[0] @ look_m.probe(), official["keys"][step])
        close(entries.values[0] @ look_m.probe(), official["values"][step])


@pytest.mark.parametrize("run", range(len(zsmerge.SETTINGS)))
def test_zsmerge_stores_what_the_authors_do(run):
    official, (tail, dense, shrink) = recorded("zsmerge")["runs"][run], zsmerge.SETTINGS[run]
    before = PrefillLayer(*zsmerge.states(), None, 0, 1, plain(zsmerge.HEAD_DIM))
    close(faded_sums(before.queries, before.keys, shrink)[0], official["scores"])
    n_keep = int(zsmerge.BUDGET * zsmerge.LENGTH)
    kept = ZSMerge(tail, dense, shrink).compress(before, Allowance(n_keep, zsmerge.BUDGET))
    assert kept.sizes is not None
    for head in range(zsmerge.KV_HEADS):
        mean = kept.sizes[0, head] > 1
        assert kept.sizes[0, head, mean].tolist() == official["sizes"][head]
        close(kept.keys[0, head, mean], official["keys"][head])
        close(kept.values[0, head, mean], official["values"][head])
        assert kept.positions[0, head, ~mean].tolist() == official["positions"][head]


@pytest.mark.parametrize("run", range(len(keepkv.SETTINGS)))
def test_keepkv_stores_what_the_authors_do(run):
    official, (threshold, epsilon) = recorded("keepkv")["runs"][run], keepkv.SETTINGS[run]
    before = PrefillLayer(*keepkv.states(), None, 0, 1, plain(keepkv.HEAD_DIM))
    n_keep = keepkv.HEAVY + keepkv.RECENT
    method = KeepKV(threshold, keepkv.DISTANCE_WEIGHT, keepkv.SINKS, epsilon)
    kept = method.compress(before, Allowance(n_keep, n_keep / keepkv.LENGTH))
    assert kept.sizes is not None
    assert kept.bias is not None
    assert kept.sizes[0].tolist() == official["sizes"]
    close(kept.keys[0], official["keys"])
    close(kept.values[0], official["values"])
    close(kept.bias.exp(), kept.sizes)
    merged = int(kept.sizes.sum()) - n_keep * keepkv.HEADS
    everything = (keepkv.LENGTH - n_keep) * keepkv.HEADS
    assert merged == everything if threshold == -1 else 0 < merged < everything
