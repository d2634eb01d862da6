"""KVMerger on one layer: counts, protection, options, and its limiting cases."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmerge.budget import Budget
from kvmerge.cache import append_entry
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance, DecodeStep
from kvmerge.rope import Rope
from tests.kvmerge import oracles
from tests.tiny import generator, layer, normal, quick


def allowance(budget, length, seed=0):
    budget = Budget.parse(budget)
    return Allowance(budget.entries(length), budget.fraction(length), generator(seed))


def compress(method, layer_, budget, seed=0):
    return method.compress(layer_, allowance(budget, layer_.length, seed))


# --- counts


@pytest.mark.parametrize(
    ("budget", "length", "recent", "top", "merged"),
    [
        (0.5, 3500, 595, 420, 735),  # the paper's two budgets
        (0.35, 3500, 280, 70, 875),
        (1750, 3500, 595, 420, 735),
        (1225, 3500, 280, 70, 875),
        (0.5, 100, 17, 12, 21),
        (0.35, 100, 8, 2, 25),
        (0.425, 1000, 125, 70, 230),  # halfway between them
        (0.2, 1000, 20, 0, 180),  # below: at least .02 recent, no negative top
        (0.8, 1000, 350, 320, 130),  # above: the same line
        (0.5, 4, 1, 0, 1),
        (0.1, 20, 1, 0, 1),
        (0.95, 1000, 440, 420, 90),
    ],
)
def test_protected_tokens_are_the_papers_shares_and_leave_room_to_merge(
    budget, length, recent, top, merged
):
    given_ = allowance(budget, length)
    assert KVMerger().protected_counts(given_, length) == (recent, top)
    assert given_.n_keep - recent - top == merged


def test_protected_counts_shrink_top_first_then_recent():
    """Room for one merged entry is made from the top tokens first."""
    method = KVMerger(recent=0.3, top=0.3)
    assert method.protected_counts(allowance(50, 100), 100) == (30, 19)
    assert method.protected_counts(allowance(31, 100), 100) == (30, 0)
    assert method.protected_counts(allowance(20, 100), 100) == (19, 0)
    assert method.protected_counts(allowance(2, 100), 100) == (1, 0)


@quick
@given(budget=st.one_of(st.floats(0.01, 0.999), st.integers(2, 300)), length=st.integers(3, 300))
def test_protected_counts_leave_room_to_merge(budget, length):
    given_ = allowance(budget, length)
    if given_.n_keep >= length:
        return
    if given_.n_keep == 1:
        with pytest.raises(UserError, match=f"at least 2 entries.* 1 of {length} prompt"):
            KVMerger().protected_counts(given_, length)
        return
    recent, top = KVMerger().protected_counts(given_, length)
    assert recent >= 1
    assert top >= 0
    assert recent + top < given_.n_keep


def test_settings_replace_the_papers_fractions():
    assert KVMerger(recent=0.1, top=0.0).protected_counts(allowance(0.5, 200), 200) == (20, 0)
    assert KVMerger(recent=0.0).protected_counts(allowance(0.5, 200), 200)[0] == 1


# --- one layer, step by step


def literal(layer_, head, n_keep, recent, top, **settings):
    """KVMerger on one head, from the slow versions: `[(position, size, key, value)]`."""
    scores = layer_.scores[0, head]
    length = layer_.length
    fixed = {*range(length - recent, length)}
    fixed |= set(oracles.best_positions(scores.tolist()[: length - recent], top))
    protected = torch.tensor([token in fixed for token in range(length)])
    ids = torch.tensor(
        oracles.merging_sets(layer_.keys[0, head], protected, scores, budget=n_keep, linkage="anchor")
    )
    merged = oracles.gaussian_merge(
        layer_.keys[0, head], layer_.values[0, head], ids, scores, **settings
    )
    return [
        (position, size, key, value)
        for (size, position, _), (key, value) in zip(
            oracles.set_summary(ids, scores), merged, strict=True
        )
    ]


@pytest.mark.parametrize("value_scale", ["none", "size"])
@pytest.mark.parametrize("sigma", [5.0, 1.0, "mean_distance"])
@pytest.mark.parametrize("budget", [0.35, 0.5, 7])
def test_compress_equals_the_slow_version(budget, sigma, value_scale):
    before = layer(50, seed=4)
    kept = compress(KVMerger(sigma=sigma, value_scale=value_scale), before, budget)
    n_keep = Budget.parse(budget).entries(50)
    recent, top = KVMerger().protected_counts(allowance(budget, 50), 50)
    for head in range(2):
        wanted = literal(before, head, n_keep, recent, top, sigma=sigma, value_scale=value_scale)
        positions, sizes, keys, values = map(list, zip(*wanted, strict=True))
        assert kept.positions[0, head].tolist() == positions
        assert kept.sizes[0, head].tolist() == sizes
        torch.testing.assert_close(kept.keys[0, head], torch.tensor(keys), atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(kept.values[0, head], torch.tensor(values), atol=1e-5, rtol=1e-6)


def test_top_tokens_are_the_best_before_the_recent_ones():
    """A recent token with a high score takes no place among the top tokens."""
    scores = torch.zeros(1, 2, 50)
    scores[..., 49] = 100.0
    scores[..., [3, 20, 30]] = torch.tensor([3.0, 2.0, 1.0])
    before = layer(50, scores=scores)
    kept = compress(KVMerger(recent=0.1, top=0.04), before, 0.3)
    for head in range(2):
        positions = kept.positions[0, head].tolist()
        at = [positions.index(token) for token in (3, 20, *range(45, 50))]
        assert kept.sizes[0, head, at].tolist() == [1] * 7
        assert torch.equal(kept.keys[0, head, at], before.keys[0, head, [3, 20, *range(45, 50)]])


def test_sizes_count_every_token():
    kept = compress(KVMerger(), layer(80), 0.35)
    assert kept.sizes.sum(-1).tolist() == [[80, 80]]
    assert kept.sizes.dtype == torch.int64
    assert kept.positions.dtype == torch.int64
    assert kept.bias is None


def test_log_size_adds_the_logarithm_of_each_sets_size():
    kept = compress(KVMerger(attn_bias="log_size"), layer(80), 0.35)
    torch.testing.assert_close(kept.bias, kept.sizes.float().log())
    assert kept.bias.dtype == torch.float32
    assert (kept.bias[kept.sizes == 1] == 0).all()


def test_identical_neighbours_with_log_size_are_full_attention():
    """Merging loses nothing where the members coincide and their number is told."""
    base = layer(60, seed=2)
    run = torch.arange(60) // 3
    before = replace(base, keys=base.keys[:, :, run], values=base.values[:, :, run])
    kept = compress(KVMerger(attn_bias="log_size", recent=0.0, top=0.0), before, 0.5)
    queries = normal(4, 1, 8, seed=9)
    # the query's own entry comes last, with no bias
    new_key, new_value = normal(2, 1, 8, seed=10), normal(2, 1, 8, seed=11)
    full = oracles.attend(
        queries,
        torch.cat([before.keys[0], new_key], 1),
        torch.cat([before.values[0], new_value], 1),
        before.softmax.scale,
    )
    found = oracles.attend(
        queries,
        torch.cat([kept.keys[0], new_key], 1),
        torch.cat([kept.values[0], new_value], 1),
        before.softmax.scale,
        torch.cat([kept.bias[0], torch.zeros(2, 1)], 1),
    )
    torch.testing.assert_close(found, full, atol=1e-6, rtol=0)


# --- limiting cases and options


def test_a_threshold_above_one_merges_nothing():
    before = layer(40)
    kept = compress(KVMerger(budget_mode="eps_free", epsilon=1.1), before, 0.35)
    assert torch.equal(kept.keys, before.keys)
    assert torch.equal(kept.values, before.values)
    assert kept.positions.tolist() == [[list(range(40))] * 2]
    assert (kept.sizes == 1).all()
    assert kept.bias is None


def test_sigma_inf_is_mean_pooling():
    before = layer(60, seed=5)
    pooled = compress(KVMerger(sigma="inf"), before, 0.35)
    for head in range(2):
        sizes = pooled.sizes[0, head].tolist()
        for state, merged in ((before.keys, pooled.keys), (before.values, pooled.values)):
            means = [run.mean(0) for run in state[0, head].split(sizes)]
            torch.testing.assert_close(merged[0, head], torch.stack(means), atol=1e-6, rtol=0)
    wide = compress(KVMerger(sigma=1e6), before, 0.35)
    torch.testing.assert_close(wide.keys, pooled.keys, atol=1e-6, rtol=0)


def test_a_narrow_gaussian_keeps_the_pivot():
    before = layer(60, seed=5)
    kept = compress(KVMerger(sigma=1e-3), before, 0.35)
    index = kept.positions.unsqueeze(-1).expand_as(kept.keys)
    torch.testing.assert_close(kept.keys, before.keys.gather(2, index))
    torch.testing.assert_close(kept.values, before.values.gather(2, index))


def test_value_scale_size_multiplies_by_the_size():
    before = layer(60)
    mean, sized = (compress(KVMerger(value_scale=scale), before, 0.35) for scale in ("none", "size"))
    torch.testing.assert_close(sized.values, mean.values * mean.sizes.unsqueeze(-1))
    assert torch.equal(sized.keys, mean.keys)


def test_eps_free_pads_heads_of_unequal_length():
    base = layer(40, seed=1)
    keys = base.keys.clone()
    keys[:, 1] += 3.0  # head 1: all alike, so many links
    before = replace(base, keys=keys)
    method = KVMerger(budget_mode="eps_free", epsilon=0.5)
    kept = compress(method, before, 0.35)
    counts = (kept.sizes > 0).sum(-1)[0].tolist()
    assert counts[0] > counts[1]
    assert kept.keys.shape[2] == max(counts)
    real = kept.sizes > 0
    assert (kept.bias[real] == 0).all()
    assert (kept.bias[~real] == -torch.inf).all()
    assert kept.sizes.sum(-1).tolist() == [[40, 40]]
    biased = compress(KVMerger(budget_mode="eps_free", epsilon=0.5, attn_bias="log_size"), before, 0.35)
    assert (biased.bias[~real] == -torch.inf).all()
    torch.testing.assert_close(biased.bias[real], kept.sizes[real].float().log())


@pytest.mark.parametrize("epsilon", [-0.5, 0.3, 0.99])
@pytest.mark.parametrize("linkage", ["adjacent", "anchor", "complete"])
def test_eps_evict_meets_the_budget(epsilon, linkage):
    kept = compress(
        KVMerger(budget_mode="eps_evict", epsilon=epsilon, linkage=linkage), layer(60), 0.35
    )
    assert (kept.sizes > 0).sum(-1).tolist() == [[21, 21]]
    assert (kept.sizes.sum(-1) <= 60).all()
    assert kept.bias is None


@pytest.mark.parametrize("pivot", ["score", "first", "last", "random"])
def test_the_pivot_gives_the_position_and_the_centre(pivot):
    before = layer(60, seed=6)
    kept = compress(KVMerger(pivot=pivot, sigma=1e-3), before, 0.35)
    index = kept.positions.unsqueeze(-1).expand_as(kept.keys)
    torch.testing.assert_close(kept.keys, before.keys.gather(2, index))
    assert (kept.positions.diff(dim=-1) > 0).all()
    ends = kept.sizes.cumsum(-1)
    starts = ends - kept.sizes
    assert (kept.positions >= starts).all()
    assert (kept.positions < ends).all()
    if pivot == "first":
        assert torch.equal(kept.positions, starts)
    if pivot == "last":
        assert torch.equal(kept.positions, ends - 1)


def test_only_random_pivots_draw():
    before = layer(60)
    assert not KVMerger().stochastic
    method = KVMerger(pivot="random", sigma=0.5)
    assert method.stochastic
    first, again, other = (compress(method, before, 0.35, seed) for seed in (1, 1, 2))
    assert torch.equal(first.keys, again.keys)
    assert not torch.equal(first.keys, other.keys)
    assert torch.equal(first.sizes, other.sizes)  # the sets are the same


def test_pre_rope_merging_turns_keys_to_the_pivot_first():
    """Weights are measured on the keys as cached; the average is taken at the pivot's position."""
    rope = Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]))
    before = replace(layer(50, seed=4), rope=rope)
    post, pre = (compress(KVMerger(rope=rope_), before, 0.35) for rope_ in ("post", "pre"))
    assert not KVMerger().needs_rope
    assert KVMerger(rope="pre").needs_rope
    assert torch.equal(pre.positions, post.positions)
    assert torch.equal(pre.values, post.values)
    eye = torch.eye(50)
    for head in range(2):
        ids = torch.arange(17).repeat_interleave(post.sizes[0, head])
        weights = oracles.gaussian_merge(before.keys[0, head], eye, ids, before.scores[0, head])
        for entry, (_, weight) in enumerate(weights):
            pivot = int(post.positions[0, head, entry])
            turned = rope.rotate(before.keys[:, head : head + 1], pivot - torch.arange(50))
            wanted = torch.tensor(weight) @ turned[0, 0]
            torch.testing.assert_close(pre.keys[0, head, entry], wanted, atol=1e-5, rtol=0)


