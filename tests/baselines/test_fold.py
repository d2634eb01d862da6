"""The factorial of merging: its corners, a slow version of its parts, and what it refuses."""

import itertools
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from baselines import refitting
from baselines.fold import Fold
from baselines.nearest import nearest, nearest_in_text, slots_of_nearest
from baselines.refitting import LEAST, Reference, nonnegative_fit, ridge_fit
from kvmerge.cells import parse_cell
from kvmerge.errors import UserError
from kvmerge.method import Allowance, select
from kvmerge.resolve import load_method
from kvmerge.scores import attention_rows
from kvmerge.softmax import Softmax
from tests.tiny import generator, layer, normal, quick

DOUBLE = torch.float64
RULES = ["h2o", "snapkv", "tova", "streaming_llm", "pivot_only", "random"]
"""Rules that keep tokens as they are."""


def allowance(seed=0):
    return Allowance(35, 0.35, generator(seed))


def same(one, other, atol=0.0):
    assert torch.equal(one.positions, other.positions)
    for state in ("keys", "values"):
        torch.testing.assert_close(getattr(one, state), getattr(other, state), atol=atol, rtol=0)
    if one.bias is None or other.bias is None:
        assert one.bias is other.bias
    else:
        torch.testing.assert_close(one.bias, other.bias, atol=atol, rtol=0)


# --- corners: other methods that this one is


@pytest.mark.parametrize("rule", RULES)
def test_dropping_what_a_rule_does_not_keep_is_the_rule(rule):
    before = layer(100)
    found = Fold(keep=rule, fold="drop").compress(before, allowance())
    same(found, load_method(rule).compress(before, allowance()))


def test_kvmergers_sets_without_their_other_members_are_pivot_only():
    before = layer(100)
    found = Fold(keep="kvmerger", fold="drop").compress(before, allowance())
    same(found, load_method("pivot_only").compress(before, allowance()))


OF_SETS = {
    "kvmerger": {"keep": "kvmerger", "weights": "gaussian"},
    "kvmerger_log": {"keep": "kvmerger", "weights": "gaussian", "bias": "log_size"},
    "meanpool_sets": {"keep": "kvmerger", "weights": "uniform"},
    "meanpool_chunks": {"keep": "meanpool_chunks", "weights": "uniform"},
}


@pytest.mark.parametrize("name", OF_SETS)
def test_folding_sets_into_their_pivots_is_the_method_that_made_them(name):
    before = layer(100)
    found = Fold(route="set", fold="keys_values", **OF_SETS[name]).compress(before, allowance())
    wanted = load_method(name).compress(before, allowance())
    same(found, wanted)
    assert torch.equal(found.sizes, wanted.sizes)


@pytest.mark.parametrize("name", ["d2o", "cam"])
def test_methods_that_fold_otherwise_are_no_corner(name):
    """D2O sums by cosine above a threshold and divides by counts, CaM hands values on to the next."""
    before, wanted = layer(100), None
    wanted = load_method(name).compress(before, allowance())
    rule = "h2o" if name == "d2o" else name
    for fold, route, weights in itertools.product(
        ("values", "keys_values"), ("position", "cosine", "attention"), ("uniform", "mass", "gaussian")
    ):
        method = Fold(keep=rule, fold=fold, route=route, weights=weights)
        assert not torch.allclose(method.compress(before, allowance()).values, wanted.values, atol=1e-3)


# --- routes


@quick
@given(st.integers(1, 12), st.integers(0, 99), st.data())
def test_the_nearest_in_the_text_equals_the_slow_version(length, seed, data):
    n_keep = data.draw(st.integers(1, length))
    kept = torch.rand(1, 2, length, generator=generator(seed)).argsort(-1)[..., :n_keep].sort(-1).values
    found = nearest_in_text(kept, length)
    for head, token in itertools.product(range(2), range(length)):
        places = kept[0, head].tolist()
        best = min(range(n_keep), key=lambda slot: (abs(places[slot] - token), slot))
        assert found[0, head, token] == best


def test_a_token_goes_to_the_kept_one_with_the_nearest_key():
    similarity, slot = nearest(
        torch.tensor([[[[2.0, 0.1], [0.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0], [5.0, 0.0]]]])
    )
    assert slot.tolist() == [[[1, 0]]]
    assert similarity[0, 0].tolist() == pytest.approx([2 / math.hypot(2, 0.1), 0])


