"""What is measured of a layer, against slow and obvious versions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmerge import merging
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance
from kvmerge.observations import (
    KINDS,
    RULES,
    SIZES,
    Maps,
    Measures,
    attention_entropy,
    cosine_by_distance,
    cosine_map,
    merged_sets,
    observe,
    observe_layer,
    quartiles,
    size_classes,
    spread_rows,
)
from kvmerge.rope import Rope
from kvmerge.softmax import Softmax, plain
from tests import tiny

SMALL = Measures(distances=(1, 2, 30), thresholds=(-1.0, 0.2, 0.6), epsilon=0.2)


def cosine(left: Tensor, right: Tensor) -> float:
    return float(left @ right / max(float(left.norm() * right.norm()), 1e-30))


# cosines


@tiny.quick
@given(st.integers(1, 12), st.integers(0, 5))
def test_cosines_by_distance_are_means_over_all_pairs(length: int, seed: int) -> None:
    states = tiny.normal(2, length, 4, seed=seed)
    found = cosine_by_distance(states, (1, 3, 12))
    for head in range(2):
        for column, distance in enumerate((1, 3, 12)):
            pairs = [
                cosine(states[head, i], states[head, i + distance]) for i in range(length - distance)
            ]
            wanted = sum(pairs) / len(pairs) if pairs else math.nan
            assert float(found[head, column]) == pytest.approx(wanted, abs=1e-5, nan_ok=True)


def test_half_precision_is_measured_in_float32() -> None:
    states = tiny.normal(2, 40, 8).half()
    assert cosine_by_distance(states, (1,)).dtype == torch.float32
    torch.testing.assert_close(
        cosine_by_distance(states, (1, 7)), cosine_by_distance(states.float(), (1, 7))
    )


def test_a_zero_state_is_like_none() -> None:
    assert cosine_by_distance(torch.zeros(1, 3, 4), (1, 2)).tolist() == [[0, 0]]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20])
def test_a_map_is_the_whole_map_averaged_in_blocks(length: int) -> None:
    states = tiny.normal(length, 4)
    found = cosine_map(states, side=8)
    block = -(-length // 8)
    whole = torch.tensor([[cosine(a, b) for b in states] for a in states])
    rows = torch.stack([part.mean(dim=0) for part in whole.split(block)])
    wanted = torch.stack([part.mean(dim=1) for part in rows.split(block, dim=1)], dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert len(found) <= 8


# entropy


def entropy_of_row(queries: Tensor, keys: Tensor, row: int, softmax: Softmax) -> list[float]:
    found = []
    group = len(queries) // len(keys)
    for head, of_head in enumerate(queries):
        logits = softmax.logits(keys[head // group, : row + 1] @ of_head[row])
        weights = logits.softmax(dim=0).tolist()
        found.append(-sum(weight * math.log(weight) for weight in weights if weight > 0))
    return found


@pytest.mark.parametrize("softmax", [plain(8), Softmax(2.0), Softmax(1.0, softcap=3.0)])
def test_the_entropy_of_rows_is_that_of_their_weights(softmax: Softmax) -> None:
    queries, keys = tiny.normal(4, 90, 8), tiny.normal(2, 90, 8, seed=1)
    rows = torch.tensor([1, 2, 40, 89])
    entropy, flatness = attention_entropy(queries, keys, rows, softmax)
    for column, row in enumerate(rows.tolist()):
        wanted = torch.tensor(entropy_of_row(queries, keys, row, softmax))
        torch.testing.assert_close(entropy[:, column], wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(flatness[:, column], wanted / math.log(row + 1), atol=1e-5, rtol=0)


def test_equal_keys_get_flat_attention_and_one_strong_key_does_not() -> None:
    queries = torch.ones(2, 100, 4)
    rows = spread_rows(100, 100)
    flat = attention_entropy(queries, torch.ones(1, 100, 4), rows, plain(4))[1]
    torch.testing.assert_close(flat, torch.ones(2, 99))
    strong = torch.zeros(1, 100, 4)
    strong[:, 0] = 100
    assert float(attention_entropy(queries, strong, rows, plain(4))[0].max()) < 1e-6


def test_a_sink_takes_no_part_in_the_entropy() -> None:
    queries, keys, rows = tiny.normal(2, 30, 8), tiny.normal(2, 30, 8, seed=1), spread_rows(30, 9)
    with_sink = Softmax(0.5, sinks=torch.tensor([3.0, -1.0]))
    without = attention_entropy(queries, keys, rows, Softmax(0.5))
    torch.testing.assert_close(attention_entropy(queries, keys, rows, with_sink), without)


@tiny.quick
@given(st.integers(1, 300), st.integers(1, 200))
def test_rows_are_spread_from_the_second_to_the_last(length: int, most: int) -> None:
    rows = spread_rows(length, most).tolist()
    assert len(rows) == len(set(rows)) == min(most, length - 1)
    assert rows == sorted(rows)
    if length > 1:
        assert rows[0] == 1
        assert most == 1 or rows[-1] == length - 1


# sets


def random_sets(seed: int, length: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    keys = tiny.normal(1, 2, length, 6, seed=seed)
    breaks = torch.rand(1, 2, length, generator=tiny.generator(seed)) < 0.4
    breaks[..., 0] = True
    return keys, breaks.cumsum(dim=-1) - 1, tiny.normal(1, 2, length, seed=seed + 1).abs()


def members_of(set_ids: Tensor, head: int) -> list[list[int]]:
    ids = set_ids[0, head].tolist()
    return [[i for i, own in enumerate(ids) if own == each] for each in range(max(ids) + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_sizes_and_distances_are_those_of_each_set(seed: int) -> None:
    keys, set_ids, scores = random_sets(seed)
    found = merged_sets(keys, set_ids, scores)
    sizes, distances = [], []
    for head in range(2):
        for members in members_of(set_ids, head):
            sizes.append(len(members))
            pivot = max(members, key=lambda i: float(scores[0, head, i]))
            distances += [
                float((keys[0, head, i] - keys[0, head, pivot]).norm()) for i in members if i != pivot
            ]
    assert found.sizes.tolist() == sizes
    assert sorted(found.distances.tolist()) == pytest.approx(sorted(distances), abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_a_rule_s_sigma_gives_the_weights_of_the_merger(rule: str, scale: float) -> None:
    keys, set_ids, scores = random_sets(3)
    keys = scale * keys.double()
    found = merged_sets(keys, set_ids, scores)
    several = (found.sizes > 1).nonzero()[:, 0].tolist()
    sigma = dict(zip(several, found.sigma[rule].tolist(), strict=True))
    weights = merging.gaussian_weights(keys, set_ids, scores, sigma=rule)
    number = 0
    for head in range(2):
        for members in members_of(set_ids, head):
            pivot = max(members, key=lambda i: float(scores[0, head, i]))
            if len(members) > 1:
                bells = [
                    math.exp(
                        -(float((keys[0, head, i] - keys[0, head, pivot]).norm()) ** 2)
                        / (2 * sigma[number] ** 2)
                    )
                    for i in members
                ]
                wanted = torch.tensor(bells).double() / sum(bells)
                torch.testing.assert_close(weights[0, head, members], wanted, atol=1e-6, rtol=0)
            number += 1


def test_the_printed_rule_never_exceeds_its_bound() -> None:
    for seed in range(5):
        keys, set_ids, scores = random_sets(seed)
        found = merged_sets(0.01 * keys, set_ids, scores)
        assert float(found.sigma["fixed_point"].max()) <= 1 / math.sqrt(2) + 1e-9


@tiny.quick
@given(st.lists(st.integers(1, 200), max_size=40))
def test_sets_are_counted_in_classes_of_size(sizes: list[int]) -> None:
    bounds = [0, *SIZES, 10**9]
    wanted = [sum(low < size <= high for size in sizes) for low, high in itertools.pairwise(bounds)]
    assert size_classes(torch.tensor(sizes, dtype=torch.long)) == wanted


@tiny.quick
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_quartiles_are_torchs(values: list[float]) -> None:
    numbers = torch.tensor(values, dtype=torch.float64)
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    assert quartiles(numbers) == pytest.approx(torch.quantile(numbers, at).tolist())


def test_nothing_has_no_quartiles() -> None:
    assert quartiles(torch.empty(0)) is None


# layers


@pytest.mark.parametrize("linkage", merging.LINKAGES)
@pytest.mark.parametrize("protect", [None, 0.5, 12])
def test_the_ratio_is_the_sets_that_the_merger_finds(linkage: str, protect: float | None) -> None:
    layer = tiny.layer(40)
    measures = Measures(thresholds=(-1.0, 0.2, 0.6), linkage=linkage, protect=protect)
    found = observe_layer(layer, measures).ratio
    protected = torch.zeros(1, 2, 40, dtype=torch.bool)
    if protect is not None:
        allowance = Allowance(20, 0.5) if protect == 0.5 else Allowance(12, 12 / 40)
        protected = KVMerger().protected(layer.column_scores(), 40, allowance)
    for column, threshold in enumerate(measures.thresholds):
        ids = merging.merging_sets(layer.keys, protected, threshold=threshold, linkage=linkage)
        assert found[:, column].tolist() == pytest.approx(((ids[0, :, -1] + 1) / 40).tolist())
    if protect is None:
        assert found[:, 0].tolist() == pytest.approx([1 / 40, 1 / 40])


def test_without_a_linkage_it_is_the_merger_s_own() -> None:
    layer = tiny.layer(60)
    default = observe_layer(layer, SMALL)
    own = observe_layer(layer, Measures(**(vars(SMALL) | {"linkage": KVMerger.linkage})))
    assert default.ratio.equal(own.ratio)
    assert default.sizes == own.sizes


def test_a_prompt_too_short_for_what_is_protected_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 entries"):
        observe_layer(tiny.layer(3), Measures(protect=0.4))


# prompts


def test_every_layer_of_a_prompt_is_observed_before_and_after_rope() -> None:
    model = tiny.shared_model()
    found = observe(model, tiny.prompt(40), SMALL)
    assert [each.layer_idx for each in found] == [0, 1]
    for each in found:
        assert list(each.cosine) == list(KINDS)
        assert each.cosine["keys"].shape == (2, 3)
        assert each.ratio.shape == (2, 3)
        assert sum(each.sizes) == round(float(each.ratio[:, 1].sum()) * 40)
        assert each.entropy.shape == each.flatness.shape == (tiny.HEADS,)
        assert 0 < float(each.flatness.min()) <= float(each.flatness.max()) < 1


def test_keys_before_rope_are_those_of_the_projection() -> None:
    model = tiny.new_model()
    projected: dict[int, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_hook(
            lambda _module, _inputs, output, index=index: projected.update({index: output})
        )
    found = observe(model, tiny.prompt(50), SMALL)
    for index, each in enumerate(found):
        keys = projected[index].view(1, 50, 2, tiny.HEAD_DIM).transpose(1, 2)[0]
        wanted = cosine_by_distance(keys, SMALL.distances)
        torch.testing.assert_close(each.cosine["keys_before_rope"], wanted, atol=1e-5, rtol=0)
        assert not torch.allclose(each.cosine["keys"], wanted, atol=1e-3)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts_have_what_there_is(length: int) -> None:
    for each in observe(tiny.shared_model(), tiny.prompt(length), Measures(distances=(1, 2))):
        assert bool(each.cosine["keys"][:, 1].isnan().all())
        assert bool(each.cosine["keys"][:, 0].isnan().all()) == (length == 1)
        assert bool(each.entropy.isnan().all()) == (length == 1)
        assert bool(each.ratio.isfinite().all())
        if length == 1:
            assert each.ratio.unique().tolist() == [1]
            assert each.distance is None
            assert set(each.sigma.values()) == {None}


def test_layers_left_to_a_window_are_not_observed() -> None:
    model = tiny.any_model("gemma3_text")
    assert [each.layer_idx for each in observe(model, tiny.prompt(40), SMALL)] == [3]


def test_a_model_whose_rotation_cannot_be_undone_has_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *_) = observe(tiny.any_model("gpt2"), tiny.prompt(20), SMALL)
    assert list(first.cosine) == ["keys", "values"]
    with pytest.raises(UserError):
        Rope.of(tiny.any_model("gpt2"))


def test_a_prompt_beyond_the_model_is_refused() -> None:
    with pytest.raises(UserError, match="512 positions"):
        observe(tiny.shared_model(), tiny.prompt(600), SMALL)


def test_maps_are_those_of_the_layers_and_heads_named() -> None:
    maps = Maps([1], [1, 0])
    observe(tiny.shared_model(), tiny.prompt(20), SMALL, maps=maps)
    assert list(maps.drawn) == [1]
    assert maps.drawn[1].shape == (2, 20, 20)
    diagonal = maps.drawn[1].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, torch.ones(2, 20), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"distances": ()}, "distances=.* rising numbers, at least one"),
        ({"distances": (2, 1)}, "distances=.* rising numbers"),
        ({"thresholds": (0.5, 0.5)}, "thresholds=.* rising numbers"),
        ({"thresholds": (0.5, 1.5)}, "a cosine lies between -1 and 1"),
        ({"epsilon": -2.0}, "epsilon=.*a cosine lies between -1 and 1"),
        ({"linkage": "ancor"}, "Did you mean 'anchor'"),
        ({"protect": 1.5}, "protect=1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        Measures(**settings)