def test_one_key_at_many_positions_is_recovered_by_pre_rope_merging():
    """The same key at every position shrinks when averaged as cached; turned first, it does not."""
    rope = Rope(torch.tensor([1.0, 0.5, 0.2, 0.1]))
    raw = normal(1, 2, 1, 8, seed=3).expand(1, 2, 40, 8)
    before = replace(layer(40), keys=rope.rotate(raw, torch.arange(40)), rope=rope)
    post, pre = (compress(KVMerger(rope=rope_), before, 0.35) for rope_ in ("post", "pre"))
    index = pre.positions.unsqueeze(-1).expand_as(pre.keys)
    torch.testing.assert_close(pre.keys, before.keys.gather(2, index), atol=1e-5, rtol=0)
    merged = pre.sizes > 1
    assert (post.keys.norm(dim=-1)[merged] < 0.99 * pre.keys.norm(dim=-1)[merged]).all()


# --- while decoding


def decode_step(entries, budget, length, number, seed=0):
    weights = normal(1, 4, entries.keys.shape[2], seed=seed).softmax(-1)
    return DecodeStep(
        weights=weights,
        prompt_length=length,
        layer_idx=0,
        step=number,
        allowance=allowance(budget, length),
    )


def with_new_token(entries, seed, position):
    key, value = normal(1, 2, 1, 8, seed=seed), normal(1, 2, 1, 8, seed=seed + 1)
    return append_entry(entries, key, value, position)


