"""The rules of the contract: what every cache method must hold to, on tiny random models.

A rule raises `Broken`, saying what was expected and what came. What a method declares about itself
(`alters_prefill`, `simulates`, `allocates`, `allocates_heads`, `acts_on_decode`, `holds`, `stochastic`,
`meets_budget`) decides which form of a rule it gets, and whether it gets it at all.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.budget import Budget
from kvmerge.check import naive
from kvmerge.check.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    layer,
    llama,
    prompt,
    replayed,
    shared,
    twins,
)
from kvmerge.engine import Comparison, Decoder, RowResult, Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.hook import hooked
from kvmerge.method import Allowance, Entries, Method, PrefillLayer
from kvmerge.proof import UnprovenError
from kvmerge.resolve import load_method
from kvmerge.rope import Rope
from kvmerge.session import DEFAULT_POLICY, Policy, Row

KV_HEADS = (HEADS, HEADS // 2)
"""Of the two models that a rule is tried on: one KV head a query head, and one for two."""
TOKENS = 50
"""Of most prompts."""
_NEVER: frozenset[int] = frozenset()
_ANSWER = 8
"""Tokens of most answers."""
_POLICIES = ("append", "hold")
_COMPANIONS = (("streaming_llm", 0.2), ("kvmerger", 0.35), ("h2o", 17))
"""Methods and budgets that a method is put into a batch with."""

Kept: TypeAlias = list[tuple[PrefillLayer, Entries]]
"""A finished layer and what a row keeps of it, by layer."""


class Broken(AssertionError):
    """A rule that a method does not hold to: what was expected, and what came."""


@dataclass(frozen=True)
class Rule:
    """One rule of the contract."""

    says: str
    check: Callable[[Method, int], Sequence[str] | None]
    """Tries a method on the model with so many KV heads. Raises `Broken`; returns what it noticed that
    is allowed, one sentence each."""
    excuse: Callable[[Method], str]
    """Why the rule is not for a method; empty where it is."""
    kv_heads: tuple[int, ...]

    @property
    def name(self) -> str:
        """What the rule is called: the name of its function."""
        return self.check.__name__


RULES: list[Rule] = []
"""All rules, in the order in which they are tried."""


def _rule(
    says: str,
    excuse: Callable[[Method], str] = lambda method: "",
    kv_heads: tuple[int, ...] = KV_HEADS,
) -> Callable[[Callable[[Method, int], Any]], Callable[[Method, int], Any]]:
    def add(check: Callable[[Method, int], Any]) -> Callable[[Method, int], Any]:
        RULES.append(Rule(says, check, excuse, kv_heads))
        return check

    return add


def expect(what: str, found: object, wanted: object) -> None:
    """Raise `Broken` unless what was found is what is wanted."""
    if found != wanted:
        raise Broken(f"{what}: expected {_shown(wanted)}, got {_shown(found)}")


def demand(what: str, holds: object, got: str = "") -> None:
    """Raise `Broken` unless something holds."""
    if not holds:
        raise Broken(f"{what} was expected" + (f", got {got}" if got else ""))


def is_full(method: Method) -> bool:
    """Return whether a method is the full cache, which has no budget but 1."""
    return method == load_method("full")


def _of_compressing(method: Method) -> str:
    return "the full cache compresses nothing" if is_full(method) else ""


# --- what a rule is tried with


def _row(method: Method, budget: float | int, seed: int = 0) -> Row:
    return Row(method, Budget.parse(1 if is_full(method) else budget), seed)


def _full() -> Row:
    return Row(load_method("full"), Budget.parse(1))


def _run(
    model: PreTrainedModel, ids: Tensor, rows: Sequence[Row], tokens: int = _ANSWER, **settings: Any
) -> list[RowResult]:
    results, _ = run_sample(model, ids, rows, Stop(tokens, _NEVER), **settings)
    return list(results)


def _compressed(model: PreTrainedModel, ids: Tensor, row: Row, sample_id: str = "") -> Kept:
    seen: Kept = []

    def observe(_: int, __: int, of_layer: PrefillLayer, kept: Entries) -> None:
        seen.append((of_layer, kept))

    _run(model, ids, [row], 1, sample_id=sample_id, observer=observe)
    return seen


@cache
def full_answer(kv_heads: int, length: int, seed: int = 0, tokens: int = _ANSWER) -> list[int]:
    """Return the greedy answer of transformers itself."""
    generate: Any = shared(kv_heads).generate
    with torch.inference_mode():
        out = generate(
            prompt(length, seed),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            attention_mask=torch.ones(1, length, dtype=torch.long),
        )
    return [int(token) for token in out[0, length:]]


def unchanged_tokens(method: Method) -> int:
    """Return how many tokens of an answer a budget of the whole prompt cannot change.

    A mask that is drawn anew at each step hides something as soon as the answer outgrows the budget:
    the third token is the first that may differ.
    """
    return 2 if method.acts_on_decode else _ANSWER


def _stored_bytes(
    kv_heads: int, row: Row, answer: Sequence[int], policy: Policy = DEFAULT_POLICY
) -> list[int]:
    """Return the bytes of keys and values after the prompt and after each token of an answer is fed."""
    model = shared(kv_heads)
    comparison = Comparison(model, [row], policy=policy)
    sizes = []
    with hooked(model), torch.inference_mode():
        comparison.prefill(prompt(TOKENS), len(answer))
        sizes.append(sum(each.nbytes() for each in comparison.session.layers))
        for step, token in enumerate(answer):
            Decoder([comparison]).feed(torch.tensor([[token]]), step)
            sizes.append(sum(each.nbytes() for each in comparison.session.layers))
    return sizes


def _entry_bytes(kv_heads: int) -> int:
    """Return the bytes of one entry a KV head in all layers, in float32."""
    return LAYERS * kv_heads * 2 * HEAD_DIM * 4


# --- the rules


@_rule("settings are a frozen dataclass, so no state can leak", kv_heads=KV_HEADS[:1])
def settings_are_frozen(method: Method, kv_heads: int) -> None:
    """Hold the class against what `Method` asks of it."""
    parameters = getattr(type(method), "__dataclass_params__", None)
    name = type(method).__name__
    is_own = "__dataclass_params__" in vars(type(method))
    demand(f"{name} as a dataclass", is_own, "a class without @dataclass")
    demand(
        f"@dataclass(frozen=True) on {name}", parameters and parameters.frozen, "one that can change"
    )
    try:
        hash(method)
    except TypeError as error:
        raise Broken(f"settings that can be hashed were expected, got {error}") from error
    twin = type(method)(**{each.name: getattr(method, each.name) for each in _fields(method)})
    expect("the same settings make the same method", twin, method)


def _fields(method: Method) -> Sequence[dataclasses.Field[Any]]:
    assert dataclasses.is_dataclass(method)
    return [each for each in dataclasses.fields(method) if each.init]


@_rule("a budget that holds the whole prompt changes nothing")
def a_full_budget_changes_nothing(method: Method, kv_heads: int) -> None:
    """Hold answers from everything against transformers' own."""
    model, ids = shared(kv_heads), prompt(TOKENS)
    wanted = full_answer(kv_heads, TOKENS)
    for budget in (1, TOKENS, 1000):
        full, own = _run(model, ids, [_full(), _row(method, budget)], reference=0)
        expect("the full cache's answer, beside it", full.token_ids, wanted)
        same = unchanged_tokens(method)
        expect(f"the answer at budget {budget}", own.token_ids[:same], wanted[:same])
        if same == _ANSWER:
            assert own.fidelity is not None
            kl = own.fidelity.kl
            demand(f"no KL to the full cache at budget {budget}", abs(kl) < 1e-6, f"{kl:g} nats")


