"""CaM: the goldens of the method notes, the sequential loop as oracle, and its limiting cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.cam import CaM, merge_probabilities, merge_values
from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.method import Allowance
from tests.kvmerge import oracles
from tests.tiny import generator, layer, normal, quick

DOUBLE = torch.float64


def certain(length):
    """Scores under which every evicted token merges: each is as good as its rivals."""
    return torch.ones(1, 1, length, dtype=DOUBLE)


# --- goldens


@pytest.mark.parametrize("drawn", [True, False])
def test_what_a_token_receives_it_passes_on(drawn):
    values = torch.tensor([10, 1, 2, 4, 8, 16], dtype=DOUBLE).view(1, 1, 6, 1)
    found = merge_values(
        values,
        certain(6),
        start=1,
        recent=2,
        merge_budget=2,
        generator=generator(0) if drawn else None,
    )
    wanted = torch.tensor([10, 1, 2.5, 5.75, 12.125, 18.875], dtype=DOUBLE)
    torch.testing.assert_close(found[0, 0, :, 0], wanted, atol=1e-5, rtol=0)


def test_banded_scores_see_only_sinks_and_window():
    rows = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [0.7, 0.3, 0, 0, 0, 0],
            [0.6, 0.1, 0.3, 0, 0, 0],
            [0.5, 0, 0.2, 0.3, 0, 0],
            [0.6, 0, 0, 0.1, 0.3, 0],
            [0.5, 0, 0, 0, 0.2, 0.3],
        ],
        dtype=DOUBLE,
    )
    found = merge_probabilities(rows[None, None], start=1, recent=2)
    wanted = torch.tensor([0, 0.173913, 0.178571, 0.117647, 0, 0], dtype=DOUBLE)
    torch.testing.assert_close(found[0, 0], wanted, atol=1e-5, rtol=0)


def test_column_probability_by_hand():
    scores = torch.tensor([[[4.0, 1.0, 2.0, 1.0, 3.0, 0.5]]])
    found = merge_probabilities(scores, start=1, recent=2)
    assert found[0, 0].tolist() == pytest.approx([0, 1 / 4, 2 / 4, 1 / 4, 0, 0])
    found = merge_probabilities(scores, start=0, recent=2)  # no sink competes
    assert found[0, 0].tolist() == pytest.approx([4 / 4, 1 / 2, 2 / 2, 1 / 3, 0, 0])


# --- against the slow version


@st.composite
def problems(draw):
    """values, scores, map, start, recent: of a few heads, with zero scores among them."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 12)))
    length = shape[-1]
    start = draw(st.integers(0, length - 1))
    recent = draw(st.integers(1, length - start))
    seed = draw(st.integers(0, 10**6))
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=random, dtype=DOUBLE)
    if draw(st.booleans()):
        scores = torch.randint(0, 3, shape, generator=random).double()
    logits = 2 * torch.randn(*shape, length, generator=random, dtype=DOUBLE)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    attention = logits.masked_fill(future, -torch.inf).softmax(-1)
    values = torch.randn(*shape, 3, generator=random, dtype=DOUBLE)
    return values, scores, attention, start, recent


@quick
@given(problems())
def test_column_probabilities_equal_the_slow_version(problem):
    _, scores, _, start, recent = problem
    found = merge_probabilities(scores, start=start, recent=recent)
    wanted = oracles.each_head(
        lambda s: oracles.cam_column_probabilities(s, start=start, recent=recent), scores
    )
    torch.testing.assert_close(found.flatten(0, 1), torch.tensor(wanted, dtype=DOUBLE))


@quick
@given(problems())
def test_banded_probabilities_equal_the_slow_version(problem):
    _, _, attention, start, recent = problem
    found = merge_probabilities(attention, start=start, recent=recent)
    wanted = oracles.each_head(
        lambda a: oracles.cam_banded_probabilities(a, start=start, recent=recent), attention
    )
    torch.testing.assert_close(found.flatten(0, 1), torch.tensor(wanted, dtype=DOUBLE))


@quick
@given(problems(), st.integers(1, 14), st.booleans(), st.booleans(), st.integers(0, 99))
def test_merged_values_equal_the_loop(problem, merge_budget, drawn, banded, seed):
    values, scores, attention, start, recent = problem
    given_ = attention if banded else scores
    found = merge_values(
        values,
        given_,
        start=start,
        recent=recent,
        merge_budget=merge_budget,
        generator=generator(seed) if drawn else None,
    )
    draw = torch.rand(scores.shape, generator=generator(seed))
    chances = merge_probabilities(given_, start=start, recent=recent)
    wanted = oracles.each_head(
        lambda v, p, d: oracles.cam_merge_values(
            v,
            p.tolist(),
            d if drawn else None,
            start=start,
            recent=recent,
            merge_budget=merge_budget,
        ),
        values,
        chances,
        draw,
    )
    torch.testing.assert_close(found.flatten(0, 1), torch.tensor(wanted, dtype=DOUBLE))


@pytest.mark.parametrize(("merge_budget", "recent"), [(16, 16), (300, 300)])
def test_a_long_prompt_keeps_float32_precision(merge_budget, recent):
    values, scores = normal(1, 2, 1200, 4), normal(1, 2, 1200, seed=1).abs()
    settings = {"start": 4, "recent": recent, "merge_budget": merge_budget, "generator": None}
    found = merge_values(values, scores, **settings)
    exact = merge_values(values.double(), scores.double(), **settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)