@pytest.mark.parametrize("products", ["torch", "onednn"])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_the_nearest_in_blocks_and_chunks_is_that_of_all(count, products, monkeypatch):
    monkeypatch.setenv("KVMERGE_CPU_PRODUCTS", products)
    evicted, kept = normal(2, 2, 600, 8), normal(2, 2, count, 8, seed=1)
    similarity, slot = nearest(evicted, kept)
    cosines = torch.cosine_similarity(evicted.unsqueeze(3), kept.unsqueeze(2), dim=-1)
    torch.testing.assert_close(similarity, cosines.amax(-1))
    torch.testing.assert_close(cosines.gather(-1, slot.unsqueeze(-1)).squeeze(-1), similarity)


def test_of_kept_tokens_that_are_equally_near_the_first_is_taken():
    kept = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(100, 1)
    _, slot = nearest(torch.ones(1, 1, 3, 2), kept[None, None])
    assert slot.tolist() == [[[0, 0, 0]]]


def test_cells_that_keep_the_same_tokens_are_routed_once(monkeypatch):
    before, asked = layer(100), []

    def route(*of):
        asked.append(of)
        return slots_of_nearest(*of)

    monkeypatch.setattr("baselines.fold.slots_of_nearest", route)
    for what in ("values", "keys_values"):
        Fold(fold=what, route="cosine").compress(before, allowance())
    assert len(asked) == 1
    Fold(route="cosine").compress(before, Allowance(20, 0.2))
    assert len(asked) == 2
    Fold(route="attention").compress(before, allowance())
    assert len(asked) == 4  # one KV head after the other


def slow_fold(before, positions, slots, weight, scores, fold, bias):
    """Keys, values and biases of one entry after the other."""
    keys, values, biases = [], [], []
    for head, places in enumerate(positions[0].tolist()):
        for slot, place in enumerate(places):
            members = [t for t, s in enumerate(slots[0, head].tolist()) if s == slot]
            total = sum(weight(head, t, place) for t in members)

            def mean(states, head=head, members=members, total=total, place=place):
                return sum(weight(head, t, place) / total * states[0, head, t] for t in members)

            values.append(mean(before.values) if fold != "drop" else before.values[0, head, place])
            keys.append(mean(before.keys) if fold == "keys_values" else before.keys[0, head, place])
            mass = sum(scores[0, head, t] for t in members) / scores[0, head, place]
            biases.append(
                {"none": 0.0, "log_size": math.log(len(members)), "log_mass": mass.log()}[bias]
            )
    shape = before.keys.shape[:2] + positions.shape[-1:]
    return torch.stack(keys), torch.stack(values), torch.tensor(biases).view(shape)


@pytest.mark.parametrize("bias", ["none", "log_size", "log_mass"])
@pytest.mark.parametrize("weights", ["uniform", "mass", "gaussian"])
@pytest.mark.parametrize("route", ["position", "cosine", "attention"])
@pytest.mark.parametrize("fold", ["drop", "values", "keys_values"])
def test_folding_equals_the_slow_version(fold, route, weights, bias):
    if fold == "drop" and (bias == "none" or weights != "mass"):
        return  # such settings are idle, and refused
    before, rows = layer(24), None if weights == "uniform" else 7
    uses_mass = bias == "log_mass" or (fold != "drop" and weights == "mass")
    options = {"rows": rows} if uses_mass else {}
    options |= {"sigma": 2.0} if fold != "drop" and weights == "gaussian" else {}
    method = Fold(fold=fold, route=route, weights=weights, bias=bias, **options)
    found = method.compress(before, Allowance(8, 1 / 3))

    map_ = attention_rows(before.queries, before.keys, 0, 24)
    by_group = map_.unflatten(1, (2, 2))
    scores = by_group[:, :, :, 24 - (rows or 24) :].sum(dim=(2, 3))
    profile = by_group.flatten(2, 3).transpose(2, 3)  # what all 24 rows, fewer than 256, give a token
    slots = torch.zeros(1, 2, 24, dtype=torch.int64)
    for head, token in itertools.product(range(2), range(24)):
        places = found.positions[0, head].tolist()
        near = {
            "position": lambda place, token=token: -abs(place - token),
            "cosine": lambda place, head=head, token=token: float(
                torch.cosine_similarity(before.keys[0, head, token], before.keys[0, head, place], dim=0)
            ),
            "attention": lambda place, head=head, token=token: float(
                torch.cosine_similarity(profile[0, head, token], profile[0, head, place], dim=0)
            ),
        }[route]
        own = places.index(token) if token in places else None
        slots[0, head, token] = (
            max(range(8), key=lambda slot: (near(places[slot]), -slot)) if own is None else own
        )

    def weight(head, token, place):
        if weights == "mass":
            return scores[0, head, token]
        distance = (before.keys[0, head, token] - before.keys[0, head, place]).norm()
        return torch.tensor(1.0) if weights == "uniform" else (-(distance**2) / 8).exp()

    keys, values, biases = slow_fold(before, found.positions, slots, weight, scores, fold, bias)
    torch.testing.assert_close(found.keys.flatten(0, 2), keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.values.flatten(0, 2), values, atol=1e-5, rtol=1e-5)
    assert (found.bias is None) == (bias == "none")
    if found.bias is not None:
        torch.testing.assert_close(found.bias, biases, atol=1e-4, rtol=1e-4)


