"""H2O and its two mask simulations against the recorded results of the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baselines.h2o import H2O
from baselines.h2o_sim import H2OSimDecode, H2OSimPrefill, local_mask
from kvmerge.budget import Budget
from kvmerge.cache import append_entry
from kvmerge.hook import forward, hooked
from kvmerge.method import Allowance, DecodeStep, Entries, PrefillLayer
from kvmerge.session import Policy, Row, session_for
from kvmerge.softmax import Softmax
from tests.fidelity.official import _inputs, h2o
from tests.fidelity.vectors import TinyRun, close, recorded

OFFICIAL = recorded("h2o")
HEADS, PROMPT, STEPS = _inputs.HEADS, _inputs.PROMPT, _inputs.STEPS
BUDGET = Budget(h2o.HEAVY + h2o.RECENT)


def layer_of_logits(logits: Tensor, dtype: torch.dtype) -> PrefillLayer:
    """A layer whose attention logits are given: the keys are unit vectors."""
    length = logits.shape[-1]
    keys = torch.eye(length, dtype=dtype).expand(1, HEADS, -1, -1)
    scores = _inputs.attention_map(logits).sum(dim=2)
    return PrefillLayer(logits, keys, keys, scores, 0, 1, Softmax(1.0))


def seen(entries: Entries) -> list[str]:
    """What the next token may see, a line of 0 and 1 a head, its own entry last."""
    assert entries.bias is not None
    assert entries.next_bias is not None
    bias = torch.cat([entries.bias[0], entries.next_bias[0, :, None]], dim=-1)
    return ["".join("1" if each == 0 else "0" for each in head) for head in bias.tolist()]


@pytest.mark.parametrize(
    ("dtype", "heavy", "recent"),
    [(dtype, *sizes) for dtype, pairs in h2o.SIZES.items() for sizes in pairs],
)
def test_real_drop_keeps_the_same_tokens_for_32_steps(dtype: str, heavy: int, recent: int) -> None:
    official = OFFICIAL[f"drop_{heavy}_{recent}_{dtype}"]
    method = H2O(heavy=heavy, recent=recent, score_dtype="model" if dtype == "float16" else "float32")
    allowance = Allowance(heavy + recent, (heavy + recent) / PROMPT)
    torch_dtype = getattr(torch, dtype)
    entries = method.compress(layer_of_logits(h2o.prompt_logits(), torch_dtype), allowance)
    kept = [entries.positions[0]]
    new = torch.zeros(1, HEADS, 1, PROMPT, dtype=torch_dtype)
    for step in range(STEPS):
        entries = append_entry(entries, new, new, PROMPT + step)
        row = _inputs.attention_row(HEADS, heavy + recent + 1, seed=100 + step)
        entries = method.hold(entries, DecodeStep(row, PROMPT, 0, step, allowance))
        if step + 1 in h2o.CHECKED:
            kept.append(entries.positions[0])
    assert [each.tolist() for each in kept] == official["kept"]
    assert entries.scores is not None
    close(entries.scores[0], official["scores"], 5e-6)


def test_half_precision_sums_lose_what_float32_keeps() -> None:
    """`score_dtype=model` is not a no-op: the rounded sums differ."""
    layer = layer_of_logits(h2o.prompt_logits(), torch.float16)
    rounded = H2O(score_dtype="model").prompt_scores(layer)
    assert torch.equal(rounded, rounded.half().float())
    assert not torch.equal(rounded, layer.column_scores())


@pytest.mark.parametrize(("pos", "name"), [("absolute", "drop"), ("rolled", "drop_rolled")])
def test_real_drop_logits_for_32_steps(pos: str, name: str) -> None:
    found = TinyRun(Row(H2O(), BUDGET), Policy("hold", pos)).logits()
    close(found, OFFICIAL[f"{name}_logits"], 1e-4)


def test_decoding_mask_logits_and_masks_for_32_steps() -> None:
    run = TinyRun(Row(H2OSimDecode(), BUDGET))
    masks: list[list[str]] = []
    found = run.logits(lambda: masks.append(seen(run.entries())))
    assert masks == OFFICIAL["mask_seen"]
    close(found, OFFICIAL["mask_logits"], 1e-4)
    for index in range(_inputs.LAYERS):
        scores = run.entries(index).scores
        assert scores is not None
        close(scores[0], OFFICIAL["mask_scores"][index])


@torch.inference_mode()
def test_single_pass_masks_and_logits_of_every_row() -> None:
    model, masks = _inputs.tiny_llama(), []

    class Watched(H2OSimPrefill):
        def visible(self, layer: PrefillLayer, allowance: Allowance) -> Tensor:
            masks.append(super().visible(layer, allowance))
            return masks[-1]

    session = session_for(model, [Row(Watched(), BUDGET)], [""])
    session.begin([PROMPT], capacity=0)
    with hooked(model):
        positions = torch.arange(PROMPT)[None]
        found = forward(model, session, _inputs.tokens()[:, :PROMPT], positions)
    close(found[0], OFFICIAL["pass_logits"], 1e-4)
    for mask, wanted in zip(masks, OFFICIAL["pass_seen"], strict=True):
        assert mask[0].int().tolist() == [[[int(x) for x in row] for row in head] for head in wanted]


def test_the_local_heavy_hitters_of_every_row() -> None:
    rows = [_inputs.attention_map(h2o.prompt_logits())]
    found, _ = local_mask(rows, PROMPT, heavy=h2o.HEAVY)
    wanted = [[[int(x) for x in row] for row in head] for head in OFFICIAL["local_seen"]]
    assert found[0].int().tolist() == wanted
