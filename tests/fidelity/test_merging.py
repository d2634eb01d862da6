"""LOOK-M, ZSMerge, KeepKV and adjacent merging against the recorded results of their authors' code."""

from __future__ import annotations

import pytest
import torch

from baselines.adjacent_merge_ours import (
    AdjacentMerge,
    cheapest,
    key_importance,
    merge_neighbours,
    pair_costs,
    received,
)
from baselines.keepkv import KeepKV
from baselines.look_m import LookM
from baselines.zsmerge import ZSMerge, faded_sums
from kvmerge import merging
from kvmerge.budget import Budget
from kvmerge.method import Allowance, PrefillLayer
from kvmerge.session import Policy, Row
from kvmerge.softmax import plain
from tests.fidelity.official import asymkv, keepkv, kvslimmer, look_m, zsmerge
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


# --- Adjacent merging: of a prompt whose window is the authors' last chunk


def kvslimmer_layer() -> PrefillLayer:
    queries, keys, values = kvslimmer.states()
    turned = (kvslimmer.turned(queries), kvslimmer.turned(keys), values)
    return PrefillLayer(*turned, None, 0, 1, plain(kvslimmer.HEAD_DIM), kvslimmer.rope())


def late_of(n_pairs: int) -> float:
    """What their `exp(place / gamma)` comes to at the last pair."""
    return 512 ** (n_pairs / 4096)


MIDDLE = slice(kvslimmer.SINKS, kvslimmer.LENGTH - kvslimmer.WINDOW)
LATE = late_of(MIDDLE.stop - MIDDLE.start - 1)


def test_importance_is_kvslimmers():
    layer, window = kvslimmer_layer(), torch.arange(MIDDLE.stop, kvslimmer.LENGTH)
    mass = received(layer, window)[..., MIDDLE]
    importance = key_importance(mass, layer.values[:, :, MIDDLE])
    close(importance[0], recorded("kvslimmer")["importance"], 1e-6)


@pytest.mark.parametrize("run", range(len(kvslimmer.MERGED)))
def test_adjacent_merging_stores_what_kvslimmer_does(run):
    official, layer = recorded("kvslimmer")["runs"][2 * run], kvslimmer_layer()
    n_keep = kvslimmer.LENGTH - kvslimmer.MERGED[run]
    method = AdjacentMerge(kvslimmer.SINKS, kvslimmer.WINDOW, kvslimmer.WINDOW, LATE)
    kept = method.compress(layer, Allowance(n_keep, n_keep / kvslimmer.LENGTH))
    assert kept.sizes is not None
    assert kept.bias is not None
    for head in range(kvslimmer.KV_HEADS):
        assert kept.sizes[0, head].tolist() == official["sizes"] + [1] * kvslimmer.WINDOW
    assert torch.equal(kept.positions, kept.sizes.cumsum(dim=-1) - 1)  # to where theirs turns keys
    two = kept.sizes[0, 0] == 2
    before = kvslimmer.rope().rotate(kept.keys, -kept.positions)
    close(before[0, :, two], official["keys"], 1e-5)
    # theirs stores sums, and divides by the sum of exp(logit) times the size
    close(2 * kept.values[0, :, two], official["values"], 1e-6)
    close(kept.bias.exp(), kept.sizes)


@pytest.mark.parametrize("run", range(len(kvslimmer.MERGED)))
def test_keys_weigh_as_in_kvslimmer_whatever_the_importance(run):
    official = recorded("kvslimmer")["runs"][2 * run + 1]
    _, keys, _ = kvslimmer.states()
    mass = received(kvslimmer_layer(), torch.arange(MIDDLE.stop, kvslimmer.LENGTH))[..., MIDDLE]
    importance = kvslimmer.other_importance()[..., MIDDLE]
    n_keep = mass.shape[-1] - kvslimmer.MERGED[run]
    entry, share = merge_neighbours(mass, importance, n_keep, late=LATE)
    merged = merging.weighted_sum(keys[:, :, MIDDLE], entry, share)
    two = merging.sum_over_sets(entry, torch.ones_like(entry))[0, 0] == 2
    close(merged[0, :, two], official["keys"], 1e-5)


@pytest.mark.parametrize("run", range(len(asymkv.MERGED)))
def test_the_pairs_are_asymkvs_where_entries_stand_for_several_tokens(run):
    sizes = asymkv.sizes()
    by_head = asymkv.attention().sum(dim=2).unflatten(1, (asymkv.KV_HEADS, -1))
    costs = pair_costs(by_head.mean(dim=2) * sizes, sizes, late_of(asymkv.LENGTH - 1))
    pairs = cheapest(costs, torch.tensor(asymkv.MERGED[run]))
    assert pairs[0, 0].nonzero()[:, 0].tolist() == recorded("asymkv")["pairs"][run]