@pytest.mark.parametrize("value_scale", ["none", "size"])
def test_hold_merges_merged_entries_again(value_scale):
    method = KVMerger(value_scale=value_scale, merge_every=2, sigma=2.0)
    before = layer(50, seed=4)
    entries = compress(method, before, 0.35)
    torch.testing.assert_close(entries.scores.sum(-1), before.scores.sum(-1))
    entries = with_new_token(entries, 20, 50)
    step = decode_step(entries, 0.35, 50, 0)
    held = method.hold(entries, step)
    assert held.keys.shape[2] == 18  # not due: the cache overshoots
    torch.testing.assert_close(held.scores, entries.scores + step.mass(2))
    entries = with_new_token(held, 30, 51)
    step = decode_step(entries, 0.35, 50, 1)
    held = method.hold(entries, step)
    recent, top = method.protected_counts(allowance(0.35, 50), 50)
    for head in range(2):
        scores = (entries.scores + step.mass(2))[0, head]
        fixed = {*range(19 - recent, 19)}
        fixed |= set(oracles.best_positions(scores.tolist()[: 19 - recent], top))
        protected = torch.tensor([slot in fixed for slot in range(19)])
        ids = torch.tensor(
            oracles.merging_sets(entries.keys[0, head], protected, scores, budget=17, linkage="anchor")
        )
        merged = oracles.gaussian_merge(
            entries.keys[0, head],
            entries.values[0, head],
            ids,
            scores,
            sigma=2.0,
            value_scale=value_scale,
            sizes=entries.sizes[0, head],
        )
        keys, values = (torch.tensor(states) for states in zip(*merged, strict=True))
        torch.testing.assert_close(held.keys[0, head], keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(held.values[0, head], values, atol=1e-4, rtol=0)
        summary = oracles.set_summary(ids, scores)
        assert held.positions[0, head].tolist() == [
            int(entries.positions[0, head, slot]) for _, slot, _ in summary
        ]
    assert held.sizes.sum(-1).tolist() == [[52, 52]]
    torch.testing.assert_close(held.scores.sum(-1), (entries.scores + step.mass(2)).sum(-1))


def test_only_a_cache_with_a_budget_can_return_to_it():
    assert KVMerger().holds
    assert KVMerger(budget_mode="eps_evict").holds
    assert not KVMerger(budget_mode="eps_free").holds
    assert not KVMerger(budget_mode="eps_evict", underfill="keep").holds


# --- a threshold for each layer


def test_layer_thresholds_come_from_the_file(tmp_path):
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps([0.9, -0.5]))
    method = KVMerger(budget_mode="eps_layer", thresholds=str(file))
    assert method.layer_thresholds() == [0.9, -0.5]
    for layer_idx, epsilon in ((0, 0.9), (1, -0.5)):
        before = replace(layer(60), layer_idx=layer_idx)
        found = compress(method, before, 0.35)
        wanted = compress(KVMerger(budget_mode="eps_evict", epsilon=epsilon), before, 0.35)
        assert torch.equal(found.sizes, wanted.sizes)
    with pytest.raises(UserError, match="has 2 layers; the model has more"):
        compress(method, replace(layer(60), layer_idx=2), 0.35)