def test_half_precision_values_accumulate_in_float32():
    values = normal(1, 1, 400, 4).half()
    scores = torch.ones(1, 1, 400)
    settings = {"start": 2, "recent": 50, "merge_budget": 50, "generator": None}
    found = merge_values(values, scores, **settings)
    exact = merge_values(values.double(), scores.double(), **settings)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, atol=2e-3, rtol=2e-3)


# --- edges


def test_nothing_evicted_changes_nothing():
    values, scores = normal(1, 2, 6, 3), normal(1, 2, 6).abs()
    found = merge_values(values, scores, start=2, recent=4, merge_budget=4, generator=None)
    assert torch.equal(found, values)
    assert not merge_probabilities(scores, start=2, recent=4).any()


def test_no_attention_at_all_is_probability_zero():
    """0 / 0 counts as 0."""
    assert not merge_probabilities(torch.zeros(1, 1, 6), start=1, recent=2).any()


def test_probabilities_are_zero_outside_the_evicted_range():
    scores = normal(2, 3, 20).abs() + 0.1
    found = merge_probabilities(scores, start=3, recent=5)
    assert (found[..., 3:15] > 0).all()
    assert (found <= 1).all()
    assert not found[..., :3].any()
    assert not found[..., 15:].any()


def test_the_draw_decides_as_documented():
    """One `torch.rand(batch, kv_heads, T)`; a token merges where its draw is below p."""
    values, scores = normal(1, 2, 30, 4, dtype=DOUBLE), normal(1, 2, 30, seed=1).abs()
    draw = torch.rand(1, 2, 30, generator=generator(5))
    merges = (draw < merge_probabilities(scores, start=2, recent=6)).double()
    assert 0 < merges.sum() < 44
    found = merge_values(values, scores, start=2, recent=6, merge_budget=6, generator=generator(5))
    wanted = oracles.each_head(
        lambda v, x: oracles.cam_merge_values(v, x.tolist(), None, start=2, recent=6, merge_budget=6),
        values,
        merges,
    )
    torch.testing.assert_close(found.flatten(0, 1), torch.tensor(wanted, dtype=DOUBLE))


# --- the method


@pytest.mark.parametrize(
    ("budget", "length", "start", "recent"),
    [
        (0.5, 3500, 875, 875),
        (0.35, 3500, 613, 612),
        (0.35, 20, 4, 3),
        (11, 20, 6, 5),
        (2, 3, 1, 1),
    ],
)
def test_half_of_the_budget_is_recent_and_the_rest_sinks(budget, length, start, recent):
    before = layer(length, head_dim=2, scores=torch.ones(1, 2, length))
    budget = Budget.parse(budget)
    kept = CaM(sample="expected").compress(
        before, Allowance(budget.entries(length), budget.fraction(length))
    )
    wanted = [*range(start), *range(length - recent, length)]
    assert kept.positions.tolist() == [[wanted] * 2]
    assert torch.equal(kept.keys, before.keys[:, :, wanted])  # keys are never touched


@pytest.mark.parametrize("sample", ["bernoulli", "expected"])
def test_compress_equals_the_loop(sample):
    before = layer(40, seed=2)
    method = CaM(sample=sample)
    draws = generator(9) if method.stochastic else None
    kept = method.compress(before, Allowance(14, 0.35, draws))
    draw = torch.rand(1, 2, 40, generator=generator(9))
    for head in range(2):
        chances = oracles.cam_column_probabilities(before.scores[0, head], start=7, recent=7)
        wanted = oracles.cam_merge_values(
            before.values[0, head],
            chances,
            draw[0, head] if sample == "bernoulli" else None,
            start=7,
            recent=7,
            merge_budget=7,
        )
        torch.testing.assert_close(
            kept.values[0, head], torch.tensor(wanted[:7] + wanted[-7:]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("sample", ["bernoulli", "expected"])
def test_probability_zero_is_plain_eviction(sample):
    scores = torch.ones(1, 2, 40)
    scores[..., 10:30] = 0.0
    before = layer(40, scores=scores)
    method = CaM(sample=sample)
    draws = generator(0) if method.stochastic else None
    kept = method.compress(before, Allowance(20, 0.5, draws))
    wanted = [*range(10), *range(30, 40)]
    assert kept.positions.tolist() == [[wanted] * 2]
    assert torch.equal(kept.values, before.values[:, :, wanted])
    assert torch.equal(kept.keys, before.keys[:, :, wanted])


def test_the_layer_is_not_changed():
    """Other cells of the comparison compress the same layer."""
    before = layer(40)
    copies = [before.values.clone(), before.scores.clone()]
    CaM().compress(before, Allowance(20, 0.5, generator(0)))
    assert torch.equal(before.values, copies[0])
    assert torch.equal(before.scores, copies[1])


def test_only_bernoulli_draws():
    assert CaM().stochastic
    assert not CaM(sample="expected").stochastic
    scores = torch.rand(1, 2, 60, generator=generator(3)) + 0.2
    before = layer(60, scores=scores)
    first, again, other = (
        CaM().compress(before, Allowance(20, 1 / 3, generator(seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)


def test_no_recent_token_to_merge_into():
    with pytest.raises(UserError, match=r"at least 1 recent token.* 1 of 2 prompt tokens"):
        CaM().compress(layer(2), Allowance(1, 0.5, generator(0)))


def test_an_unknown_sample_is_refused():
    with pytest.raises(UserError, match=r"unknown sample 'bernouli'\. Did you mean 'bernoulli'"):
        CaM(sample="bernouli")
