"""Backward scans: the paper's Figure 4, and the literal scan on thousands of cases."""

from __future__ import annotations

import random

import pytest
import torch

from kvmerge.linkage import BAND, SCANS, scan
from kvmerge.merging import merging_sets, pivot_tokens
from tests.kvmerge import oracles

# --- Figure 4 (arXiv 2407.08454): cosines of eight keys, the lower triangle by rows

FIGURE_4 = """
1
.9 1
.8 .9 1
.7 .7 .9 1
.6 .7 .9 .9 1
.7 .6 .8 .8 .9 1
.7 .6 .6 .7 .7 .7 1
.6 .6 .7 .7 .7 .6 .8 1
"""
SCORES = torch.tensor([[[5.3, 2.0, 1.7, 0.4, 3.0, 0.5, 1.9, 6.8]]])


def figure_keys():
    """Unit vectors nearest to the printed map, which is no exact one: an eigenvalue is negative."""
    rows = [[float(cosine) for cosine in line.split()] for line in FIGURE_4.split("\n") if line]
    printed = torch.eye(8, dtype=torch.float64)
    for i, row in enumerate(rows):
        printed[i, : i + 1] = torch.tensor(row)
        printed[: i + 1, i] = torch.tensor(row)
    values, vectors = torch.linalg.eigh(printed)
    keys = vectors * values.clamp_min(0).sqrt()
    keys = keys / keys.norm(dim=-1, keepdim=True)
    assert (keys @ keys.T - printed).abs().max() < 0.0075
    return keys[None, None]


def figure_sets(linkage):
    """Sets at the figure's threshold of .8, which passes: lowered by what the map is off."""
    keys = figure_keys()
    free = torch.zeros(1, 1, 8, dtype=torch.bool)
    return merging_sets(keys, free, threshold=0.795 - 0.003, scores=SCORES, linkage=linkage)


@pytest.mark.parametrize("linkage", SCANS)
def test_figure_4(linkage):
    ids = figure_sets(linkage)
    assert ids[0, 0].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert (pivot_tokens(ids, SCORES)[0, 0] + 1).tolist() == [1, 5, 8]


