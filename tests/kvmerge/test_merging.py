"""Merging sets and Gaussian merges: the goldens of the method notes, and slow versions as oracles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmerge.errors import UserError
from kvmerge.linkage import SCANS
from kvmerge.merging import (
    LINKAGES,
    SIGMA_RULES,
    VALUE_SCALES,
    cosine,
    gaussian_merge,
    merging_sets,
    set_counts,
    set_summary,
)
from tests.kvmerge import oracles
from tests.tiny import normal, quick

DOUBLE = torch.float64


def heads(*rows):
    """One batch of heads from nested lists."""
    return torch.tensor(rows, dtype=DOUBLE)[None]


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=DOUBLE), atol=atol, rtol=0)


# The shared head of the goldens: one recent token, one top token, links at 1 … 5.
KEYS = heads([(1, 0), (0.8, 0.6), (0, 1), (-0.6, 0.8), (-0.8, 0.6), (-1, 0), (0.6, -0.8), (1, 0)])
SCORES = heads([3, 0.9, 0.4, 0.7, 0.2, 0.5, 0.8, 0.3])
VALUES = heads([[v] for v in range(8)])
PROTECTED = torch.tensor([[[True] + [False] * 6 + [True]]])


def golden_sets(**settings):
    return merging_sets(KEYS, PROTECTED, scores=SCORES, **settings)[0, 0].tolist()


# --- K1: sets


@pytest.mark.parametrize(
    ("budget", "set_ids"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (6, [0, 1, 2, 3, 3, 3, 4, 5]),  # links 2 and 4 tie at .8: the larger index first
        (5, [0, 1, 2, 2, 2, 2, 3, 4]),
        (4, [0, 1, 1, 1, 1, 1, 2, 3]),
        (3, [0, 1, 1, 1, 1, 1, 1, 2]),
    ],
)
def test_exact_links_leave_the_budget_whatever_it_is(budget, set_ids):
    assert golden_sets(budget=budget) == set_ids


def test_eps_evict_golden_with_too_many_sets():
    assert golden_sets(budget=5, threshold=0.9) == [0, 1, -1, 2, 2, -1, 3, 4]


def test_eps_evict_golden_with_too_few_sets():
    assert golden_sets(budget=5, threshold=0.5) == [0, 1, 2, 2, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("threshold", "set_ids"),
    [
        (1.1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.96, [0, 1, 2, 3, 4, 5, 6, 7]),  # strictly above
        (0.9, [0, 1, 2, 3, 3, 4, 5, 6]),
        (0.5, [0, 1, 1, 1, 1, 1, 2, 3]),
        (-1, [0, 1, 1, 1, 1, 1, 1, 2]),
    ],
)
def test_a_threshold_alone_links_every_pair_above_it(threshold, set_ids):
    keys = KEYS.clone()
    keys[0, 0, 4] = keys[0, 0, 4] * 2  # a cosine does not see lengths
    assert merging_sets(keys, PROTECTED, threshold=threshold)[0, 0].tolist() == set_ids


def test_the_member_with_the_largest_score_is_the_pivot():
    ids = merging_sets(KEYS, PROTECTED, budget=5)
    sizes, pivots, scores = set_summary(ids, SCORES)
    assert sizes.tolist() == [[[1, 1, 4, 1, 1]]]
    assert pivots.tolist() == [[[0, 1, 3, 6, 7]]]
    close(scores, [[[3, 0.9, 1.8, 0.8, 0.3]]])


# --- the same head, scanned backwards; `anchor` and `complete` agree on it


@pytest.mark.parametrize("linkage", SCANS)
@pytest.mark.parametrize(
    ("budget", "set_ids"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (7, [0, 1, 2, 3, 3, 4, 5, 6]),  # 3 and 4 have a cosine of .96
        (6, [0, 1, 2, 2, 3, 3, 4, 5]),  # 5 takes 4 (.8), not 3 (.6); 3 takes 2 (.8), not 1 (0)
        (5, [0, 1, 1, 2, 2, 2, 3, 4]),  # at .6, 5 takes 3 as well, and 2 is left to take 1 (.6)
        (4, [0, 1, 1, 1, 1, 2, 2, 3]),  # at -.6, 6 takes 5, not 4 (-.96); 4 takes all others
        (3, [0, 1, 1, 1, 1, 1, 1, 2]),
    ],
)
def test_a_backward_scan_leaves_the_budget_as_worked_out_by_hand(budget, set_ids, linkage):
    assert golden_sets(budget=budget, linkage=linkage) == set_ids


@pytest.mark.parametrize("linkage", SCANS)
@pytest.mark.parametrize(
    ("threshold", "set_ids"),
    [
        (1.1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.9, [0, 1, 2, 3, 3, 4, 5, 6]),
        (0.7, [0, 1, 2, 2, 3, 3, 4, 5]),
        (0.5, [0, 1, 1, 2, 2, 2, 3, 4]),
        (-0.1, [0, 1, 2, 2, 2, 2, 3, 4]),  # lower, and no fewer sets: 5 takes 2, and 1 is alone
        (-0.7, [0, 1, 1, 1, 1, 2, 2, 3]),
    ],
)
def test_a_backward_scan_at_a_threshold_as_worked_out_by_hand(threshold, set_ids, linkage):
    assert golden_sets(threshold=threshold, linkage=linkage) == set_ids
    assert set_counts(KEYS, PROTECTED, [threshold], linkage=linkage)[0, 0, 0] == set_ids[-1] + 1


@pytest.mark.parametrize("linkage", SCANS)
def test_a_backward_scan_that_leaves_too_many_sets_evicts_as_worked_out_by_hand(linkage):
    found = golden_sets(budget=5, threshold=0.9, linkage=linkage)
    assert found == [0, 1, -1, 2, 2, -1, 3, 4]  # {2} has .4 and {5} .5, the least of the scores


def test_the_sets_of_a_backward_scan_merge_as_worked_out_by_hand():
    ids = merging_sets(KEYS, PROTECTED, budget=5, linkage="anchor")
    assert set_summary(ids, SCORES)[1].tolist() == [[[0, 1, 3, 6, 7]]]
    keys, mean = gaussian_merge(KEYS, VALUES, ids, SCORES)
    # 2 is sqrt(.8) from its pivot 1: weights 1 / (1 + exp(-.8 / 50)) = .504 and .496
    close(keys[0, 0, 1], [0.4032, 0.7984])
    close(mean[0, 0, 1], [1.496])
    close(keys[0, 0, 2], [-0.798936, 0.469079])
    close(mean[0, 0, 2], [11.984034 / 3])


# --- K2: merged states


def test_a_set_of_four_merges_as_worked_out_by_hand():
    ids = merging_sets(KEYS, PROTECTED, budget=5)
    keys, mean = gaussian_merge(KEYS, VALUES, ids, SCORES)
    _, sized = gaussian_merge(KEYS, VALUES, ids, SCORES, value_scale="size")
    close(keys[0, 0, 2], [-0.599525, 0.601594])
    close(mean[0, 0, 2], [3.496816])
    close(sized[0, 0, 2], [13.987263])
    _, weights = gaussian_merge(KEYS, torch.eye(8, dtype=DOUBLE)[None, None], ids, SCORES)
    close(weights[0, 0, 2, 2:6], [0.249595, 0.251600, 0.251198, 0.247607])
    close(weights[0, 0, 2, 2:6] / weights[0, 0, 2, 3], [0.992032, 1, 0.998401, 0.984127])


def test_a_set_of_three_merges_as_worked_out_by_hand():
    ids = merging_sets(KEYS, PROTECTED, budget=6)
    keys, sized = gaussian_merge(KEYS, VALUES, ids, SCORES, value_scale="size")
    close(keys[0, 0, 3], [-0.798936, 0.469079])
    close(sized[0, 0, 3], [11.984034])


# --- K3: sigma rules


def merge_one_set(points, sigma, **settings):
    """Weights, key and sized value of one set whose pivot is the first point."""
    keys = heads(points)
    n = len(points)
    ids = torch.zeros(1, 1, n, dtype=torch.long)
    scores = heads([1.0] + [0.0] * (n - 1))
    key, weights = gaussian_merge(
        keys, torch.eye(n, dtype=DOUBLE)[None, None], ids, scores, sigma=sigma, **settings
    )
    return weights[0, 0, 0], key[0, 0, 0]


@pytest.mark.parametrize(
    ("sigma", "weights", "key", "sized"),
    [
        (5, [0.451863, 0.274069, 0.274069], [0.822206, 2.466618], [3.0, 2.466618]),
        (
            "mean_distance",
            [0.576117, 0.211942, 0.211942],
            [0.635825, 1.907474],
            [3.0, 1.907474],
        ),
        (
            "mean_distance_n",
            [0.825901, 0.087049, 0.087049],
            [0.261148, 0.783444],
            [3.0, 0.783444],
        ),
        ("fixed_point", [1, 0, 0], [0, 0], [3, 0]),
        ("inf", [1 / 3, 1 / 3, 1 / 3], [1, 3], [3, 3]),
        (3.535534, [0.576117, 0.211942, 0.211942], [0.635825, 1.907474], [3.0, 1.907474]),
        (2.357023, [0.825901, 0.087049, 0.087049], [0.261148, 0.783444], [3.0, 0.783444]),
        (0.235702, [1, 0, 0], [0, 0], [3, 0]),
        (math.inf, [1 / 3, 1 / 3, 1 / 3], [1, 3], [3, 3]),
    ],
)
def test_each_sigma_rule_weighs_as_worked_out_by_hand(sigma, weights, key, sized):
    points = [(0, 0), (3, 4), (0, 5)]
    found_weights, found_key = merge_one_set(points, sigma)
    close(found_weights, weights)
    close(found_key, key)
    ids = torch.zeros(1, 1, 3, dtype=torch.long)
    values = heads([(1, 0), (0, 1), (2, 2)])
    _, found = gaussian_merge(
        heads(points), values, ids, heads([1.0, 0, 0]), sigma=sigma, value_scale="size"
    )
    close(found[0, 0, 0], sized)


def test_the_fixed_point_of_sigma_is_reached():
    weights, _ = merge_one_set([(0,), (0.1,), (0.2,)], "fixed_point")
    gauss = weights / weights[0]
    close(gauss, [1, 0.989706, 0.959454])
    for distance, bell in ((0.1, gauss[1]), (0.2, gauss[2])):
        assert distance / math.sqrt(-2 * math.log(bell)) == pytest.approx(0.695124, abs=1e-5)


@pytest.mark.parametrize(("size", "bell"), [(2, 0.5485), (3, 0.1295), (5, 0.0001)])
def test_fixed_point_degenerates_to_the_pivot(size, bell):
    weights, _ = merge_one_set([(0.0,)] + [(0.6,)] * (size - 1), "fixed_point")
    close(weights / weights[0], [1] + [bell] * (size - 1), atol=6e-5)


@pytest.mark.parametrize("distance", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    ("rule", "bell"), [("mean_distance", math.exp(-1)), ("mean_distance_n", math.exp(-4))]
)
def test_mean_distance_of_a_pair_is_free_of_scale(rule, bell, distance):
    weights, _ = merge_one_set([(0.0, 0.0), (0.0, distance)], rule)
    close(weights, [1 / (1 + bell), bell / (1 + bell)])


# --- K4 and K5: what a query gets


def attend(query, keys, values, scale, *, log_size=None):
    logits = keys @ query * scale
    if log_size is not None:
        logits = logits + log_size
    return float(logits.softmax(-1) @ values[:, 0])


def outputs(query, keys, values, ids, scores, scale, sigma=5.0):
    """The query's output over the merged head: unscaled, size-scaled, log-size biased."""
    merged, mean = (t[0, 0] for t in gaussian_merge(keys, values, ids, scores, sigma=sigma))
    _, sized = gaussian_merge(keys, values, ids, scores, sigma=sigma, value_scale="size")
    sizes = set_summary(ids, scores)[0][0, 0]
    query = torch.tensor(query, dtype=DOUBLE)
    return (
        attend(query, merged, mean, scale),
        attend(query, merged, sized[0, 0], scale),
        attend(query, merged, mean, scale, log_size=sizes.double().log()),
    )


