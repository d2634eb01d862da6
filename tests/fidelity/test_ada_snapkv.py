"""Ada-SnapKV against the recorded results of its authors' code."""

from __future__ import annotations

import pytest

from baselines.ada_snapkv import AdaSnapKV
from kvmerge.method import Allowance, PrefillLayer
from kvmerge.softmax import plain
from tests.fidelity.official import ada_snapkv as official
from tests.fidelity.vectors import close, recorded

RUNS = recorded("ada_snapkv")["runs"]


@pytest.mark.parametrize("run", RUNS, ids=[f"{run['floor']}-{run['pooling']}" for run in RUNS])
def test_heads_divide_the_budget_as_the_authors_do(run):
    before = PrefillLayer(*official.states(), None, 0, 1, plain(official.HEAD_DIM))
    method = AdaSnapKV(
        official.WINDOW, official.KERNEL, run["pooling"], floor=run["floor"], exact=False
    )
    close(method.pooled(before, official.WINDOW)[0] / official.WINDOW, run["scores"], 1e-6)
    kept = method.compress(before, Allowance(official.CAPACITY, 0.3))
    assert kept.sizes is not None
    past = official.LENGTH - official.WINDOW
    for head, theirs in enumerate(run["positions"]):
        ours = kept.positions[0, head][kept.sizes[0, head] > 0].tolist()
        if run["pooling"] == "avg":
            assert ours == theirs
            continue
        # the order of the ties that max pooling makes is left open there
        assert len(ours) == len(theirs)
        score = run["scores"][head]
        least = min(score[token] for token in theirs if token < past)
        assert {score[token] for token in set(ours) ^ set(theirs)} <= {least}


def test_the_exact_counts_differ_from_the_authors_by_rounding_alone():
    before = PrefillLayer(*official.states(), None, 0, 1, plain(official.HEAD_DIM))
    for run in RUNS:
        kept = AdaSnapKV(official.WINDOW, official.KERNEL, run["pooling"], floor=run["floor"]).compress(
            before, Allowance(official.CAPACITY, 0.3)
        )
        assert kept.sizes is not None
        counts = kept.sizes[0].sum(-1).tolist()
        assert sum(counts) == official.KV_HEADS * official.CAPACITY
        assert len(set(counts)) > 1
        theirs = [len(each) for each in run["positions"]]
        assert max(abs(one - other) for one, other in zip(counts, theirs, strict=True)) <= 1