@_rule("what is kept is what was allowed, in entries and bytes")
def keeps_its_allowance(method: Method, kv_heads: int) -> None:
    """Count what the engine stores, and look at its form."""
    for budget in (0.5, 0.35, 17):
        row = _row(method, budget)
        of_prompt = f"at budget {budget} of {TOKENS} tokens"
        seen = [kept for _, kept in _compressed(shared(kv_heads), prompt(TOKENS), row)]
        for layer_idx, kept in enumerate(seen):
            _check_form(kept, kv_heads, f"layer {layer_idx} {of_prompt}")
        stats = _run(shared(kv_heads), prompt(TOKENS), [row], 1)[0].stats
        n_keep = TOKENS if method.simulates else row.budget.entries(TOKENS)
        if not method.meets_budget:
            counts = [count for of_layer in stats.entries for count in of_layer]
            within = all(1 <= count <= TOKENS for count in counts)
            demand(f"1 to {TOKENS} entries a KV head {of_prompt}", within, _shown(counts))
            continue
        _check_counts(method, stats.entries, kv_heads, n_keep, of_prompt)
        if not method.allocates_heads:  # then shorter heads are padded, and padding is not counted
            of_tensors = sum(kept.keys.nbytes + kept.values.nbytes for kept in seen)
            expect(f"bytes counted {of_prompt}", stats.kv_bytes, of_tensors)
        expect(f"bytes counted {of_prompt}", stats.kv_bytes, n_keep * _entry_bytes(kv_heads))
        for kept, of_layer in zip(seen, stats.entries, strict=True):
            expect(f"entries stored {of_prompt}", kept.keys.shape[2], max(of_layer))


