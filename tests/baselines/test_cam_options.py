"""CaM's options and its other two official variants: goldens, slow versions, limiting cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from baselines.cam import CaM, merge_probabilities
from baselines.cam_merging import cascade, fold_entry
from baselines.cam_probabilities import banded_map, banded_probabilities, streamed_probabilities
from baselines.cam_variants import CaMGenerate, CaMHH
from kvmerge.budget import Budget
from kvmerge.cache import append_entry
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.method import HIDDEN, Allowance, DecodeStep, Entries
from kvmerge.session import Row
from tests.kvmerge import oracles
from tests.tiny import generator, layer, normal, prompt, shared_model

ROW = torch.tensor([[[0.3, 0.1, 0.05, 0.25, 0.2, 0.1]]])
VALUES = torch.arange(1.0, 7.0).view(1, 1, 6, 1)
HALF = Allowance(20, 0.5)


def entries_of(values: list[float], scores: list[float] | None = None) -> Entries:
    shape = (1, 1, len(values))
    held = torch.tensor(values, dtype=torch.float32).view(*shape, 1)
    mass = None if scores is None else torch.tensor(scores, dtype=torch.float32).view(shape)
    return Entries(torch.zeros_like(held), held, torch.arange(len(values)).view(shape), scores=mass)


def shown(entries: Entries) -> list[int]:
    bias = torch.cat([entries.bias[0, 0], entries.next_bias[0, :1]])
    return (bias == 0).int().tolist()


# --- goldens


@pytest.mark.parametrize(("m", "wanted"), [(2, [1, 2, 3, 4, 7, 8]), (32, [1, 2, 3, 4, 5.125, 6.125])])
def test_hh_with_the_slip_folds_one_entry_later(m: int, wanted: list[float]) -> None:
    """Entry 3 of 6 is folded, its ratio cut to 1; where receivers are missing the divisor stays."""
    method = CaMHH(start=1, m=m, bug_compat=True, sample="expected")
    step = DecodeStep(ROW, 5, 0, 0, Allowance(5, 1.0))
    held = method.hold(entries_of(list(range(1, 7))), step)
    assert held.values.flatten().tolist() == pytest.approx(wanted)
    assert shown(held) == [1, 0, 0, 1, 1, 1, 1]  # what was folded is seen once more


def test_hh_folds_the_entry_that_leaves_the_window() -> None:
    """Entry 2 of 6 leaves: `.05 / mean(.25, .2)` of its value, halved between the next two."""
    step = DecodeStep(ROW, 5, 0, 0, Allowance(5, 1.0))
    held = CaMHH(start=1, m=2, sample="expected").hold(entries_of(list(range(1, 7))), step)
    gift = 3 * 0.222222 / 2
    assert held.values.flatten().tolist() == pytest.approx([1, 2, 3, 4 + gift, 5 + gift, 6])
    assert shown(held) == [1, 0, 0, 1, 1, 1, 1]
    found = fold_entry(VALUES, ROW, entry=2, merge_budget=2, generator=None)
    assert torch.allclose(found, held.values)


def test_generate_merges_what_leaves_if_drawn() -> None:
    """`p = .4 / mean(.7, .3) = .8`; merged if drawn, entry 1 of 5 leaves."""
    method = CaMGenerate(start=1, m=2)
    scores = [2, 0.3, 0.5, 0.1, 0]
    row = torch.tensor([[[0.4, 0.1, 0.2, 0.2, 0.1]]])
    expected = replace(method, sample="expected")
    allowance = Allowance(4, 1.0)
    step = DecodeStep(row, 5, 0, 0, allowance)
    held = expected.hold(entries_of([1, 2, 3, 4, 5], scores), step)
    assert held.values.flatten().tolist() == pytest.approx([1, 3.8, 4.8, 5])
    drawn = {
        tuple(
            method.hold(
                entries_of([1, 2, 3, 4, 5], scores),
                replace(step, allowance=replace(allowance, generator=generator(seed))),
            )
            .values.flatten()
            .tolist()
        )
        for seed in range(20)
    }
    assert drawn == {(1, 4, 5, 5), (1, 3, 4, 5)}
    assert held.scores.flatten().tolist() == pytest.approx([2.4, 0.7, 0.3, 0.1])


# --- banded scores in blocks


@pytest.mark.parametrize(("start", "recent", "length"), [(3, 5, 40), (0, 4, 33), (5, 1, 20)])
def test_banded_probabilities_in_blocks_equal_the_map(
    monkeypatch: pytest.MonkeyPatch, start: int, recent: int, length: int
) -> None:
    monkeypatch.setattr("kvmerge.scores._block_rows", lambda *_: 7)
    some = layer(length, group=3)
    blocks = list(banded_map(some, start, recent))
    assert len(blocks) > 1
    whole = torch.cat([torch.nn.functional.pad(b, (0, length - b.shape[-1])) for _, b in blocks], dim=2)
    tokens = torch.arange(length)
    seen = (tokens < start) | (tokens[:, None] - tokens <= recent)
    seen &= tokens[:, None] >= tokens
    assert torch.equal(whole[0, 0] > 0, seen)
    torch.testing.assert_close(whole.sum(-1), torch.full((1, 2, length), 3.0))
    found = banded_probabilities(blocks, start=start, recent=recent)
    wanted = merge_probabilities(whole, start=start, recent=recent)
    torch.testing.assert_close(found, wanted)
    assert (found > 0).sum() == 2 * (length - start - recent)


@pytest.mark.parametrize(("start", "recent", "m"), [(2, 6, 3), (1, 3, 16), (0, 5, 5)])
def test_streamed_probabilities_equal_a_slow_version(
    monkeypatch: pytest.MonkeyPatch, start: int, recent: int, m: int
) -> None:
    monkeypatch.setattr("kvmerge.scores._block_rows", lambda *_: 7)
    some = layer(25)
    found, sums = streamed_probabilities(
        banded_map(some, start, recent), start=start, recent=recent, receivers=m
    )
    wanted = torch.zeros_like(found)
    running = torch.zeros(1, 2, 25)
    for begin, block in banded_map(some, start, recent):
        for offset, row in enumerate(block.unbind(dim=2)):
            running[..., : row.shape[-1]] += row
            token = begin + offset - recent
            if token >= start:
                rivals = running[..., token + 1 : min(token + m, begin + offset) + 1]
                wanted[..., token] = (running[..., token] / rivals.mean(-1)).clamp(max=1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(sums, running, atol=1e-5, rtol=0)


def test_banded_merges_less_than_column_sums_where_a_sink_competes() -> None:
    banded = CaM(score="banded", sample="expected").compress(layer(40), HALF)
    column = CaM(sample="expected").compress(layer(40), HALF)
    assert torch.equal(banded.positions, column.positions)
    assert not torch.allclose(banded.values, column.values)


# --- decoding


@pytest.mark.parametrize(("most", "receivers"), [(32, 10), (4, 4)])
def test_holding_folds_the_oldest_entry_after_the_sinks(
    monkeypatch: pytest.MonkeyPatch, most: int, receivers: int
) -> None:
    """Into 32 entries, but never into more than are recent: nothing is lost."""
    monkeypatch.setattr("baselines.cam.DECODE_RECEIVERS", most)
    some, method = layer(40), CaM(sample="expected")
    entries = method.compress(some, HALF)
    stored = append_entry(entries, some.keys[:, :, :1], some.values[:, :, :1], 40)
    weights = normal(1, 4, 21).softmax(-1)
    held = method.hold(stored, DecodeStep(weights, 40, 0, 0, HALF))
    kept = [*range(10), *range(11, 21)]
    assert torch.equal(held.positions, stored.positions[..., kept])
    scores = stored.scores + weights.unflatten(1, (2, 2)).sum(2)
    for head in range(2):
        mean = scores[0, head, 11 : 11 + receivers].mean()
        wanted = stored.values[0, head].clone()
        wanted[11 : 11 + receivers] += (
            min(1.0, float(scores[0, head, 10] / mean)) * wanted[10] / receivers
        )
        torch.testing.assert_close(held.values[0, head], wanted[kept], atol=1e-5, rtol=0)


# --- the prompt


def test_a_fixed_number_of_sinks() -> None:
    some = layer(40)
    kept = CaM(start=4, sample="expected").compress(some, HALF)
    for head in range(2):
        chances = oracles.cam_column_probabilities(some.scores[0, head], start=4, recent=16)
        wanted = oracles.cam_merge_values(
            some.values[0, head], chances, None, start=4, recent=16, merge_budget=16
        )
        wanted = torch.tensor(wanted[:4] + wanted[24:])
        torch.testing.assert_close(kept.values[0, head], wanted, atol=1e-5, rtol=0)


def test_a_shorter_reach_than_the_divisor_loses_the_rest() -> None:
    """`generate_task` with fewer recent tokens than receivers."""
    values = torch.tensor([0.0, 16, 0, 0, 0]).view(1, 1, 5, 1)
    share = torch.tensor([[[0, 1 / 16, 0, 0, 0]]])
    assert cascade(values, share, start=1, reach=2).flatten().tolist() == [0, 16, 1, 1, 0]


# --- the masked variant


def test_hh_hides_the_middle_of_the_prompt_and_never_merges_it() -> None:
    some = layer(40)
    entries = CaMHH().compress(some, HALF)
    assert torch.equal(entries.values, some.values)
    visible = [*range(10), *range(31, 41)]  # ten recent tokens, the next one among them
    assert [i for i, each in enumerate(shown(entries)) if each] == visible


def test_hh_where_the_budget_holds_everything() -> None:
    some, everything = layer(20), Allowance(20, 1.0)
    assert all(shown(CaMHH().compress(some, everything)))
    entries = CaMHH(bug_compat=True).compress(some, everything)
    assert not any(shown(entries))
    assert (entries.next_bias == HIDDEN).all()


@pytest.mark.parametrize("bug_compat", [False, True])
def test_hh_keeps_the_whole_cache_of_a_model(bug_compat: bool) -> None:
    rows = [Row(CaMHH(bug_compat=bug_compat), Budget(0.5))]
    [result], _ = run_sample(shared_model(), prompt(40), rows, Stop(8, frozenset()))
    assert result.stats.entries == [[40, 40], [40, 40]]


# --- what does not go together


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "band"}, "unknown score 'band'"),
        ({"start": -1}, "start=-1 is negative"),
    ],
)
def test_a_setting_out_of_range_is_refused_and_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CaM(**settings)


@pytest.mark.parametrize("variant", [CaMHH, CaMGenerate])
def test_a_merged_token_needs_a_receiver(variant: type[CaMHH]) -> None:
    with pytest.raises(UserError, match="m=0: a merged token needs at least 1 receiver"):
        variant(m=0)


@pytest.mark.parametrize("method", [CaM(start=20), CaMHH(start=20), CaMGenerate(start=20)])
def test_sinks_that_leave_no_recent_token(method: CaM) -> None:
    with pytest.raises(UserError, match="leaves none beside 20 sinks"):
        method.compress(layer(40), HALF)


def test_the_slip_needs_two_recent_tokens() -> None:
    with pytest.raises(UserError, match="needs 2 recent tokens"):
        CaMHH(start=19, bug_compat=True).compress(layer(40), HALF)
    assert CaMHH(start=19).compress(layer(40), HALF).next_bias is not None