# --- fits


def test_the_non_negative_fit_is_scipys():
    shares = normal(2, 30, 9, dtype=DOUBLE).abs() / 9
    start = torch.ones(2, 9, dtype=DOUBLE)
    found = nonnegative_fit(shares, start, 0.5)
    for head in range(2):
        strength = 0.5 * float(shares[head].square().sum(0).mean())
        rows = np.vstack([shares[head].numpy(), math.sqrt(strength) * np.eye(9)])
        wanted, _ = nnls(rows, np.concatenate([np.ones(30), math.sqrt(strength) * np.ones(9)]))
        assert found[head].tolist() == pytest.approx(wanted, abs=1e-3)


def test_a_column_that_only_takes_gets_nothing():
    """The second column alone makes the rows too large: its factor ends at 0."""
    shares = torch.tensor([[1.0, 3.0], [1.0, 0.5]], dtype=DOUBLE)
    found = nonnegative_fit(shares, torch.tensor([1.0, 0.0], dtype=DOUBLE), 1e-6)
    assert found.tolist() == pytest.approx([1, 0], abs=1e-3)


@pytest.mark.parametrize(("rows", "n"), [(12, 5), (5, 12), (150, 140), (140, 150)])
def test_ridge_equals_a_least_squares_of_stacked_rows(rows, n):
    weights, missing = normal(3, rows, n, dtype=DOUBLE), normal(3, rows, 4, seed=1, dtype=DOUBLE)
    found = ridge_fit(weights, missing, 0.1)
    for head in range(3):
        strength = 0.1 * float(weights[head].square().sum(-1).mean())
        stacked = np.vstack([weights[head].numpy(), math.sqrt(strength) * np.eye(n)])
        wanted = np.linalg.lstsq(
            stacked, np.vstack([missing[head].numpy(), np.zeros((n, 4))]), rcond=None
        )
        np.testing.assert_allclose(found[head].numpy(), wanted[0], atol=1e-8)


def outputs(before, entries, seen):
    logits = seen.logits(entries.keys, entries.positions)
    if entries.bias is not None:
        logits = logits + entries.bias[:, :, None, None]
    return logits.softmax(-1) @ entries.values.unsqueeze(2)


def test_the_reference_output_is_that_of_attention():
    before = layer(40)
    seen = Reference.of(before, 10)
    map_ = attention_rows(before.queries, before.keys, 30, 40).unflatten(1, (2, 2))
    torch.testing.assert_close(seen.output, map_ @ before.values.unsqueeze(2), atol=1e-5, rtol=0)
    everything = select(before, torch.arange(40).expand(1, 2, 40))
    torch.testing.assert_close(outputs(before, everything, seen), seen.output, atol=1e-5, rtol=0)


def test_the_reference_knows_what_a_sink_takes():
    before = replace(layer(40), softmax=Softmax(0.3, sinks=torch.tensor([0.0, 3.0, -1.0, 2.0])))
    seen = Reference.of(before, 10)
    map_ = attention_rows(before.queries, before.keys, 30, 40, softmax=before.softmax)
    wanted = map_.unflatten(1, (2, 2)) @ before.values.unsqueeze(2)
    torch.testing.assert_close(seen.output, wanted, atol=1e-5, rtol=0)


def test_the_reference_in_blocks_of_rows_is_the_same(monkeypatch):
    whole = Reference.of(layer(40), 33)
    monkeypatch.setattr("kvmerge.scores._BLOCK_ELEMENTS", 1)  # 16 rows a block
    blocks = Reference.of(layer(40), 33)
    torch.testing.assert_close(blocks.output, whole.output, atol=1e-6, rtol=0)
    torch.testing.assert_close(blocks.total, whole.total, atol=1e-6, rtol=0)


def test_the_fits_of_one_layer_share_what_its_last_queries_saw(monkeypatch):
    before, blocks = layer(100), []
    real = refitting.logit_blocks
    monkeypatch.setattr(refitting, "logit_blocks", lambda *at: blocks.append(at) or real(*at))
    for refit in ("values", "both"):
        Fold(fold="drop", refit=refit).compress(before, allowance())
    assert len(blocks) == 1