def _check_counts(
    method: Method, counts: Sequence[Sequence[int]], kv_heads: int, n_keep: int, of_prompt: str
) -> None:
    """Hold entries by layer and KV head against the allowance, divided as the method declares."""
    sums = [sum(of_layer) for of_layer in counts]
    if method.allocates or method.allocates_heads:
        if not method.allocates_heads:
            alike = all(len(set(of_layer)) == 1 for of_layer in counts)
            demand(f"as many entries in every KV head of a layer {of_prompt}", alike, _shown(counts))
        if not method.allocates:
            expect(f"entries of each layer {of_prompt}", sums, [kv_heads * n_keep] * LAYERS)
        expect(f"entries of all layers {of_prompt}", sum(sums), LAYERS * kv_heads * n_keep)
    else:
        wanted_all = [[n_keep] * kv_heads] * LAYERS
        expect(f"entries by layer and KV head {of_prompt}", [[*each] for each in counts], wanted_all)


def _check_form(kept: Entries, kv_heads: int, where: str) -> None:
    """Hold shapes, dtypes and finiteness of entries against `Entries`."""
    n = kept.keys.shape[2]
    for name in ("keys", "values"):
        state: Tensor = getattr(kept, name)
        expect(f"shape of {name}, {where}", tuple(state.shape), (1, kv_heads, n, HEAD_DIM))
        expect(f"dtype of {name}, {where}", state.dtype, torch.float32)
        demand(f"finite {name}, {where}", state.isfinite().all(), "NaN or infinity")
    for name in ("positions", "sizes", "bias", "scores"):
        beside: Tensor | None = getattr(kept, name)
        if beside is not None:
            expect(f"shape of {name}, {where}", tuple(beside.shape), (1, kv_heads, n))
            demand(f"{name} without NaN, {where}", not beside.isnan().any(), "NaN")


@_rule("generated tokens are stored beside it, one entry a step")
def appends_one_entry_a_step(method: Method, kv_heads: int) -> None:
    """Count bytes while an answer is fed."""
    row = _row(method, 0.35)
    found = _stored_bytes(kv_heads, row, [5, 6, 7])
    entry = _entry_bytes(kv_heads)
    first = (TOKENS if method.simulates else row.budget.entries(TOKENS)) * entry
    if method.allocates_heads or not method.meets_budget:
        least = first if method.meets_budget else entry
        demand(f"at least {least} bytes after the prompt", found[0] >= least, str(found[0]))
        first = found[0]
    expect("bytes after the prompt and each token", found, [first + t * entry for t in range(4)])


def _of_deciding(method: Method) -> str:
    if is_full(method):
        return _of_compressing(method)
    return (
        "" if method.holds or method.acts_on_decode else "the method has no rule for decode_policy=hold"
    )


@_rule("under decode_policy=hold the cache returns to the budget", _of_deciding)
def holds_the_budget(method: Method, kv_heads: int) -> None:
    """Count bytes while an answer is fed, for as many steps as the method waits."""
    row, entry = _row(method, 0.35), _entry_bytes(kv_heads)
    steps = max(3, method.hold_every)
    found = _stored_bytes(kv_heads, row, [5 + t % 7 for t in range(steps)], Policy("hold"))
    if method.simulates:
        expect("bytes after each step", found, [(TOKENS + t) * entry for t in range(steps + 1)])
        return
    n_keep = row.budget.entries(TOKENS)
    for step in range(0, steps + 1, method.hold_every):
        if method.meets_budget and not method.allocates_heads:
            expect(f"bytes after {step} steps", found[step], n_keep * entry)
    most = max(found[0], n_keep * entry) + method.hold_every * entry
    demand(f"at most {most} bytes after each step", max(found) <= most, str(max(found)))


