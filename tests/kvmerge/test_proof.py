"""What is proven of every answer raises no false alarm, and says what was read.

The faults that it finds are planted in `tests/harness/test_no_silent_no_op.py`.
"""

from __future__ import annotations

import pytest
import torch

from baselines import ada_snapkv
from kvmerge.cells import make_cell
from kvmerge.engine import Request, Stop, run_sample, run_samples, score_continuations
from kvmerge.proof import UnprovenError
from kvmerge.session import Policy, Row
from tests.tiny import any_model, new_model, prompt, shared_model

ANSWER = Stop(6, frozenset())
VARIANTS = (
    *(
        ("kvmerger", {"budget_mode": "eps_free", "epsilon": epsilon})
        for epsilon in (-1.0, 0.3, 0.9, 1.0)
    ),
    *(("kvmerger", {"budget_mode": "eps_evict", "epsilon": epsilon}) for epsilon in (-1.0, 0.3, 0.95)),
    ("kvmerger", {"budget_mode": "eps_evict", "epsilon": 0.2, "underfill": "keep"}),
    ("kvmerger", {"merge_every": 3}),
    ("kvmerger", {"linkage": "adjacent", "pivot": "random", "rope": "pre"}),
    ("kvmerger_log", {"linkage": "complete", "merge_every": 2}),
    ("kvmerger_log", {"budget_mode": "eps_free", "epsilon": 0.3}),
    ("meanpool_chunks", {"attn_bias": "log_size"}),
    ("pyramidkv", {"exact": False, "window": 2, "beta": 3}),
    ("ada_snapkv", {}),
    ("ada_snapkv", {"window": 3, "floor": 0.0, "exact": False}),
    ("d2o", {"alloc": "variance"}),
    ("d2o", {"alloc": "variance", "bug_compat": True}),
    ("cam_hh", {"bug_compat": True}),
    ("cam", {"start": 1, "score": "banded"}),
    ("h2o", {"recent": 1, "score_dtype": "model"}),
    ("h2o_sim_decode", {"recent": 0}),
    ("h2o_sim_prefill", {"leak": "local"}),
    ("snapkv", {"window": 3}),
    ("random", {"recent": 0.0}),
    ("tova", {}),
    ("streaming_llm", {"sinks": 0}),
)
POLICIES = {
    "append": Policy(),
    "hold": Policy("hold"),
    "rolled": Policy(pos="rolled"),
    "hold rolled": Policy("hold", pos="rolled"),
    "skip": Policy(layers_skip=(0,)),
    "skip plain": Policy("hold", layers_skip=(-1,), skip_budget="plain"),
}


def row(name, options, budget, seed=1):
    cell = make_cell(name, options, budget)
    return Row(cell.method, cell.budget, seed, cell=cell.name)


def taken(each, policy):
    """Whether a row may run under a policy at all."""
    if policy.layers_skip and (each.method.allocates or each.budget.value not in (0.9, 0.6)):
        return False
    eps_free = getattr(each.method, "budget_mode", "") == "eps_free"
    ragged = eps_free or each.method.allocates_heads
    return not (policy.rolled and ragged)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [1, 0.9, 0.6, 0.25, 39, 40, 400])
def test_no_method_raises_a_false_alarm(policy, budget):
    """Every variant that keeps another number of entries, or hides, biases, divides or rounds them."""
    model, switches = shared_model(), POLICIES[policy]
    rows = [row(*variant, budget) for variant in VARIANTS]
    rows = [row("full", {}, 1), *(each for each in rows if taken(each, switches))]
    results, _ = run_sample(
        model, prompt(40), rows, ANSWER, sample_id="s", reference=0, policy=switches
    )
    for each, result in zip(rows, results, strict=True):
        if each.method.simulates and not switches.layers_skip:
            assert max(map(max, result.stats.read)) <= each.budget.entries(40)
        elif not each.method.simulates:
            assert result.stats.read == result.stats.entries


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("budget", [0.5, 0.9])
def test_rounding_hides_no_compression(dtype, budget):
    rows = [row("full", {}, 1)]
    rows += [row(name, {}, budget) for name in ("h2o", "kvmerger", "kvmerger_log", "cam", "snapkv")]
    run_sample(shared_model(dtype=dtype), prompt(60), rows, ANSWER, reference=0)


def test_layers_with_a_window_of_their_own_are_proven_beside_the_others():
    model = any_model("gemma2")
    rows = [row("full", {}, 1), row("h2o", {}, 0.5), row("kvmerger", {}, 0.5)]
    results, _ = run_sample(model, prompt(40), rows, Stop(20, frozenset()), reference=0)
    assert [result.stats.read for result in results[1:]] == [[[20, 20]]] * 2


def test_rows_that_end_early_and_texts_of_other_lengths_are_proven():
    model = new_model()
    requests = [
        Request(prompt(length, length), [row("full", {}, 1), row("h2o", {}, 0.5)], str(length), 0)
        for length in (30, 41)
    ]
    first = run_samples(model, requests, ANSWER)[0][0][1].token_ids
    ended = run_samples(model, requests, Stop(6, frozenset(first[2:3])))
    assert {tuple(map(tuple, rows[1].stats.read)) for rows, _ in ended} == {
        ((15, 15),) * 2,
        ((20, 20),) * 2,
    }
    scored = score_continuations(model, requests, [[5, 6, 7], list(range(5, 20))])
    assert scored[0][0][1].stats.read == [[15, 15]] * 2


def test_nothing_is_read_for_an_answer_of_one_token():
    rows = [row("full", {}, 1), row("h2o", {}, 0.5)]
    results, _ = run_sample(shared_model(), prompt(40), rows, Stop(1, frozenset()), reference=0)
    assert [result.stats.read for result in results] == [None, None]


def test_a_product_that_rounds_by_place_in_the_batch_is_no_fault():
    """Rows of one batch may differ in their last bits; each alone, they do not."""
    model = new_model()

    def by_place(module, inputs, logits):
        return logits + 1e-6 * torch.arange(len(logits)).view(-1, 1, 1)

    model.lm_head.register_forward_hook(by_place)
    rows = [row("full", {}, 1), row("h2o", {}, 1), row("h2o", {}, 0.5)]
    results, _ = run_sample(model, prompt(40), rows, ANSWER, reference=0)
    assert results[1].token_ids == results[0].token_ids


def test_heads_that_divide_a_budget_may_not_exceed_it_together(monkeypatch):
    rows = [row("full", {}, 1), row("ada_snapkv", {"window": 3}, 0.5)]
    results, _ = run_sample(shared_model(), prompt(40), rows, ANSWER, reference=0)
    assert [sum(of_layer) for of_layer in results[1].stats.read] == [40, 40]
    right = ada_snapkv.head_counts
    monkeypatch.setattr(ada_snapkv, "head_counts", lambda *given, **named: right(*given, **named) + 1)
    message = r"layer 0: .* 21\.0 entries .* on the mean over KV heads, where 20 were asked for"
    with pytest.raises(UnprovenError, match=message):
        run_sample(shared_model(), prompt(40), rows, ANSWER, reference=0)