def test_chaining_neighbours_is_not_what_figure_4_shows():
    assert figure_sets("adjacent")[0, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


# --- the literal scan


def literal(keys, closed, linkage, threshold):
    """Whether each token but the first is linked to the one before it, by the definition."""
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    cosine = (unit @ unit.T).tolist()
    linked, members = [False] * (len(keys) - 1), [len(keys) - 1]
    for token in range(len(keys) - 2, -1, -1):
        compared = members[:1] if linkage == "anchor" else members
        open_ = not closed[token] and not closed[token + 1]
        if open_ and all(cosine[token][member] >= threshold for member in compared):
            linked[token] = True
            members.append(token)
        else:
            members = [token]
    return linked


def a_case(seed):
    """Random, walking, equal, tied and zero keys, with closed tokens anywhere."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    length = draw.choice([1, 2, 3, 7, 40, BAND, BAND + 1, BAND + 2, 200, 300])
    keys = torch.randn(2, 2, length, 4, generator=generator, dtype=torch.float64)
    kind = draw.choice(["noise", "walk", "alike", "equal", "ties", "zeros"])
    if kind == "walk":
        keys = keys.cumsum(dim=2)
    elif kind in ("alike", "equal"):
        keys = 1 + keys * (1e-3 if kind == "alike" else 0)
    elif kind == "ties":
        keys = torch.randint(-1, 2, keys.shape, generator=generator).double()
    elif kind == "zeros":
        keys[:, :, ::3] = 0
    closed = torch.rand(2, 2, length, generator=generator) < draw.choice([0, 0.02, 0.3, 1])
    threshold = draw.choice([-1.5, -0.9, 0.013, 0.5003, 0.83, 0.9501, 0.99, 2])
    return keys, closed, threshold


@pytest.mark.parametrize("linkage", SCANS)
@pytest.mark.parametrize("part", range(4))
def test_sets_at_a_threshold_are_those_of_the_literal_scan(linkage, part):
    """4 x 125 cases of four heads, for either linkage."""
    for seed in range(part * 125, (part + 1) * 125):
        keys, closed, threshold = a_case(seed)
        linked, strength = scan(keys, closed, linkage, threshold=threshold)
        assert (strength[linked] >= threshold).all()
        for found, *head in zip(
            linked.flatten(0, 1), keys.flatten(0, 1), closed.flatten(0, 1), strict=True
        ):
            assert found.tolist() == literal(head[0], head[1].tolist(), linkage, threshold), seed


@pytest.mark.parametrize("linkage", SCANS)
@pytest.mark.parametrize("seed", range(0, 120, 3))
def test_a_budget_is_met_whatever_the_keys(linkage, seed):
    """Wherever the closed tokens leave room, exactly; the same again, and each head as on its own."""
    keys, closed, _ = a_case(seed)
    length = keys.shape[2]
    runs = closed.sum(-1) + (
        ~closed & torch.nn.functional.pad(closed[..., :-1], (1, 0), value=True)
    ).sum(-1)
    scores = torch.ones(keys.shape[:3])
    for share in (0.1, 0.35, 0.8):
        budget = max(int(runs.max()), round(share * length))
        ids = merging_sets(keys, closed, budget=budget, scores=scores, linkage=linkage)
        assert (ids >= 0).all()
        assert (ids[..., -1] + 1 == budget).all()
        again = merging_sets(
            keys[:1, 1:], closed[:1, 1:], budget=budget, scores=scores[:1, 1:], linkage=linkage
        )
        assert torch.equal(again, ids[:1, 1:])


# Keys whose cosines are exact, so that links are equally strong for the slow version, too.
EXACT = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 2, 0, 0], [1, 1, 1, 1], [-1, 1, -1, 1]]).double()


@pytest.mark.parametrize("linkage", SCANS)
@pytest.mark.parametrize("part", range(4))
def test_sets_at_a_budget_are_those_of_the_literal_search(linkage, part):
    """4 x 100 cases of four heads and two budgets, for either linkage."""
    for seed in range(part * 100, (part + 1) * 100):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        length = draw.choice([2, 3, 7, 16, 24])
        keys = torch.randn(2, 2, length, 4, generator=generator, dtype=torch.float64)
        kind = draw.choice(["noise", "walk", "alike", "equal", "exact"])
        if kind == "walk":
            keys = keys.cumsum(dim=2)
        elif kind in ("alike", "equal"):
            keys = 1 + keys * (1e-3 if kind == "alike" else 0)
        elif kind == "exact":
            keys = EXACT[torch.randint(len(EXACT), keys.shape[:3], generator=generator)]
        closed = torch.rand(2, 2, length, generator=generator) < draw.choice([0, 0, 0.1, 0.4])
        scores = torch.rand(2, 2, length, generator=generator)
        for share in (0.35, 0.7):
            budget = max(1, int(closed.sum(-1).max()), round(share * length))
            found = merging_sets(keys, closed, budget=budget, scores=scores, linkage=linkage)
            wanted = oracles.each_head(
                lambda k, p, s, b=budget: oracles.merging_sets(k, p, s, budget=b, linkage=linkage),
                keys,
                closed,
                scores,
            )
            assert found.flatten(0, 1).tolist() == wanted, (seed, share)


@pytest.mark.parametrize("linkage", SCANS)
def test_a_set_longer_than_the_band_is_one_set(linkage):
    keys = torch.ones(1, 1, 1000, 4) + torch.randn(1, 1, 1000, 4) * 1e-4
    keys[:, :, 500] *= -1
    free = torch.zeros(1, 1, 1000, dtype=torch.bool)
    linked, _ = scan(keys, free, linkage, threshold=0.9)
    assert (~linked).nonzero()[:, -1].tolist() == [499, 500]


@pytest.mark.parametrize("linkage", SCANS)
def test_half_precision_and_no_links_at_all(linkage):
    keys = torch.randn(1, 2, 30, 8).bfloat16()
    free = torch.zeros(1, 2, 30, dtype=torch.bool)
    ids = merging_sets(keys, free, budget=30, scores=torch.ones(1, 2, 30), linkage=linkage)
    assert torch.equal(ids[0, 0], torch.arange(30))