@_rule("the first token is decided before anything is compressed")
def the_first_token_is_the_full_caches(method: Method, kv_heads: int) -> None:
    """Hold the first logits against those of the full cache."""
    model, ids = shared(kv_heads), prompt(TOKENS)

    def first_logits(row: Row) -> Tensor:
        with hooked(model):
            return Comparison(model, [row]).prefill(ids, 1)

    full, own = first_logits(_full()), first_logits(_row(method, 0.35))
    with torch.inference_mode():
        error = float((full - model(ids).logits[0, -1]).abs().max())
    demand("the full cache's logits as transformers has them", error <= 1e-4, f"{error:g} off")
    change = float((own - full).abs().max())
    if method.alters_prefill:
        demand("other logits, as the method declares alters_prefill", change > 1e-3, "the same")
    else:
        demand("the logits of the full cache", torch.equal(own, full), f"logits {change:g} off")


@_rule("positions ascend within the prompt, none twice")
def positions_ascend(method: Method, kv_heads: int) -> list[str]:
    """Look at the positions of every layer. Returns whether three entries were refused."""
    refused = []
    for budget in (0.35, 0.9, 3):
        try:
            seen = _compressed(shared(kv_heads), prompt(TOKENS), _row(method, budget))
        except UserError as error:
            if isinstance(error, UnprovenError) or budget != 3:
                raise
            refused.append(f"refuses 3 entries of {TOKENS} tokens: {error}")
            continue
        for of_layer, kept in seen:
            where = f"positions of layer {of_layer.layer_idx} at budget {budget}"
            expect(f"dtype of {where}", kept.positions.dtype, torch.int64)
            steps = kept.positions.diff(dim=-1)
            demand(f"ascending {where}", bool((steps > 0).all()), _shown(kept.positions[0, 0].tolist()))
            low, high = int(kept.positions.min()), int(kept.positions.max())
            demand(f"{where} from 0 to {TOKENS - 1}", 0 <= low <= high < TOKENS, f"{low} to {high}")
    return refused


@_rule("a prompt no longer than the budget is kept")
def short_prompts_are_kept(method: Method, kv_heads: int) -> None:
    """Run prompts of 1 to 20 tokens at budgets that hold them."""
    for length, budget in ((1, 0.5), (1, 2), (20, 20), (2, 2), (5, 5)):
        if method.acts_on_decode and length == 1:
            continue  # such a method is asked even where everything fits, and may need a second token
        result = _run(shared(kv_heads), prompt(length), [_row(method, budget)])[0]
        where = f"{length} tokens at budget {budget}"
        found = [[*of_layer] for of_layer in result.stats.entries]
        expect(f"entries of {where}", found, [[length] * kv_heads] * LAYERS)
        same = unchanged_tokens(method)
        wanted = full_answer(kv_heads, length)[:same]
        expect(f"the answer to {where}", result.token_ids[:same], wanted)


@_rule("a prompt little longer than the budget is compressed, or refused", _of_compressing)
def little_longer_prompts_are_compressed(method: Method, kv_heads: int) -> list[str]:
    """Run prompts just above the budget. Returns which were refused."""
    refused = []
    for length, budget, n_keep in ((21, 20, 20), (6, 5, 5), (4, 0.5, 2), (3, 2, 2), (2, 0.5, 1)):
        where = f"{length} tokens at budget {budget}"
        try:
            result = _run(shared(kv_heads), prompt(length), [_row(method, budget)])[0]
        except UnprovenError:
            raise
        except UserError as error:
            refused.append(f"refuses {where}: {error}")
            continue
        expect(f"tokens of the answer to {where}", len(result.token_ids), _ANSWER)
        stored = length if method.simulates else n_keep
        if method.meets_budget:
            found = sum(map(sum, result.stats.entries))
            expect(f"entries of {where}", found, LAYERS * kv_heads * stored)
    return refused