def test_a_log_size_bias_gives_what_scaled_values_overshoot():
    keys = heads([[0], [0], [0], [math.log(3)]])
    values = heads([[1], [1], [1], [4]])
    ids = torch.tensor([[[0, 0, 0, 1]]])
    found = outputs([1.0], keys, values, ids, torch.ones(1, 1, 4, dtype=DOUBLE), scale=1.0)
    assert found == pytest.approx((3.25, 3.75, 2.5), abs=1e-5)
    assert attend(torch.ones(1, dtype=DOUBLE), keys[0, 0], values[0, 0], 1.0) == pytest.approx(2.5)
    assert found[1] / found[2] == pytest.approx(1.5)  # rho


def test_one_query_end_to_end_golden():
    ids = merging_sets(KEYS, PROTECTED, budget=5)
    query, scale = [1.0, 0.0], 2**-0.5
    found = outputs(query, KEYS, VALUES, ids, SCORES, scale)
    assert found == pytest.approx((3.427179, 4.285410, 3.440902), abs=1e-5)
    assert found[1] / found[2] == pytest.approx(1.245432, abs=1e-5)
    full = attend(torch.tensor(query, dtype=DOUBLE), KEYS[0, 0], VALUES[0, 0], scale)
    assert full == pytest.approx(3.362433, abs=1e-5)


