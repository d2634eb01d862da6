"""What every cache method must hold to: each file of `method/`, by the rules of `kvmerge.check`.

A new method is tested by adding its file. What only the project's own methods promise stands here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from kvmerge.budget import Budget
from kvmerge.check import RULES, Rule
from kvmerge.check.rules import KV_HEADS
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Entries, Method, PrefillLayer
from kvmerge.places import choices
from kvmerge.resolve import load_method
from kvmerge.session import Policy, Row
from tests.tiny import prompt, shared_model

METHODS = choices("method")
COMPRESSING = [name for name in METHODS if name != "full"]
MERGING = [
    name for name in METHODS if name.startswith(("cam", "kvmerger", "meanpool")) or name == "pivot_only"
]
"""Methods that protect one entry and merge into another: they need two."""
MERGES_EVERY = {"holds_the_budget": 1, "decodes_as_the_plain_engine": 3}
"""Decode steps between KVMerger's merges, so that it merges within a short answer."""
REFUSING = "little_longer_prompts_are_compressed"

models = pytest.mark.parametrize("kv_heads", KV_HEADS, ids=["mha", "gqa"])


def subject(rule: Rule, name: str) -> Method:
    """A method in the form that a rule can say most about."""
    method = load_method(name)
    if isinstance(method, KVMerger) and rule.name in MERGES_EVERY:
        return replace(method, merge_every=MERGES_EVERY[rule.name])
    if rule.name == "groups_keep_what_their_heads_would" and method.stochastic:
        # without its draws, which are made for each KV head
        return replace(method, sample="expected") if hasattr(method, "sample") else method
    return method


def cases() -> Iterator[object]:
    for rule in RULES:
        for name in METHODS:
            if not rule.excuse(subject(rule, name)):
                for kv_heads in rule.kv_heads:
                    yield pytest.param(rule, name, kv_heads, id=f"{rule.name}-{name}-{kv_heads}")


@pytest.mark.parametrize(("rule", "name", "kv_heads"), cases())
def test_a_method_holds_to_the_rule(rule: Rule, name: str, kv_heads: int) -> None:
    noticed = rule.check(subject(rule, name), kv_heads) or []
    if rule.name == REFUSING and name in MERGING:
        (refused,) = noticed
        assert re.match(r"refuses 2 tokens at budget 0.5: .*at least .* of 2 prompt tokens", refused)
    else:
        assert list(noticed) == []


def test_rules_are_for_all_methods_but_those_that_they_say_nothing_of() -> None:
    excused = {rule.name: {n for n in METHODS if rule.excuse(subject(rule, n))} for rule in RULES}
    loaded = {name: load_method(name) for name in METHODS}
    of_compressing = {
        "holds_the_budget": {n for n, m in loaded.items() if not (m.holds or m.acts_on_decode)},
        "decodes_as_the_plain_engine": {n for n, m in loaded.items() if m.allocates},
        "scores_are_declared": {n for n, m in loaded.items() if m.needs_scores},
        **{key: set() for key in (REFUSING, "layers_are_left_as_they_were", "draws_are_seeded")},
    }
    wanted = {name: others | {"full"} for name, others in of_compressing.items()}
    wanted["groups_keep_what_their_heads_would"] = {
        n for n, m in loaded.items() if m.stochastic and not hasattr(m, "sample")
    }
    assert {name: names for name, names in excused.items() if names} == wanted


@models
@pytest.mark.parametrize("policy", ["append", "hold"])
def test_all_methods_in_one_batch_answer_as_alone(kv_heads: int, policy: str) -> None:
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(50)
    rows = [Row(load_method("full"), Budget.parse(1))]
    rows += [Row(load_method(n), Budget.parse(b)) for n in COMPRESSING for b in (0.5, 0.35)]

    def answered(chosen: list[Row]):
        settings = {"sample_id": "s", "reference": 0, "policy": Policy(policy)}
        return run_sample(model, input_ids, chosen, Stop(8, frozenset()), **settings)[0]

    for each, result in zip(rows, answered(rows), strict=True):
        alone = answered([rows[0], each])[1]
        assert result.token_ids == alone.token_ids
        assert result.stats == alone.stats
        assert result.fidelity.kl == pytest.approx(alone.fidelity.kl, abs=1e-4)


BUDGETS = (0.5, 0.35, 0.2, 0.1, 0.05)


@pytest.mark.parametrize("name", COMPRESSING)
def test_every_budget_is_met_or_refused_for_want_of_a_second_entry(name: str) -> None:
    """Of short prompts too: 9 tokens at 5% are one entry, which merging methods cannot do with."""
    method = load_method(name)
    for length, budget in product((9, 60), BUDGETS):
        row = Row(method, Budget.parse(budget))
        entries = row.budget.entries(length)
        if name in MERGING and entries < 2:
            with pytest.raises(UserError, match=r"at least .* of 9 prompt tokens"):
                run_sample(shared_model(), prompt(length), [row], Stop(1, frozenset()))
            continue
        (result,) = run_sample(shared_model(), prompt(length), [row], Stop(1, frozenset()))[0]
        stored = length if method.simulates else entries
        assert not method.meets_budget or result.stats.kept_entries == stored, (length, budget)


# protected tokens survive


KVMERGER_ENDS = (0, 4)
ENDS = {
    "ada_snapkv": (0, 10),
    "adjacent_merge_ours": (5, 10),
    "h2o": (0, 10),
    "cam": (11, 10),
    "cam_generate": (11, 10),
    "chunkkv": (0, 10),
    "d2o": (4, 10),
    "expected_attention": (4, 0),
    "kvmerger": KVMERGER_ENDS,
    "kvmerger_log": KVMERGER_ENDS,
    "kvmerger_sized": KVMERGER_ENDS,
    "keepkv": (4, 10),
    "lagkv": (4, 17),
    "look_m": (4, 10),
    "meanpool_sets": KVMERGER_ENDS,
    "meanpool_chunks": KVMERGER_ENDS,
    "pivot_only": KVMERGER_ENDS,
    "pyramidkv": (0, 8),
    "random": KVMERGER_ENDS,
    "random_all": (0, 1),
    "snapkv": (0, 10),
    "streaming_llm": (4, 17),
    "zsmerge": (0, 8),
}
"""First and last tokens that a method keeps of 60 at 35%, that is of 21 entries: half of the budget is
10 recent tokens for most, and KVMerger's .08 of the prompt are 4."""


@models
@pytest.mark.parametrize("name", ENDS)
def test_protected_tokens_survive(name, kv_heads):
    first, last = ENDS[name]
    # some add to the values of the tokens that they keep, or to their keys as well: the place is kept
    merged = {"cam": ["keys"], "cam_generate": ["keys"], "d2o": [], "keepkv": [], "look_m": []}
    states = merged.get(name, ["keys", "values"])
    protected = [*range(first), *range(60 - last, 60)]
    seen: list[tuple[PrefillLayer, Entries]] = []
    run_sample(
        shared_model(kv_heads=kv_heads),
        prompt(60),
        [Row(load_method(name), Budget.parse(0.35))],
        Stop(1, frozenset()),
        observer=lambda _, __, layer, kept: seen.append((layer, kept)),
    )
    for layer_, kept in seen:
        for head in range(kv_heads):
            positions = kept.positions[0, head].tolist()
            assert set(protected) <= set(positions)
            slots = [positions.index(token) for token in protected]
            for state in states:
                found = getattr(kept, state)[0, head, slots]
                assert torch.equal(found, getattr(layer_, state)[0, head, protected])