def test_thresholds_that_are_part_of_the_package_are_taken_by_their_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = KVMerger(budget_mode="eps_layer", thresholds="smollm2-135m@0.35")
    assert len(method.layer_thresholds()) == 30
    assert all(-1 < threshold < 1 for threshold in method.layer_thresholds())
    with pytest.raises(UserError, match=r"cannot be read: .*what is here: .*smollm2-135m@0\.35"):
        KVMerger(budget_mode="eps_layer", thresholds="smollm2-135m@0.36")


@pytest.mark.parametrize("made_for", [{}, {"linkage": "adjacent"}, {"linkage": "complete"}])
def test_thresholds_of_another_linkage_are_refused(tmp_path, made_for):
    """A file of an earlier version does not say: it was made for neighbours."""
    file = tmp_path / "thresholds.json"
    file.write_text(json.dumps({"thresholds": [0.5], **made_for}))
    linkage = made_for.get("linkage", "adjacent")
    settings = {"budget_mode": "eps_layer", "thresholds": str(file)}
    assert KVMerger(linkage=linkage, **settings).layer_thresholds() == [0.5]
    with pytest.raises(UserError, match=f"calibrated for linkage={linkage}, not anchor; give linkage="):
        KVMerger(**settings)


@pytest.mark.parametrize(
    "content", ["", "{}", '["a"]', '{"thresholds": 0.5, "linkage": "anchor"}', "[1, null]"]
)
def test_thresholds_that_cannot_be_used(tmp_path, content):
    file = tmp_path / "thresholds.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"thresholds=.*thresholds\.json"):
        KVMerger(budget_mode="eps_layer", thresholds=str(file))


