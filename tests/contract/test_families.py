"""All supported model families: the full cache is transformers' own greedy answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from baselines.full import Full
from kvmerge.api import compressed
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.families import SUPPORTED, check_family, local_windows, windows
from kvmerge.kvmerger import KVMerger
from kvmerge.resolve import load_method
from kvmerge.rope import Rope
from kvmerge.session import Policy, Row
from tests.tiny import FAMILIES, any_model, new_model, prompt, shared_model

FULL = Row(Full(), Budget.parse(1))
MERGED = Row(KVMerger(), Budget.parse(0.35))
WINDOW = 16
LOCAL = ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "ministral", "olmo3", "vaultgemma")
"""Families with layers that have a window of their own beside others."""


def generated(model, input_ids, tokens, **options):
    given = {"attention_mask": torch.ones_like(input_ids), "do_sample": False} | options
    with torch.inference_mode():
        out = model.generate(input_ids, max_new_tokens=tokens, **given)
    return out[:, input_ids.shape[1] :].tolist()


def padded():
    """Prompts of 40 and 25 tokens in one batch."""
    long, short = prompt(40), prompt(25, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 15, dtype=torch.long), short], dim=1)])
    return batch, (batch != 0).long()


# --- every family


@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_full_cache_is_generates_answer(kind):
    """By the engine beside a compressed row, and by `compressed` on a padded batch, which answers at
    budget 1 as the model does."""
    model = any_model(kind)
    stopped, _ = run_sample(model, prompt(40), [MERGED, FULL], Stop(12, frozenset({2})))
    assert [stopped[1].token_ids] == generated(model, prompt(40), 12)
    results, _ = run_sample(model, prompt(40), [MERGED, FULL], Stop(9, frozenset()), reference=1)
    assert results[0].fidelity.kl > 1e-5  # a cache that is ignored would pass
    batch, mask = padded()
    plain = generated(model, batch, 12, attention_mask=mask)
    with compressed(model, "kvmerger", 1):
        assert generated(model, batch, 12, attention_mask=mask) == plain
    assert generated(model, batch, 12, attention_mask=mask) == plain


UNTURNED = {"cohere", "cohere2", "ernie4_5", "exaone4", "gemma3_text", "glm", "glm4", "gpt2", "helium"}
UNTURNED |= {"olmo3", "opt", "smollm3"}
"""Families without a rotation of keys, with another than by halves, or with one in some layers only."""


@pytest.mark.parametrize("kind", sorted(UNTURNED))
def test_keys_that_cannot_be_moved_are_refused(kind):
    with pytest.raises(UserError, match=rf"{kind} .*cannot rotate cached keys"):
        Rope.of(any_model(kind))


@pytest.mark.parametrize("kind", sorted(set(SUPPORTED) - UNTURNED))
def test_keys_move_as_the_model_turns_them(kind):
    """By the engine: positions that are rolled, of a cache that is whole, change nothing."""
    model = any_model(kind)
    model.generation_config.eos_token_id = None
    results, _ = run_sample(
        model, prompt(20), [FULL, FULL], Stop(6, frozenset()), reference=0, policy=Policy(pos="rolled")
    )
    assert [results[0].token_ids] == generated(model, prompt(20), 6)


# --- the first five, closer


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_row_is_generates_answer(family, kv_heads, length):
    """In a batch with a compressed row, and up to the end token where there is one."""
    model, input_ids = shared_model(family, kv_heads), prompt(length)
    rows = [MERGED, FULL] if length > 2 else [FULL]
    results, _ = run_sample(model, input_ids, rows, Stop(12, frozenset({2})))
    assert [results[-1].token_ids] == generated(model, input_ids, 12)


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
    assert [results[0].token_ids] == generated(model, input_ids, 12)
    assert results[0].token_ids[-1] == end
    assert len(results[0].token_ids) <= 6


# --- a window in all layers


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_shorter_than_prompt_and_answer_is_refused(family):
    model = new_model(family, sliding_window=40)
    with pytest.raises(UserError, match=rf"{family} .* window of 40 tokens.* has 33 .* up to 8\."):
        run_sample(model, prompt(33), [FULL], Stop(8, frozenset()))


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_that_just_holds_them_has_no_effect(family):
    model = new_model(family, sliding_window=40)
    found, _ = run_sample(model, prompt(32), [FULL], Stop(8, frozenset({2})))
    assert [found[0].token_ids] == generated(model, prompt(32), 8)


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
    assert [found[0].token_ids] == generated(model, prompt(32), 8)


def test_a_sliding_window_that_is_switched_on_counts():
    model = new_model("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=0)
    with pytest.raises(UserError, match=r"qwen2 .* window of 16 tokens"):
        run_sample(model, prompt(32), [FULL], Stop(8, frozenset()))


# --- a window in some layers


@pytest.mark.parametrize("kind", LOCAL)
def test_layers_with_a_window_keep_it_and_the_others_the_budget(kind):
    model = any_model(kind)
    local = [window for window in local_windows(model.config) if window is not None]
    assert local == [WINDOW] * (model.config.num_hidden_layers - 1)
    results, _ = run_sample(model, prompt(40), [FULL, MERGED], Stop(30, frozenset({2})))
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    of_one = heads * head_dim * 2 * 4
    assert [result.stats.entries for result in results] == [[[40] * heads], [[14] * heads]]
    assert [result.stats.kv_bytes for result in results] == [40 * of_one, 14 * of_one]
    # the new token is the window's last
    assert {r.stats.local_bytes for r in results} == {len(local) * (WINDOW - 1) * of_one}


@pytest.mark.parametrize("kind", LOCAL)
def test_a_replayed_text_sees_the_window_that_a_generated_one_sees(kind):
    """Several tokens at once, each with its own window."""
    model = any_model(kind)
    results, _ = run_sample(model, prompt(40), [FULL, FULL], Stop(30, frozenset()), reference=0)
    assert results[1].fidelity.kl == 0
    assert results[1].fidelity.top1 == 1  # the text is what was decoded one at a time


@pytest.mark.parametrize("name", ["pyramidkv", "d2o", "h2o_sim_prefill", "snapkv", "cam"])
def test_methods_of_every_kind_run_beside_local_layers(name):
    """One that divides its budget over layers, one that alters the prefill, and the others."""
    row = Row(load_method(name), Budget.parse(0.5))
    results, _ = run_sample(any_model("gemma2"), prompt(40), [FULL, row], Stop(6, frozenset()))
    assert len(results[1].stats.entries) == 1


def test_skipped_layers_are_compensated_among_those_that_count():
    """Layers 0 to 2 have a window, 3 and 4 none: with 4 skipped, 3 alone must make up for it."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"] * 2
    model = any_model("gemma2", num_hidden_layers=5, layer_types=kinds)
    results, _ = run_sample(
        model,
        prompt(40),
        [Row(KVMerger(), Budget.parse(0.75))],
        Stop(2, frozenset()),
        policy=Policy(layers_skip=(0, -1)),
    )
    assert results[0].stats.entries == [[20, 20], [40, 40]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_in_half_precision_stay_near_the_models_own(kind, dtype):
    one = {"num_local_experts": 1, "num_experts_per_tok": 1} if kind == "gpt_oss" else {}
    model = any_model(kind, **one).to(dtype)  # rounding may choose another expert
    with torch.inference_mode():
        own = model(prompt(40)).logits[0, -1].float()
        with compressed(model, "full", 1):
            found = model(prompt(40)).logits[0, -1].float()
    assert torch.nn.functional.cosine_similarity(found, own, dim=0) > 0.98


# --- what is refused, from the configuration alone


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (AutoConfig.for_model("t5"), "attends to an encoder's output"),
        (AutoConfig.for_model("gpt2", add_cross_attention=True), "attends to an encoder's output"),
        (AutoConfig.for_model("bloom"), "bias by distance"),
        (AutoConfig.for_model("deepseek_v3"), r"one latent state for all heads \(MLA\)"),
        (AutoConfig.for_model("qwen3_next"), "linear_attention have no cache"),
        (AutoConfig.for_model("gemma3n_text"), "shares keys and values between layers"),
        (AutoConfig.for_model("llama4_text"), "attends within chunks"),
        (AutoConfig.for_model("stablelm"), "not been compared with plain transformers"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_the_engine_does_not_know_is_named(config: PretrainedConfig, why: str):
    with pytest.raises(UserError, match=rf"model type '{config.model_type}' is not .*{why}"):
        check_family(config)


def test_windows_are_read_by_layer():
    of_two = {"num_hidden_layers": 2, "sliding_window": 7}
    assert windows(AutoConfig.for_model("mistral", **of_two)) == (7, 7)
    assert local_windows(AutoConfig.for_model("mistral", **of_two)) == (None, None)
    kinds = ["full_attention", "sliding_attention"]
    assert windows(AutoConfig.for_model("gemma2", **of_two, layer_types=kinds)) == (None, 7)
    assert windows(AutoConfig.for_model("qwen2", **of_two, use_sliding_window=False)) == (None, None)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_whether_keys_can_be_turned_is_known_without_weights(kind: str) -> None:
    model = any_model(kind)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    assert _refusal(Rope.check, skeleton) == _refusal(Rope.of, model)


def _refusal(act: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> str | None:
    try:
        act(model)
    except UserError as error:
        return str(error)
    return None
