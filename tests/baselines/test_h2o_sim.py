"""H2O's mask simulations: the goldens of the method notes, and what the masks mean on a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.h2o_sim import H2OSimDecode, H2OSimPrefill, decode_mask, local_mask, prefill_mask
from kvmerge import session
from kvmerge.budget import Budget
from kvmerge.cache import append_entry
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.method import HIDDEN, Allowance, DecodeStep, Entries
from kvmerge.session import Policy, Row
from tests.baselines.test_h2o import MAP
from tests.kvmerge.oracles import best_positions
from tests.tiny import layer, normal, prompt, shared_model

SCORES = MAP.sum(0).float()[None, None]


def as_rows(visible: Tensor) -> list[set[int]]:
    return [{int(i) for i in row.nonzero()[:, 0]} for row in visible[0, 0]]


def shown(entries: Entries) -> Tensor:
    """What the next token may see, `(batch, kv_heads, n + 1)`."""
    return torch.cat([entries.bias, entries.next_bias.unsqueeze(-1)], dim=-1) == 0


# --- goldens


def test_the_decoding_mask_hides_what_has_just_left_the_window() -> None:
    visible, scores = decode_mask(SCORES, heavy=1, recent=2)
    assert visible[0, 0].int().tolist() == [1, 0, 0, 0, 1, 1]
    assert scores[0, 0].tolist() == pytest.approx([2.6, 0, 0, 0.3, 0.3])  # 3: hidden but scored
    row = torch.tensor([0.3, 0, 0, 0, 0.3, 0.4])
    visible, _ = decode_mask(torch.nn.functional.pad(scores, (0, 1)) + row, heavy=1, recent=2)
    assert visible[0, 0].int().tolist() == [1, 0, 0, 0, 0, 1, 1]


def test_decoding_mask_golden_by_the_method() -> None:
    base = layer(5, kv_heads=1, group=1, scores=SCORES)
    method, allowance = H2OSimDecode(heavy=1, recent=2), Allowance(3, 0.6)
    entries = method.compress(base, allowance)
    assert shown(entries)[0, 0].int().tolist() == [1, 0, 0, 0, 1, 1]
    entries = append_entry(entries, base.keys[:, :, :1], base.values[:, :, :1], 5)
    assert entries.bias[0, 0].tolist() == [0, HIDDEN, HIDDEN, HIDDEN, 0, 0]
    row = torch.tensor([[[0.3, 0, 0, 0, 0.3, 0.4]]])
    entries = method.hold(entries, DecodeStep(row, 5, 0, 0, allowance))
    assert shown(entries)[0, 0].int().tolist() == [1, 0, 0, 0, 0, 1, 1]


def test_a_row_of_the_single_pass_sees_hitters_and_its_band() -> None:
    visible = prefill_mask(SCORES, heavy=1, recent=1)
    assert as_rows(visible) == [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}]


# --- quirks


def test_a_token_that_leaves_the_window_is_hidden_once_and_may_return() -> None:
    scores = torch.tensor([[[1.0, 1.0, 1.0, 9.0, 1.0, 1.0]]])
    visible, scores = decode_mask(scores, heavy=1, recent=3)
    assert not visible[0, 0, 3]
    visible, _ = decode_mask(torch.nn.functional.pad(scores, (0, 1)), heavy=1, recent=3)
    assert visible[0, 0, 3]


def test_without_recent_tokens_no_score_is_lost_and_the_new_token_is_hidden() -> None:
    scores = torch.tensor([[[1.0, 5.0, 2.0, 3.0]]])
    visible, after = decode_mask(scores, heavy=2, recent=0)
    assert visible[0, 0].int().tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(after, scores)


def test_the_mask_shows_exactly_the_budget_the_new_token_included() -> None:
    base, allowance = layer(40), Allowance(20, 0.5)
    entries = H2OSimDecode().compress(base, allowance)
    for step in range(5):
        assert shown(entries).sum(-1).tolist() == [[20, 20]]
        entries = append_entry(entries, base.keys[:, :, :1], base.values[:, :, :1], 40 + step)
        weights = normal(1, 4, 41 + step, seed=step).softmax(-1)
        entries = H2OSimDecode().hold(entries, DecodeStep(weights, 40, 0, step, allowance))


# --- the single pass


@pytest.mark.parametrize("heavy", [0, 1, 5])
def test_the_local_mask_equals_a_slow_version(heavy: int) -> None:
    attention = 2 * normal(1, 2, 12, 12, seed=4)
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)
    attention = attention.masked_fill(future, -torch.inf).softmax(-1)
    blocks = [attention[:, :, :7, :7], attention[:, :, 7:]]
    found, running = local_mask(blocks, 12, heavy=heavy)
    for head in range(2):
        scores = [0.0] * 12
        for row in range(12):
            if row < heavy:
                wanted = set(range(row + 1))
            else:
                wanted = {*best_positions(scores, max(heavy - 1, 0)), row}
            assert {int(i) for i in found[0, head, row].nonzero()[:, 0]} == wanted
            scores = [s + float(a) for s, a in zip(scores, attention[0, head, row], strict=True)]
            scores = [s if i in wanted else 0.0 for i, s in enumerate(scores)]
        assert running[0, head].tolist() == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("leak", ["global", "local"])
def test_a_generated_token_sees_what_the_next_row_would(leak: str) -> None:
    """The mask of the prompt, continued: the heavy hitters and the tokens behind it."""
    base, allowance = layer(40), Allowance(20, 0.5)
    method = H2OSimPrefill(leak=leak)
    entries = method.compress(base, allowance)
    visible = method.visible(base, allowance)
    first = shown(entries)
    assert first[..., -11:].all()
    if leak == "global":
        old = visible[..., -1, :29]  # columns that the last row sees by their score alone
        assert torch.equal(first[..., :29], old)
        assert (first[..., :30].sum(-1) <= 10).all()
    else:
        assert (first[..., :30].sum(-1) <= 9).all()
    entries = append_entry(entries, base.keys[:, :, :1], base.values[:, :, :1], 40)
    weights = normal(1, 4, 41).softmax(-1)
    held = shown(method.hold(entries, DecodeStep(weights, 40, 0, 0, allowance)))
    assert held[..., -11:].all()
    assert torch.equal(held[..., :30], first[..., :30])
    assert not (held[..., 30] & ~first[..., 30]).any()


def test_a_prompt_that_fits_is_attended_in_full_and_a_longer_one_through_the_mask_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for name in ("attention_and_scores", "masked_attention"):
        whole = getattr(session, name)

        def counted(*given: Any, name: str = name, whole: Any = whole, **more: Any) -> Any:
            calls.append(name)
            return whole(*given, **more)

        monkeypatch.setattr(session, name, counted)
    for budget, attention in ((1.0, "attention_and_scores"), (0.5, "masked_attention")):
        calls.clear()
        rows = [Row(H2OSimPrefill(), Budget(budget))]
        run_sample(shared_model(), prompt(40), rows, Stop(1, frozenset()))
        assert calls == [attention] * 2  # one a layer


@pytest.mark.parametrize("leak", ["global", "local"])
@pytest.mark.parametrize("policy", ["append", "hold"])
def test_it_runs_on_a_model_and_keeps_the_whole_cache(leak: str, policy: str) -> None:
    rows = [Row(H2OSimPrefill(leak=leak), Budget(budget)) for budget in (1.0, 0.5)]
    stop, switches = Stop(12, frozenset()), Policy(policy)
    full, masked = run_sample(shared_model(), prompt(40), rows, stop, policy=switches)[0]
    assert len(masked.token_ids) == 12
    assert masked.token_ids != full.token_ids
    assert masked.stats.entries == [[40, 40], [40, 40]]


def test_an_unknown_leak_is_refused() -> None:
    with pytest.raises(UserError, match="unknown leak 'locl'"):
        H2OSimPrefill(leak="locl")