@_rule(
    "query heads of a group that are equal keep what each would",
    lambda method: "the method draws, for each KV head" if method.stochastic else "",
    kv_heads=KV_HEADS[1:],
)
def groups_keep_what_their_heads_would(method: Method, kv_heads: int) -> None:
    """Hold a grouped-query model against the same with its KV heads written out."""
    grouped, full = twins()
    for budget in (0.5, 0.2):
        row, ids = _row(method, budget), prompt(TOKENS)
        pairs = zip(_compressed(grouped, ids, row), _compressed(full, ids, row), strict=True)
        for (of_layer, of_group), (_, of_heads) in pairs:
            where = f"layer {of_layer.layer_idx} at budget {budget}"
            repeated = of_group.positions.repeat_interleave(2, dim=1)
            wanted = _shown(repeated[0].tolist())
            same = torch.equal(repeated, of_heads.positions)
            demand(f"positions {wanted} of {where}", same, _shown(of_heads.positions[0].tolist()))
            for name in ("keys", "values"):
                state = getattr(of_group, name).repeat_interleave(2, dim=1)
                error = float((state - getattr(of_heads, name)).abs().max())
                demand(f"the same {name} of {where}", error <= 1e-4, f"{error:g} off")
        one, other = (_run(model, ids, [row])[0].token_ids for model in (grouped, full))
        expect(f"the answer at budget {budget}", one, other)


@_rule("a sample is answered as if it were the only one")
def samples_leave_nothing_behind(method: Method, kv_heads: int) -> None:
    """Answer a sample before and after others, on one model."""
    model, rows = llama(kv_heads), [_row(method, 0.35)]
    for name in _POLICIES:
        policy = Policy(name)

        def answer(policy: Policy = policy) -> list[int]:
            ids = prompt(TOKENS, seed=2)
            return list(_run(model, ids, rows, sample_id="b", policy=policy)[0].token_ids)

        alone = answer()
        for length in (30, TOKENS, 61):
            _run(model, prompt(length, seed=1), rows, sample_id="a", policy=policy)
        expect(f"the answer after other samples, decode_policy={name}", answer(), alone)


@_rule("in one batch with other cells it answers as alone")
def batches_change_nothing(method: Method, kv_heads: int) -> None:
    """Answer beside the full cache and other methods, and beside the full cache alone."""
    model, ids = shared(kv_heads), prompt(TOKENS)
    own = [_row(method, 0.5), _row(method, 0.35)]
    others = [_row(load_method(name), budget) for name, budget in _COMPANIONS]
    for name in _POLICIES:
        settings: dict[str, Any] = {"sample_id": "s", "reference": 0, "policy": Policy(name)}
        together = _run(model, ids, [_full(), *own, *others], **settings)[1 : 1 + len(own)]
        for row, result in zip(own, together, strict=True):
            alone = _run(model, ids, [_full(), row], **settings)[1]
            where = f"at budget {row.budget} in a batch, decode_policy={name}"
            expect(f"the answer {where}", result.token_ids, alone.token_ids)
            expect(f"the entries {where}", result.stats, alone.stats)
            assert result.fidelity is not None
            assert alone.fidelity is not None
            change = abs(result.fidelity.kl - alone.fidelity.kl)
            demand(f"the same KL to the full cache {where}", change <= 1e-4, f"{change:g} nats more")


@_rule(
    "decoding gives what the engine as one would write it first gives",
    lambda method: (
        "the budget is divided across layers" if method.allocates else _of_compressing(method)
    ),
    kv_heads=KV_HEADS[1:],
)
def decodes_as_the_plain_engine(method: Method, kv_heads: int) -> None:
    """Hold answers against `kvmerge.check.naive`."""
    model, ids, tokens = shared(kv_heads), prompt(TOKENS), 12
    row = _row(method, 0.35)
    for name in _POLICIES:
        policy = Policy(name)
        wanted = naive.greedy(model, ids, row, tokens, "s", policy)
        found = _run(model, ids, [row], tokens, sample_id="s", policy=policy)[0].token_ids
        expect(f"the answer, decode_policy={name}", found, wanted)


