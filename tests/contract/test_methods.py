"""What every cache method must hold to: each file in configs/method, on tiny random models.

A new method is tested by adding its file. What a method declares about itself (`alters_prefill`,
`simulates`, `allocates`, `allocates_heads`, `acts_on_decode`, `holds`, `stochastic`) decides which form
of a rule it gets.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

from kvmerge.budget import Budget
from kvmerge.engine import Comparison, Decoder, Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.hook import hooked
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance, Method
from kvmerge.places import choices
from kvmerge.resolve import load_method
from kvmerge.rope import Rope
from kvmerge.session import DEFAULT_POLICY, Policy, Row
from tests.kvmerge import naive_engine
from tests.tiny import HEAD_DIM, LAYERS, layer, new_model, prompt, replayed, shared_model

METHODS = choices("method")
COMPRESSING = [name for name in METHODS if name != "full"]
HOLDING = [name for name in COMPRESSING if load_method(name).holds or load_method(name).acts_on_decode]
MODELS = {"mha": 4, "gqa": 2}
NEVER: frozenset[int] = frozenset()
ANSWER = Stop(8, NEVER)

models = pytest.mark.parametrize("kv_heads", MODELS.values(), ids=MODELS)


def method(name: str, **settings: object) -> Method:
    return load_method(name, settings)


def row(name: str, budget: float | int, seed: int = 0) -> Row:
    # the full cache keeps everything, and no other budget is its own
    return Row(method(name), Budget.parse(1 if name == "full" else budget), seed)


def run(model, input_ids, rows, stop=ANSWER, **settings):
    results, _ = run_sample(model, input_ids, rows, stop, **settings)
    return results


def compressed_layers(model, input_ids, each, sample_id=""):
    """`(layer, entries)` of each layer as one row compresses it."""
    seen = []
    run(
        model,
        input_ids,
        [each],
        Stop(1, NEVER),
        sample_id=sample_id,
        observer=lambda _, __, layer_, kept: seen.append((layer_, kept)),
    )
    return seen


def same_entries(one, other):
    for (_, left), (_, right) in zip(one, other, strict=True):
        assert torch.equal(left.positions, right.positions)
        assert torch.equal(left.keys, right.keys)
        assert torch.equal(left.values, right.values)


@cache
def full_answer(kv_heads, length, seed=0, tokens=8):
    """The greedy answer of transformers itself."""
    with torch.inference_mode():
        out = shared_model(kv_heads=kv_heads).generate(
            prompt(length, seed),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            attention_mask=torch.ones(1, length, dtype=torch.long),
        )
    return out[0, length:].tolist()


@pytest.fixture(autouse=True, scope="module")
def no_end_token():
    """Answers of a fixed length: generation does not suppress an end token it does not have."""
    for kv_heads in MODELS.values():
        shared_model(kv_heads=kv_heads).generation_config.eos_token_id = None
    yield
    for kv_heads in MODELS.values():
        shared_model(kv_heads=kv_heads).generation_config.eos_token_id = 2


# --- 1. a budget that holds everything changes nothing


@models
@pytest.mark.parametrize("budget", [1, 50, 1000])
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_that_holds_everything_gives_the_full_caches_answer(name, budget, kv_heads):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(50)
    results = run(model, input_ids, [row("full", 1), row(name, budget)], reference=0)
    assert results[0].token_ids == full_answer(kv_heads, 50)
    same = unchanged_tokens(name)
    assert results[1].token_ids[:same] == results[0].token_ids[:same]
    if same == 8:
        assert results[1].fidelity.kl == pytest.approx(0, abs=1e-6)


def unchanged_tokens(name):
    """Tokens of an answer of 8 that a budget of the whole prompt cannot change.

    A mask that is drawn anew at each step hides something as soon as the answer outgrows the budget:
    the third token is the first that may differ.
    """
    return 2 if method(name).acts_on_decode else 8


# --- 2. what is kept is what was allowed


@models
@pytest.mark.parametrize("budget", [0.5, 0.35, 17])
@pytest.mark.parametrize("name", METHODS)
def test_entries_and_bytes_after_prefill(name, budget, kv_heads):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(50)
    each = row(name, budget)
    stats = run(model, input_ids, [each], Stop(1, NEVER))[0].stats
    n_keep = each.budget.entries(50)
    if each.method.simulates:
        n_keep = 50
    if each.method.allocates:
        assert all(len(set(of_layer)) == 1 for of_layer in stats.entries)
        assert sum(of_layer[0] for of_layer in stats.entries) == LAYERS * n_keep
    elif each.method.allocates_heads:
        assert [sum(of_layer) for of_layer in stats.entries] == [kv_heads * n_keep] * LAYERS
    else:
        assert stats.entries == [[n_keep] * kv_heads] * LAYERS
    kept = [entries for _, entries in compressed_layers(model, input_ids, each)]
    if not each.method.allocates_heads:  # then shorter heads are padded, and padding is not counted
        assert stats.kv_bytes == sum(entries.keys.nbytes + entries.values.nbytes for entries in kept)
    assert stats.kv_bytes == LAYERS * kv_heads * n_keep * 2 * HEAD_DIM * 4
    for entries, of_layer in zip(kept, stats.entries, strict=True):
        shape = (1, kv_heads, max(of_layer))
        assert entries.keys.shape == entries.values.shape == (*shape, HEAD_DIM)
        assert entries.positions.shape == shape
        for beside in (entries.sizes, entries.bias, entries.scores):
            assert beside is None or beside.shape == shape


def stored_bytes(model, input_ids, each, answer, policy=DEFAULT_POLICY):
    """Bytes of keys and values after each token of an answer is fed."""
    comparison = Comparison(model, [each], policy=policy)
    sizes = []
    with hooked(model), torch.inference_mode():
        comparison.prefill(input_ids, len(answer))
        sizes.append(sum(cache.nbytes() for cache in comparison.session.layers))
        for step, token in enumerate(answer):
            Decoder([comparison]).feed(torch.tensor([[token]]), step)
            sizes.append(sum(cache.nbytes() for cache in comparison.session.layers))
    return sizes


@models
@pytest.mark.parametrize("name", METHODS)
def test_append_stores_one_entry_a_step(name, kv_heads):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(50)
    each = row(name, 0.35)
    n_keep = 50 if each.method.simulates else each.budget.entries(50)
    found = stored_bytes(model, input_ids, each, [5, 6, 7])
    entry = LAYERS * kv_heads * 2 * HEAD_DIM * 4
    if each.method.allocates_heads:
        assert found[0] >= n_keep * entry
        assert found == [found[0] + t * entry for t in range(4)]
    else:
        assert found == [(n_keep + t) * entry for t in range(4)]


@models
@pytest.mark.parametrize("name", HOLDING)
def test_hold_returns_to_the_budget_after_each_step(name, kv_heads):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(50)
    each = row(name, 0.35)
    if isinstance(each.method, KVMerger):
        each = replace(each, method=replace(each.method, merge_every=1))
    found = stored_bytes(model, input_ids, each, [5, 6, 7], Policy("hold"))
    entry = LAYERS * kv_heads * 2 * HEAD_DIM * 4
    if each.method.simulates:
        assert found == [(50 + t) * entry for t in range(4)]
    else:
        assert found == [17 * entry] * 4


# --- 3. the first token is decided before anything is compressed


@models
@pytest.mark.parametrize("name", METHODS)
def test_the_first_tokens_logits_are_those_of_the_full_cache(name, kv_heads):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(50)

    def first_logits(each):
        with hooked(model):
            return Comparison(model, [each]).prefill(input_ids, 1)

    full = first_logits(row("full", 1))
    with torch.inference_mode():
        torch.testing.assert_close(full, model(input_ids).logits[0, -1], atol=1e-4, rtol=0)
    own = first_logits(row(name, 0.35))
    if method(name).alters_prefill:
        assert not torch.allclose(own, full, atol=1e-3)
    else:
        assert torch.equal(own, full)


# --- 4. positions


@models
@pytest.mark.parametrize("budget", [0.35, 3, 0.9])
@pytest.mark.parametrize("name", METHODS)
def test_positions_ascend_within_the_prompt(name, budget, kv_heads):
    for _, kept in compressed_layers(shared_model(kv_heads=kv_heads), prompt(50), row(name, budget)):
        assert kept.positions.dtype == torch.int64
        assert (kept.positions.diff(dim=-1) > 0).all()
        assert kept.positions.min() >= 0
        assert kept.positions.max() < 50


# --- 5. short prompts


@models
@pytest.mark.parametrize(("length", "budget"), [(1, 0.5), (1, 2), (20, 20), (2, 2), (5, 5)])
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_no_longer_than_the_budget_is_kept(name, length, budget, kv_heads):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(length)
    each = row(name, budget)
    if method(name).acts_on_decode and length == 1:
        return  # such a method is asked even where everything fits, and may need a second token
    result = run(model, input_ids, [each])[0]
    assert result.stats.entries == [[length] * kv_heads] * LAYERS
    same = unchanged_tokens(name)
    assert result.token_ids[:same] == full_answer(kv_heads, length)[:same]


@models
@pytest.mark.parametrize(
    ("length", "budget", "n_keep"), [(21, 20, 20), (3, 2, 2), (4, 0.5, 2), (6, 5, 5)]
)
@pytest.mark.parametrize("name", COMPRESSING)
def test_a_prompt_little_longer_than_the_budget(name, length, budget, n_keep, kv_heads):
    each = row(name, budget)
    result = run(shared_model(kv_heads=kv_heads), prompt(length), [each])[0]
    assert len(result.token_ids) == 8
    stored = length if each.method.simulates else n_keep
    assert sum(map(sum, result.stats.entries)) == LAYERS * kv_heads * stored


MERGING = [
    name for name in METHODS if name.startswith(("cam", "kvmerger", "meanpool")) or name == "pivot_only"
]
"""Methods that protect one entry and merge into another: they need two."""


@pytest.mark.parametrize("name", METHODS)
def test_half_of_two_tokens_is_one_entry_or_refused(name):
    """T=2 at 50%."""
    each, model = row(name, 0.5), shared_model()
    if name in MERGING:
        with pytest.raises(UserError, match=r"at least .* of 2 prompt tokens"):
            run(model, prompt(2), [each])
    else:
        assert len(run(model, prompt(2), [each])[0].token_ids) == 8


# --- 6. grouped queries


def undrawn(name: str) -> Method | None:
    """A method without its draws, which are made for each KV head; None where it is nothing else."""
    each = method(name)
    if not each.stochastic:
        return each
    return replace(each, sample="expected") if hasattr(each, "sample") else None


@cache
def twin_models():
    """A grouped-query model whose query heads of a group are equal, and the same with all heads."""
    grouped, full = new_model(kv_heads=2), new_model(kv_heads=4)
    full.load_state_dict(
        {k: v for k, v in grouped.state_dict().items() if "k_proj" not in k and "v_proj" not in k},
        strict=False,
    )
    with torch.no_grad():
        for of_grouped, of_full in zip(grouped.model.layers, full.model.layers, strict=True):
            query = of_grouped.self_attn.q_proj.weight.unflatten(0, (2, 2, HEAD_DIM))
            query[:, 1] = query[:, 0]
            of_full.self_attn.q_proj.weight.copy_(of_grouped.self_attn.q_proj.weight)
            for name in ("k_proj", "v_proj"):
                shared = getattr(of_grouped.self_attn, name).weight.unflatten(0, (2, HEAD_DIM))
                repeated = shared.repeat_interleave(2, dim=0).flatten(0, 1)
                getattr(of_full.self_attn, name).weight.copy_(repeated)
    return grouped, full


@pytest.mark.parametrize("budget", [0.5, 0.2])
@pytest.mark.parametrize("name", [name for name in METHODS if undrawn(name) is not None])
def test_duplicated_kv_heads_keep_what_a_group_keeps(name, budget):
    each = replace(row(name, budget), method=undrawn(name))
    grouped, full = twin_models()
    input_ids = prompt(50)
    shared = compressed_layers(grouped, input_ids, each)
    repeated = compressed_layers(full, input_ids, each)
    for (_, of_group), (_, of_heads) in zip(shared, repeated, strict=True):
        assert torch.equal(of_group.positions.repeat_interleave(2, dim=1), of_heads.positions)
        for state in ("keys", "values"):
            torch.testing.assert_close(
                getattr(of_group, state).repeat_interleave(2, dim=1),
                getattr(of_heads, state),
                atol=1e-4,
                rtol=0,
            )
    one, other = (run(model, input_ids, [each])[0].token_ids for model in (grouped, full))
    assert one == other


# --- 7. nothing leaks from sample to sample, or from row to row


@models
@pytest.mark.parametrize("policy", ["append", "hold"])
@pytest.mark.parametrize("name", METHODS)
def test_a_sample_is_answered_as_if_it_were_the_only_one(name, policy, kv_heads):
    model = new_model(kv_heads=kv_heads)
    rows, switches = [row(name, 0.35)], Policy(policy)
    alone = run(model, prompt(50, seed=2), rows, sample_id="b", policy=switches)[0].token_ids
    for length in (30, 50, 61):
        run(model, prompt(length, seed=1), rows, sample_id="a", policy=switches)
    again = run(model, prompt(50, seed=2), rows, sample_id="b", policy=switches)[0].token_ids
    assert again == alone


@models
@pytest.mark.parametrize("policy", ["append", "hold"])
def test_all_methods_in_one_batch_answer_as_alone(kv_heads, policy):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(50)
    rows = [row("full", 1)]
    rows += [row(n, b) for n in COMPRESSING for b in (0.5, 0.35)]
    settings = {"sample_id": "s", "reference": 0, "policy": Policy(policy)}
    together = run(model, input_ids, rows, **settings)
    for each, result in zip(rows, together, strict=True):
        alone = run(model, input_ids, [rows[0], each], **settings)[1]
        assert result.token_ids == alone.token_ids
        assert result.stats == alone.stats
        assert result.fidelity.kl == pytest.approx(alone.fidelity.kl, abs=1e-4)


@pytest.mark.parametrize("policy", ["append", "hold"])
@pytest.mark.parametrize("name", [n for n in COMPRESSING if not load_method(n).allocates])
def test_decoding_equals_the_naive_engine(name, policy):
    model, input_ids = shared_model(), prompt(50)
    each, switches = row(name, 0.35), Policy(policy)
    if isinstance(each.method, KVMerger):
        each = replace(each, method=replace(each.method, merge_every=3))
    results = run(model, input_ids, [each], Stop(12, NEVER), sample_id="s", policy=switches)
    assert results[0].token_ids == naive_engine.greedy(model, input_ids, each, 12, "s", switches)


@pytest.mark.parametrize("name", COMPRESSING)
def test_the_layer_is_left_as_it_was(name):
    """The other cells of a comparison compress the same tensors."""
    each = row(name, 0.35)
    for layer_, _ in compressed_layers(shared_model(), prompt(50), each):
        again = replace(
            layer_,
            scores=naive_engine.map_column_sums(layer_.queries, layer_.keys, layer_.softmax.scale),
        )
        before = copy.deepcopy(again)
        allowance = Allowance(17, 0.35, torch.Generator().manual_seed(0))
        each.method.compress(again, allowance)
        for state in ("queries", "keys", "values", "scores"):
            assert torch.equal(getattr(again, state), getattr(before, state))


@pytest.mark.parametrize("name", [n for n in COMPRESSING if not load_method(n).needs_scores])
def test_scores_are_read_only_where_they_are_declared(name):
    """The engine computes them only for methods that say so."""
    each = method(name)
    bare = replace(layer(50), scores=None, rope=Rope(0.1 ** torch.arange(4)))
    draws = torch.Generator().manual_seed(0) if each.stochastic else None
    each.compress(bare, Allowance(17, 0.35, draws))


# --- 8. half precision


@models
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("policy", ["append", "hold"])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_finite(name, policy, dtype, kv_heads):
    model = shared_model(kv_heads=kv_heads, dtype=dtype)
    rows = [row("full", 1), row(name, 0.35)]
    seen = []
    results = run(
        model,
        prompt(50),
        rows,
        reference=0,
        observer=lambda *arguments: seen.append(arguments),
        policy=Policy(policy),
    )
    for _, _, _, kept in seen:
        for state in (kept.keys, kept.values):
            assert state.dtype == getattr(torch, dtype)
            assert state.isfinite().all()
    for result in results:
        assert torch.tensor(result.fidelity.kl).isfinite()
    comparison = Comparison(model, [rows[1]])
    with hooked(model), torch.inference_mode():
        assert comparison.prefill(prompt(50), 8).isfinite().all()
        assert replayed(comparison, [5, 6, 7, 8]).isfinite().all()


# --- 9. protected tokens survive


KVMERGER_ENDS = (0, 4)
ENDS = {
    "ada_snapkv": (0, 10),
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
    for layer_, kept in compressed_layers(shared_model(kv_heads=kv_heads), prompt(60), row(name, 0.35)):
        for head in range(kv_heads):
            positions = kept.positions[0, head].tolist()
            assert set(protected) <= set(positions)
            slots = [positions.index(token) for token in protected]
            for state in states:
                found = getattr(kept, state)[0, head, slots]
                assert torch.equal(found, getattr(layer_, state)[0, head, protected])


# --- 10. values that are not finite


@models
@pytest.mark.parametrize("name", METHODS)
def test_keys_that_are_not_finite_are_refused(name, kv_heads):
    model = new_model(kv_heads=kv_heads)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[HEAD_DIM : 2 * HEAD_DIM] = torch.nan
    with pytest.raises(UserError, match="keys of layer 1, KV head 1 are not finite"):
        run(model, prompt(20), [row(name, 0.5)])


# --- 11. seeds


@models
@pytest.mark.parametrize("name", COMPRESSING)
def test_draws_depend_on_seed_and_sample_alone(name, kv_heads):
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(80)

    def entries(seed, sample_id="s"):
        return compressed_layers(model, input_ids, row(name, 0.5, seed=seed), sample_id)

    first = entries(1)
    torch.manual_seed(5)  # the global generator has no say
    same_entries(first, entries(1))
    others = [entries(2), entries(1, "other sample")]
    if not method(name).stochastic:
        for other in others:
            same_entries(first, other)
    elif not method(name).simulates:  # what is hidden may be drawn only while decoding
        for other in others:
            assert any(
                not torch.equal(left.values, right.values)
                for (_, left), (_, right) in zip(first, other, strict=True)
            )