# --- merging sets against the slow version

# Keys whose norms and products are exact in binary, so that equal cosines are equal numbers.
AXES = [[s if d == axis else 0.0 for d in range(4)] for axis in range(4) for s in (1.0, -1.0)]
SIGNS = [[1.0 if bits >> d & 1 else -1.0 for d in range(4)] for bits in range(16)]
EXACT_KEYS = torch.tensor([[0.0] * 4, *AXES, *SIGNS], dtype=DOUBLE)


@st.composite
def problems(draw):
    """keys, protected, scores of a few heads, with ties or without."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 11)))
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        chosen = torch.randint(len(EXACT_KEYS), shape, generator=generator)
        lengths = 2.0 ** torch.randint(-2, 3, shape, generator=generator)
        keys = EXACT_KEYS[chosen] * lengths[..., None]
        scores = torch.randint(0, 4, shape, generator=generator).double()
    else:
        keys = torch.randn(*shape, 4, generator=generator, dtype=DOUBLE)
        keys[..., 0] += draw(st.sampled_from([0.0, 2.0]))  # neighbours alike, as real ones are
        scores = torch.rand(shape, generator=generator, dtype=DOUBLE)
    share = draw(st.sampled_from([0.0, 0.2, 0.6]))
    protected = torch.rand(shape, generator=generator) < share
    return keys, protected, scores


def same_as_oracle(keys, protected, scores, **settings):
    found = merging_sets(keys, protected, scores=scores, **settings)
    assert found.dtype == torch.int64
    wanted = oracles.each_head(
        lambda k, p, s: oracles.merging_sets(k, p, s, **settings), keys, protected, scores
    )
    assert found.flatten(0, 1).tolist() == wanted
    return found


def feasible_budget(draw, protected):
    return draw(st.integers(max(1, int(protected.sum(-1).max())), protected.shape[-1]))


@quick
@given(problems(), st.data())
def test_exact_links_equal_the_slow_version(problem, data):
    keys, protected, scores = problem
    budget = feasible_budget(data.draw, protected)
    ids = same_as_oracle(keys, protected, scores, budget=budget)
    assert (ids.amax(-1) + 1 == budget).all()


@quick
@given(problems(), st.sampled_from([-1.1, -0.5, 0.0, 0.5, 0.75, 1.0]))
def test_eps_free_equals_the_slow_version(problem, threshold):
    same_as_oracle(*problem, threshold=threshold)


@quick
@given(problems(), st.data(), st.sampled_from([-1.1, -0.5, 0.0, 0.5, 0.75, 1.0]))
def test_eps_evict_equals_the_slow_version(problem, data, threshold):
    keys, protected, scores = problem
    budget = feasible_budget(data.draw, protected)
    ids = same_as_oracle(keys, protected, scores, budget=budget, threshold=threshold)
    assert (ids.amax(-1) + 1 == budget).all()


@quick
@given(
    problems(),
    st.sampled_from(["anchor", "complete"]),
    st.sampled_from([-1.1, -0.5, 0.0, 0.5, 0.75]),
    st.booleans(),
    st.data(),
)
def test_scanning_linkages_equal_the_literal_scan(problem, linkage, threshold, budgeted, data):
    keys, protected, scores = problem
    budget = feasible_budget(data.draw, protected) if budgeted else None
    same_as_oracle(keys, protected, scores, threshold=threshold, linkage=linkage, budget=budget)


@quick
@given(problems(), st.sampled_from(LINKAGES))
def test_sets_are_counted_as_they_are_found(problem, linkage):
    keys, protected, scores = problem
    thresholds = [-1.1, -0.5, 0.1, 0.6, 0.75]
    found = set_counts(keys, protected, thresholds, linkage=linkage)
    for i, threshold in enumerate(thresholds):
        ids = merging_sets(keys, protected, threshold=threshold, scores=scores, linkage=linkage)
        assert torch.equal(found[..., i], ids.amax(-1) + 1)


@quick
@given(problems(), st.sampled_from(["anchor", "complete"]), st.data())
def test_scanning_linkages_equal_the_literal_scan_at_a_budget(problem, linkage, data):
    keys, protected, scores = problem
    budget = feasible_budget(data.draw, protected)
    ids = same_as_oracle(keys, protected, scores, budget=budget, linkage=linkage)
    assert (ids.amax(-1) + 1 == budget).all()


@quick
@given(
    problems(),
    st.sampled_from([None, -1.1, 0.0, 0.5]),
    st.booleans(),
    st.sampled_from(["split", "keep"]),
    st.data(),
)
def test_a_threshold_with_a_budget_equals_the_slow_version(
    problem, threshold, budgeted, underfill, data
):
    keys, protected, scores = problem
    budget = None
    if budgeted or threshold is None:
        budget = feasible_budget(data.draw, protected)
    ids = same_as_oracle(
        keys,
        protected,
        scores,
        budget=budget,
        threshold=threshold,
        underfill=underfill,
    )
    sizes = set_summary(ids, scores)[0]
    if budget is not None:
        counts = (sizes > 0).sum(-1)
        assert (counts <= budget).all()
        if threshold is None or underfill == "split":
            assert (counts == budget).all()


def test_keep_leaves_fewer_sets_than_the_budget_and_split_does_not():
    """Ten equal keys are one set above any threshold: `keep` does not fill the budget of eight."""
    keys, protected = torch.ones(1, 1, 10, 4), torch.zeros(1, 1, 10, dtype=torch.bool)
    kept = merging_sets(keys, protected, budget=8, threshold=0.5, underfill="keep")
    assert kept[0, 0].tolist() == [0] * 10
    split = merging_sets(keys, protected, budget=8, threshold=0.5, underfill="split")
    assert split[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]


@quick
@given(problems(), st.sampled_from(LINKAGES), st.data())
def test_sets_are_runs_that_leave_protected_tokens_alone(problem, linkage, data):
    keys, protected, scores = problem
    budget = feasible_budget(data.draw, protected)
    ids = merging_sets(keys, protected, budget=budget, scores=scores, linkage=linkage)
    sizes, pivots, set_scores = set_summary(ids, scores)
    for head, fixed in zip(ids.flatten(0, 1).tolist(), protected.flatten(0, 1).tolist(), strict=True):
        kept = [i for i in head if i >= 0]
        assert kept == sorted(kept)
        assert sorted(set(kept)) == list(range(budget))
        for token, is_fixed in enumerate(fixed):
            if is_fixed:
                assert head.count(head[token]) == 1
                assert head[token] >= 0
    # nothing is lost: every token is in a set or evicted
    assert torch.equal(sizes.sum(-1) + (ids < 0).sum(-1), torch.full_like(ids[..., 0], ids.shape[-1]))
    assert (pivots.diff(dim=-1) > 0).all()
    torch.testing.assert_close(
        set_scores.sum(-1), torch.where(ids >= 0, scores, 0.0).sum(-1), atol=1e-9, rtol=0
    )


def test_float32_keys_are_measured_in_float32():
    """bfloat16 keys must not be compared with bfloat16 arithmetic."""
    keys = normal(1, 2, 60, 16, seed=3).bfloat16()
    protected = torch.zeros(1, 2, 60, dtype=torch.bool)
    assert torch.equal(
        merging_sets(keys, protected, budget=30), merging_sets(keys.double(), protected, budget=30)
    )


def test_protected_may_be_shared_by_the_heads():
    keys = normal(2, 3, 12, 4, seed=1)
    shared = torch.zeros(1, 1, 12, dtype=torch.bool)
    shared[..., -3:] = True
    assert torch.equal(
        merging_sets(keys, shared, budget=8),
        merging_sets(keys, shared.expand(2, 3, 12), budget=8),
    )


def test_a_zero_key_has_cosine_zero():
    assert cosine(torch.zeros(4), torch.ones(4)) == 0
    assert cosine(torch.zeros(4), torch.zeros(4)) == 0
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([8.0, 6.0])).item() == pytest.approx(0.96)


def test_merging_sets_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="needs a budget, a threshold, or both"):
        merging_sets(KEYS, PROTECTED)
    with pytest.raises(ValueError, match="2 protected tokens do not fit a budget of 1"):
        merging_sets(KEYS, PROTECTED, budget=1)
    with pytest.raises(UserError, match=r"unknown linkage 'anchr'\. Did you mean 'anchor'"):
        merging_sets(KEYS, PROTECTED, budget=5, linkage="anchr")
    with pytest.raises(UserError, match="unknown underfill 'fill'"):
        merging_sets(KEYS, PROTECTED, budget=5, underfill="fill")
    # sets must be evicted here, and only scores can say which
    with pytest.raises(ValueError, match="scores are needed"):
        merging_sets(KEYS, PROTECTED, budget=5, threshold=0.9)


# --- merged states against the slow version


@st.composite
def partitions(draw):
    """keys, values, set ids, scores of a few heads with the same number of sets, or not."""
    keys, protected, scores = draw(problems())
    values = normal(*keys.shape[:3], 3, seed=draw(st.integers(0, 999)), dtype=DOUBLE)
    if draw(st.booleans()):
        ids = merging_sets(keys, protected, threshold=draw(st.sampled_from([-1.1, 0.0, 0.5])))
    else:
        ids = merging_sets(
            keys, protected, scores=scores, budget=feasible_budget(draw, protected), threshold=0.5
        )
    return keys, values, ids, scores


@quick
@given(
    partitions(),
    st.sampled_from([0.3, 5.0, *SIGMA_RULES]),
    st.sampled_from(VALUE_SCALES),
    st.sampled_from(["score", "first", "last"]),
    st.booleans(),
)
def test_gaussian_merge_equals_the_slow_version(partition, sigma, value_scale, pivot, with_sizes):
    keys, values, ids, scores = partition
    sizes = torch.randint(1, 5, ids.shape, generator=torch.Generator().manual_seed(1))
    settings = {"sigma": sigma, "value_scale": value_scale, "pivot": pivot}
    found_keys, found_values = gaussian_merge(
        keys, values, ids, scores, sizes=sizes if with_sizes else None, **settings
    )
    n_sets = int(ids.max()) + 1
    assert found_keys.shape == (*keys.shape[:2], n_sets, keys.shape[-1])
    wanted = oracles.each_head(
        lambda k, v, i, s, n: oracles.gaussian_merge(
            k, v, i, s, sizes=n if with_sizes else None, **settings
        ),
        keys,
        values,
        ids,
        scores,
        sizes,
    )
    for key, value, head in zip(
        found_keys.flatten(0, 1), found_values.flatten(0, 1), wanted, strict=True
    ):
        for set_id, (wanted_key, wanted_value) in enumerate(head):
            close(key[set_id], wanted_key, atol=1e-6)
            close(value[set_id], wanted_value, atol=1e-6)
        assert not key[len(head) :].any()  # padding of heads with fewer sets
        assert not value[len(head) :].any()


@quick
@given(partitions())
def test_set_summary_equals_the_slow_version(partition):
    _, _, ids, scores = partition
    sizes, pivots, sums = set_summary(ids, scores)
    wanted = oracles.each_head(oracles.set_summary, ids, scores)
    for head, found in enumerate(
        zip(sizes.flatten(0, 1), pivots.flatten(0, 1), sums.flatten(0, 1), strict=True)
    ):
        n_sets = len(wanted[head])
        columns = list(zip(*wanted[head], strict=True))
        assert found[0][:n_sets].tolist() == list(columns[0])
        assert found[1][:n_sets].tolist() == list(columns[1])
        close(found[2][:n_sets], columns[2])
        assert not found[0][n_sets:].any()
        assert (found[1][n_sets:] == -1).all()
        assert not found[2][n_sets:].any()


def test_pivot_by_a_tensor_of_its_own():
    """Random pivots: the ranking chooses the pivot, and the scores do not."""
    ids = torch.zeros(1, 1, 3, dtype=torch.long)
    keys = heads([(0, 0), (3, 4), (0, 5)])
    values = torch.eye(3, dtype=DOUBLE)[None, None]
    ranking = heads([0.1, 0.2, 0.9])
    _, weights = gaussian_merge(keys, values, ids, heads([9.0, 0, 0]), sigma=0.1, pivot=ranking)
    close(weights, [[[[0, 0, 1]]]])


@quick
@given(partitions(), st.sampled_from([0.3, 5.0, *SIGMA_RULES]))
def test_merged_states_are_convex_with_the_pivot_heaviest(partition, sigma):
    keys, _, ids, scores = partition
    tokens = torch.eye(ids.shape[-1], dtype=DOUBLE).expand(*ids.shape[:2], -1, -1)
    merged, weights = gaussian_merge(keys, tokens, ids, scores, sigma=sigma)
    sizes, pivots, _ = set_summary(ids, scores)
    real = sizes > 0
    assert (weights >= 0).all()
    close(weights.sum(-1)[real], [1.0] * int(real.sum()), atol=1e-9)
    at_pivot = weights.gather(-1, pivots.clamp_min(0).unsqueeze(-1))[..., 0]
    assert (at_pivot[real] >= weights.amax(-1)[real] - 1e-12).all()
    # a token has weight in its own set only
    inside = ids[:, :, None] == torch.arange(sizes.shape[-1])[None, None, :, None]
    assert not weights[~inside].any()
    for axis in range(keys.shape[-1]):
        of = keys[..., axis][:, :, None].expand_as(inside)
        low = of.masked_fill(~inside, math.inf).amin(-1)
        high = of.masked_fill(~inside, -math.inf).amax(-1)
        assert (merged[..., axis][real] >= low[real] - 1e-9).all()
        assert (merged[..., axis][real] <= high[real] + 1e-9).all()


@quick
@given(partitions(), st.sampled_from([5.0, *SIGMA_RULES]), st.sampled_from(VALUE_SCALES))
def test_singletons_are_unchanged_bit_for_bit(partition, sigma, value_scale):
    for dtype in (torch.float32, torch.bfloat16):
        keys, values, ids, scores = (t.to(dtype) if t.is_floating_point() else t for t in partition)
        merged = gaussian_merge(keys, values, ids, scores, sigma=sigma, value_scale=value_scale)
        sizes, pivots, _ = set_summary(ids, scores)
        for state, before in zip(merged, (keys, values), strict=True):
            assert state.dtype == dtype
            index = pivots.clamp_min(0).unsqueeze(-1).expand_as(state)
            assert torch.equal(state[sizes == 1], before.gather(2, index)[sizes == 1])


@quick
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    sigma=st.sampled_from([5.0, *SIGMA_RULES]),
    seed=st.integers(0, 999),
)
def test_identical_members_with_log_size_are_full_attention(sizes, sigma, seed):
    sizes = torch.tensor(sizes)
    ids = torch.arange(len(sizes)).repeat_interleave(sizes)[None, None]
    distinct_keys = normal(len(sizes), 4, seed=seed, dtype=DOUBLE)
    distinct_values = normal(len(sizes), 1, seed=seed + 1, dtype=DOUBLE)
    keys, values = distinct_keys[ids], distinct_values[ids]
    scores = normal(*ids.shape, seed=seed + 2, dtype=DOUBLE).abs()
    merged, mean = gaussian_merge(keys, values, ids, scores, sigma=sigma)
    close(merged[0, 0], distinct_keys.tolist(), atol=1e-9)
    close(mean[0, 0], distinct_values.tolist(), atol=1e-9)
    query = normal(4, seed=seed + 3, dtype=DOUBLE)
    full = attend(query, keys[0, 0], values[0, 0], 0.5)
    counted, _, _ = set_summary(ids, scores)
    biased = attend(query, merged[0, 0], mean[0, 0], 0.5, log_size=counted[0, 0].double().log())
    assert biased == pytest.approx(full, abs=1e-6)


def test_merging_merged_entries_weighs_them_by_size():
    """Two tokens merged with a third equal all three merged at once, when the weights are equal."""
    keys, values = normal(1, 1, 3, 4, seed=1, dtype=DOUBLE), normal(1, 1, 3, 2, seed=2, dtype=DOUBLE)
    scores = torch.ones(1, 1, 3, dtype=DOUBLE)
    for value_scale in VALUE_SCALES:
        at_once = gaussian_merge(
            keys,
            values,
            torch.zeros(1, 1, 3, dtype=torch.long),
            scores,
            sigma="inf",
            value_scale=value_scale,
        )
        pair = gaussian_merge(
            keys, values, torch.tensor([[[0, 0, 1]]]), scores, sigma="inf", value_scale=value_scale
        )
        again = gaussian_merge(
            *pair,
            torch.zeros(1, 1, 2, dtype=torch.long),
            scores[..., :2],
            sigma="inf",
            value_scale=value_scale,
            sizes=torch.tensor([[[2, 1]]]),
        )
        for found, wanted in zip(again, at_once, strict=True):
            torch.testing.assert_close(found, wanted)


def test_half_precision_is_merged_in_float32():
    keys, values = normal(1, 2, 40, 8, seed=1).half(), normal(1, 2, 40, 8, seed=2).half()
    scores = normal(1, 2, 40, seed=3).abs()
    ids = merging_sets(keys, torch.zeros(1, 2, 40, dtype=torch.bool), budget=15)
    found = gaussian_merge(keys, values, ids, scores)
    exact = gaussian_merge(keys.double(), values.double(), ids, scores)
    for half, double in zip(found, exact, strict=True):
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.double(), double.half().double(), atol=0, rtol=1e-3)


def test_gaussian_merge_refuses_unknown_names():
    ids = torch.zeros(1, 1, 8, dtype=torch.long)
    with pytest.raises(UserError, match="unknown sigma rule 'mean'"):
        gaussian_merge(KEYS, VALUES, ids, SCORES, sigma="mean")
    with pytest.raises(UserError, match="unknown value_scale 'sized'"):
        gaussian_merge(KEYS, VALUES, ids, SCORES, value_scale="sized")
    with pytest.raises(UserError, match="unknown pivot 'best'"):
        gaussian_merge(KEYS, VALUES, ids, SCORES, pivot="best")