@_rule("the finished layer is left as it was", _of_compressing, kv_heads=KV_HEADS[1:])
def layers_are_left_as_they_were(method: Method, kv_heads: int) -> None:
    """Compress a layer: the other cells of a comparison compress the same tensors."""
    for of_layer, _ in _compressed(shared(kv_heads), prompt(TOKENS), _row(method, 0.35)):
        scores = naive.map_column_sums(of_layer.queries, of_layer.keys, of_layer.softmax.scale)
        again = replace(of_layer, scores=scores)
        before = copy.deepcopy(again)
        with torch.inference_mode():  # as the engine calls it
            method.compress(again, Allowance(17, 0.35, torch.Generator().manual_seed(0)))
        for name in ("queries", "keys", "values", "scores"):
            same = torch.equal(getattr(again, name), getattr(before, name))
            demand(f"{name} of the layer as they were", same, "changed ones")


@_rule(
    "attention scores are read only where needs_scores is declared",
    lambda method: "it is declared" if method.needs_scores else _of_compressing(method),
    kv_heads=KV_HEADS[1:],
)
def scores_are_declared(method: Method, kv_heads: int) -> None:
    """Compress a layer without scores: the engine computes them for methods that say so."""
    bare = replace(layer(TOKENS), scores=None, rope=Rope(0.1 ** torch.arange(4)))
    draws = torch.Generator().manual_seed(0) if method.stochastic else None
    method.compress(bare, Allowance(17, 0.35, draws))


@_rule("half precision stays finite")
def half_precision_is_finite(method: Method, kv_heads: int) -> None:
    """Run in float16 and bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        model, ids, row = shared(kv_heads, dtype), prompt(TOKENS), _row(method, 0.35)
        for name in _POLICIES:
            seen: list[Entries] = []
            results = _run(
                model,
                ids,
                [_full(), row],
                reference=0,
                observer=lambda *given, seen=seen: seen.append(given[3]),
                policy=Policy(name),
            )
            for state in (state for kept in seen for state in (kept.keys, kept.values)):
                expect("dtype of keys and values", state.dtype, dtype)
                demand(f"finite keys and values in {dtype}", state.isfinite().all(), "NaN or infinity")
            kl = [result.fidelity.kl for result in results if result.fidelity]
            demand(f"a finite KL in {dtype}", torch.tensor(kl).isfinite().all(), str(kl))
        comparison = Comparison(model, [row])
        with hooked(model), torch.inference_mode():
            logits = comparison.prefill(ids, 8), replayed(comparison, [5, 6, 7, 8])
        finite = all(bool(each.isfinite().all()) for each in logits)
        demand(f"finite logits in {dtype}", finite, "NaN or infinity")


@_rule("keys that are not finite are refused by name")
def broken_keys_are_refused(method: Method, kv_heads: int) -> None:
    """Run a model with a NaN in its weights."""
    model = llama(kv_heads)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[HEAD_DIM : 2 * HEAD_DIM] = torch.nan
    wanted = "keys of layer 1, KV head 1 are not finite"
    try:
        _run(model, prompt(20), [_row(method, 0.5)])
    except UserError as error:
        demand(f"the error {wanted!r}", wanted in str(error), str(error))
    else:
        raise Broken(f"the error {wanted!r} was expected, got an answer")


@_rule("draws depend on seed and sample alone", _of_compressing)
def draws_are_seeded(method: Method, kv_heads: int) -> None:
    """Compress twice with a seed, and with another seed and sample."""
    model, ids = shared(kv_heads), prompt(80)

    def kept(seed: int, sample_id: str = "s") -> Kept:
        return _compressed(model, ids, _row(method, 0.5, seed), sample_id)

    first = kept(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # the global generator has no say
        demand("the same entries again, with the same seed", _same(first, kept(1)), "others")
    others = {"seed": kept(2), "sample": kept(1, "other sample")}
    for name, other in others.items():
        if not method.stochastic:
            demand(f"the same entries with another {name}", _same(first, other), "others")
        elif not method.simulates:  # what is hidden may be drawn only while decoding
            differs = any(
                not torch.equal(left.values, right.values)
                for (_, left), (_, right) in zip(first, other, strict=True)
            )
            demand(f"other entries with another {name}, as it is stochastic", differs, "the same")


def _same(one: Kept, other: Kept) -> bool:
    return all(
        torch.equal(getattr(left, name), getattr(right, name))
        for (_, left), (_, right) in zip(one, other, strict=True)
        for name in ("positions", "keys", "values")
    )


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