def test_layer_thresholds_and_their_mode_need_each_other(tmp_path):
    file = tmp_path / "thresholds.json"
    with pytest.raises(UserError, match="need each other"):
        KVMerger(budget_mode="eps_layer")
    with pytest.raises(UserError, match="need each other"):
        KVMerger(thresholds=str(file))
    with pytest.raises(UserError, match="cannot be read"):
        KVMerger(budget_mode="eps_layer", thresholds=str(file))


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"underfill": "fill"}, "unknown underfill 'fill'.*keep, split"),
        ({"rope": "none"}, "unknown rope 'none'.*post, pre"),
        ({"merge_every": 0}, "merge_every=0 must be a whole number of 1 or more"),
        ({"merge_every": 2.0}, "merge_every=2.0 must be a whole number"),
        ({"budget_mode": "exact"}, r"unknown budget_mode 'exact'\. Did you mean 'exact_links'"),
        ({"attn_bias": "logsize"}, "unknown attn_bias 'logsize'.*log_size"),
        ({"value_scale": "sizes"}, "unknown value_scale 'sizes'.*'size'"),
        ({"linkage": "single"}, "unknown linkage 'single'.*adjacent, anchor, complete"),
        ({"pivot": "best"}, "unknown pivot 'best'.*first, last, random, score"),
        ({"sigma": "mean"}, "unknown sigma rule 'mean'.*fixed_point"),
        ({"sigma": 0}, "sigma=0 must be a positive"),
        ({"sigma": -1.0}, "sigma=-1.0 must be a positive"),
        ({"sigma": math.nan}, "sigma=nan must be a positive"),
        ({"attn_bias": "log_size", "value_scale": "size"}, "counts set sizes twice"),
        ({"recent": 1.0}, r"recent=1.0 must be a fraction of the prompt in \[0, 1\)"),
        ({"top": -0.1}, r"top=-0.1 must be a fraction"),
    ],
)
def test_a_setting_out_of_range_is_refused_and_named(settings, message):
    with pytest.raises(UserError, match=message):
        KVMerger(**settings)
