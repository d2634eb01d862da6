"""CaM's three official variants against the recorded results of the authors' code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baselines.cam import CaM, merge_values
from baselines.cam_merging import cascade, drawn
from baselines.cam_probabilities import banded_map, banded_probabilities
from baselines.cam_variants import CaMGenerate, CaMHH
from kvmerge.budget import Budget
from kvmerge.cache import SteppedRow
from kvmerge.hook import forward, hooked
from kvmerge.method import Allowance, DecodeStep, Entries, PrefillLayer
from kvmerge.rope import Rope
from kvmerge.session import Row, seeded_generator
from kvmerge.softmax import Softmax
from tests.fidelity.official import _inputs, cam
from tests.fidelity.vectors import TinyRun, close, recorded
from tests.tiny import AnySession

OFFICIAL = recorded("cam")
HEADS, PROMPT, STEPS = _inputs.HEADS, _inputs.PROMPT, _inputs.STEPS
WIDTH = cam.prompt_values().shape[-1]


def draws() -> torch.Generator:
    """A generator that draws what `cam.draws()` drew."""
    return torch.Generator().manual_seed(13)


def layer_of_logits(logits: Tensor) -> PrefillLayer:
    """A layer whose attention logits are given: the keys are unit vectors, the values as wide."""
    keys = torch.eye(PROMPT).expand(1, HEADS, -1, -1)
    values = torch.nn.functional.pad(cam.prompt_values(), (0, PROMPT - WIDTH))
    return PrefillLayer(logits, keys, values, None, 0, 1, Softmax(1.0))


@pytest.mark.parametrize(("start", "recent"), cam.SIZES)
def test_a_prompt_is_merged_as_the_authors_do(start: int, recent: int) -> None:
    """`utils_lm_eval`, from the map as a whole and in blocks from queries and keys."""
    attention = _inputs.attention_map(cam.banded_logits(start, recent))
    wanted = OFFICIAL[f"pass_{start}_{recent}"]
    found = merge_values(
        cam.prompt_values(), attention, start=start, recent=recent, merge_budget=recent,
        generator=draws(),
    )  # fmt: skip
    close(found[0], wanted)
    layer = layer_of_logits(_inputs.attention_logits(HEADS, PROMPT, seed=12))
    chances = banded_probabilities(banded_map(layer, start, recent), start=start, recent=recent)
    share = drawn(chances, draws()) / recent
    found = cascade(layer.values, share, start=start, reach=recent)
    close(found[0, ..., :WIDTH], wanted)


def test_merging_the_first_layer_of_a_model() -> None:
    """The layers after it differ: the authors merge before the output, which earlier rows see too."""
    start, recent = cam.SIZES[0]
    run = TinyRun(Row(CaM(start=start, score="banded"), Budget(start + recent)))
    run.logits()
    [group] = run.session.layers[0].groups
    wanted = torch.tensor(OFFICIAL["pass_first_layer"])
    kept = [*range(start), *range(PROMPT - recent, PROMPT)]
    close(group.values[0, :, : start + recent], wanted[:, kept])


@pytest.mark.parametrize(("start", "recent"), cam.MASKED_SIZES)
def test_merging_under_the_mask_for_32_steps(start: int, recent: int) -> None:
    official = OFFICIAL[f"masked_{start}_{recent}"]
    run = TinyRun(Row(CaMHH(start=start, bug_compat=True), Budget(start + recent)))
    close(run.logits(), official["logits"], 1e-4)
    close(run.entries(1).values[0, :, -recent:], official["values"])


@pytest.mark.parametrize(("start", "recent"), cam.MASKED_SIZES)
def test_without_bug_compat_it_is_another_method(start: int, recent: int) -> None:
    official = torch.tensor(OFFICIAL[f"masked_{start}_{recent}"]["logits"])
    found = TinyRun(Row(CaMHH(start=start), Budget(start + recent))).logits()
    assert (found - official).abs().max() > 1e-2


@pytest.mark.parametrize(("start", "recent"), cam.STREAMED_SIZES)
def test_replaying_a_prompt_token_by_token(start: int, recent: int) -> None:
    official = OFFICIAL[f"streamed_prompt_{start}_{recent}"]
    layer = layer_of_logits(_inputs.attention_logits(HEADS, PROMPT, seed=12))
    allowance = Allowance(start + recent, (start + recent) / PROMPT, draws())
    found = CaMGenerate(start=start).compress(layer, allowance)
    close(found.values[0, ..., :WIDTH], official["values"])
    assert found.scores is not None
    close(found.scores[0], official["scores"])


class Streamed(AnySession):
    """A session that reads every token as a decode step, as the authors do."""

    def __init__(self, method: CaMGenerate, n_keep: int, rope: Rope) -> None:
        nothing = torch.zeros(1, HEADS, 0, _inputs.HEAD_DIM)
        empty = torch.zeros(1, HEADS, 0)
        entries = Entries(nothing, nothing, empty.long(), scores=empty)
        self.layers = []
        for index in range(_inputs.LAYERS):

            def hold(kept: Entries, weights: Tensor, step: int, index: int = index) -> Entries:
                allowance = Allowance(n_keep, 1.0, seeded_generator(0, "", index, step - 1))
                return method.hold(kept, DecodeStep(weights, 0, index, step, allowance))

            self.layers.append(SteppedRow(0, entries, 0, hold, rope))

    def attend(self, layer_idx: int, *states: Tensor) -> Tensor:
        return self.layers[layer_idx].attend(*states)


@torch.inference_mode()
@pytest.mark.parametrize(("start", "recent"), cam.STREAMED_SIZES)
def test_token_by_token_on_a_model(start: int, recent: int) -> None:
    official = OFFICIAL[f"streamed_{start}_{recent}"]
    model = _inputs.tiny_llama()
    session = Streamed(CaMGenerate(start=start), start + recent, Rope.of(model))
    with hooked(model):
        found = forward(model, session, _inputs.tokens(), torch.arange(PROMPT + STEPS)[None])
    close(found[0, PROMPT - 1 :], official["logits"], 1e-4)
    entries = session.layers[1].entries
    assert entries.scores is not None
    close(entries.values[0], official["values"], 1e-4)
    close(entries.scores[0], official["scores"], 1e-4)


def test_other_draws_give_other_values() -> None:
    """Other draws give other values, so that the comparisons above are of the same draws."""
    start, recent = cam.SIZES[0]
    layer = layer_of_logits(_inputs.attention_logits(HEADS, PROMPT, seed=12))
    chances = banded_probabilities(banded_map(layer, start, recent), start=start, recent=recent)
    assert 0 < int(drawn(chances, draws()).sum()) < (chances > 0).sum()
    other = drawn(chances, torch.Generator().manual_seed(14))
    assert not torch.equal(drawn(chances, draws()), other)