def test_what_fits_share_does_not_outlive_the_layer():
    """A layer in a circle with what it remembers would stay in memory until a garbage collection."""
    before = layer(100)
    Fold(fold="drop", refit="both").compress(before, allowance())
    gone = weakref.ref(before)
    del before
    assert gone() is None


@pytest.mark.parametrize("keep", ["h2o", "streaming_llm"])
def test_fitted_values_bring_the_outputs_of_the_last_queries_nearer(keep):
    before = layer(200, head_dim=16)
    seen = Reference.of(before, 256)

    def missing(refit):
        method = Fold(keep=keep, fold="drop", refit=refit)
        entries = method.compress(before, Allowance(70, 0.35))
        last = outputs(before, entries, seen)[..., 100:, :] - seen.output[..., 100:, :]
        return float(last.square().sum())

    dropped = missing("none")
    assert missing("values") < 0.8 * dropped
    assert missing("both") < 0.8 * dropped


def test_a_fitted_bias_gives_the_entries_the_mass_of_the_whole_layer():
    before = layer(100)
    entries = Fold(keep="streaming_llm", fold="drop", refit="bias", reference=20, ridge=1e-4).compress(
        before, allowance()
    )
    seen = Reference.of(before, 20)
    plain = (seen.logits(entries.keys, entries.positions) - seen.total).exp()
    fitted = plain * entries.bias.exp()[:, :, None, None]
    assert (plain.sum(-1) - 1).abs().mean() > 5 * (fitted.sum(-1) - 1).abs().mean()
    assert entries.bias.min() >= math.log(LEAST) - 1e-6


def test_values_are_fitted_with_the_biases_that_they_are_read_with():
    before = layer(100)
    both = Fold(fold="values", bias="log_size", refit="values").compress(before, allowance())
    alone = Fold(fold="values", refit="values").compress(before, allowance())
    assert not torch.allclose(both.values, alone.values, atol=1e-3)


# --- what is declared and refused


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"keep": "h2o", "fold": "drop"}, True),
        ({"keep": "snapkv", "fold": "drop"}, False),
        ({"keep": "snapkv", "weights": "mass"}, True),
        ({"keep": "snapkv", "weights": "mass", "rows": 8}, False),
        ({"keep": "snapkv", "fold": "drop", "bias": "log_mass"}, True),
        ({"keep": "snapkv", "weights": "uniform", "bias": "log_size"}, False),
    ],
)
def test_column_sums_are_asked_for_where_they_are_read(options, needs):
    assert Fold(**options).needs_scores is needs


def test_a_rule_that_draws_makes_a_method_that_draws():
    assert Fold(keep="random").stochastic
    assert not Fold(keep="h2o").stochastic


def test_a_rule_that_divides_the_budget_across_layers_still_does():
    method = Fold(keep="pyramidkv", fold="drop")
    layers = [layer(100) for _ in range(2)]
    wanted = load_method("pyramidkv").allocate(layers, allowance())
    assert method.allocates
    assert method.allocate(layers, allowance()) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "h2o_sim_decode"}, "hides entries or decides while decoding"),
        ({"keep": "fold"}, "another method"),
        ({"keep": "h3o"}, "h2o"),
        ({"route": "set"}, "keep=kvmerger, not keep=h2o"),
        ({"fold": "drop", "route": "cosine"}, "route=cosine has no effect"),
        ({"fold": "drop", "weights": "uniform"}, "weights=uniform has no effect"),
        ({"weights": "uniform", "rows": 8}, "rows=8 has no effect"),
        ({"sigma": 2.0}, "sigma=2.0 has no effect"),
        ({"reference": 8}, "reference=8 has no effect"),
        ({"ridge": 1.0}, "ridge=1.0 has no effect"),
        ({"rows": 0}, "1 or more"),
        ({"ridge": 0.0, "refit": "values"}, "positive"),
        ({"fold": "sum"}, "keys_values"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Fold(**options)


def test_a_threshold_that_leaves_heads_of_unequal_length_is_refused(monkeypatch):
    method = Fold(keep="kvmerger")
    object.__setattr__(
        method, "rule", load_method("kvmerger", {"budget_mode": "eps_free", "epsilon": 0.3})
    )
    with pytest.raises(UserError, match="more tokens in some heads"):
        method.compress(layer(100), allowance())


def test_results_of_a_cell_are_of_its_rules_settings_too():
    assert parse_cell("fold:keep=snapkv@0.35").settings()["rule"]["window"] == 32
