"""All supported model families: the full cache is transformers' own greedy answer."""

from __future__ import annotations

import pytest
import torch

from baselines.full import Full
from kvmerge.api import compressed
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.kvmerger import KVMerger
from kvmerge.session import Row
from tests.tiny import FAMILIES, new_model, prompt, shared_model

FULL = Row(Full(), Budget.parse(1))
MERGED = Row(KVMerger(), Budget.parse(0.35))


def generated(model, input_ids, tokens):
    with torch.inference_mode():
        out = model.generate(
            input_ids,
            do_sample=False,
            max_new_tokens=tokens,
            attention_mask=torch.ones_like(input_ids),
        )
    return out[0, input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_row_is_generates_answer(family, kv_heads, length):
    """In a batch with a compressed row, and up to the end token where there is one."""
    model, input_ids = shared_model(family, kv_heads), prompt(length)
    rows = [MERGED, FULL] if length > 2 else [FULL]
    results, _ = run_sample(model, input_ids, rows, Stop(12, frozenset({2})))
    assert results[-1].token_ids == generated(model, input_ids, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_row_departs_from_it(family):
    """A family whose cache were ignored would pass the test above."""
    results, _ = run_sample(
        shared_model(family), prompt(63), [FULL, MERGED], Stop(12, frozenset()), reference=0
    )
    assert results[1].stats.entries == [[22, 22]] * 2
    assert results[1].fidelity.kl > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_token_ends_both(family):
    model, input_ids = new_model(family), prompt(30)
    free, _ = run_sample(model, input_ids, [FULL], Stop(12, frozenset()))
    end = free[0].token_ids[5]
    model.generation_config.eos_token_id = end
    results, _ = run_sample(model, input_ids, [FULL], Stop(12, frozenset({end})))
    assert results[0].token_ids == generated(model, input_ids, 12)
    assert results[0].token_ids[-1] == end
    assert len(results[0].token_ids) <= 6


# --- sliding windows


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_shorter_than_prompt_and_answer_is_refused(family):
    model = new_model(family, sliding_window=40)
    with pytest.raises(UserError, match=rf"{family} .* window of 40 tokens.* has 33 .* up to 8\."):
        run_sample(model, prompt(33), [FULL], Stop(8, frozenset()))


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_that_just_holds_them_has_no_effect(family):
    model = new_model(family, sliding_window=40)
    found, _ = run_sample(model, prompt(32), [FULL], Stop(8, frozenset({2})))
    assert found[0].token_ids == generated(model, prompt(32), 8)


def test_generate_is_stopped_where_its_answer_leaves_the_window():
    """`compressed` cannot know the answer's length beforehand: 33 + 7 tokens fit, the next does not."""
    model = new_model("mistral", sliding_window=40)
    model.generation_config.eos_token_id = None
    input_ids = prompt(33)
    wanted = generated(model, input_ids, 8)
    with compressed(model, "full", 1):
        assert generated(model, input_ids, 8) == wanted
        with pytest.raises(UserError, match=r"window of 40 tokens.* has 33 .* up to 8\."):
            generated(model, input_ids, 9)


def test_a_sliding_window_that_is_switched_off_does_not_count():
    model = new_model("qwen2", sliding_window=16, use_sliding_window=False)
    found, _ = run_sample(model, prompt(32), [FULL], Stop(8, frozenset({2})))
    assert found[0].token_ids == generated(model, prompt(32), 8)


def test_a_sliding_window_that_is_switched_on_counts():
    model = new_model("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=0)
    with pytest.raises(UserError, match=r"qwen2 .* window of 16 tokens"):
        run_sample(model, prompt(32), [FULL], Stop(8, frozenset()))
