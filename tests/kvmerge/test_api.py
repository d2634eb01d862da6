"""`compressed`: any generate() call, any supported family, and the model as it was afterwards."""

from __future__ import annotations

import pytest
import torch
import transformers

from baselines.full import Full
from baselines.h2o import H2O
from kvmerge import (
    CompressedCache,
    NothingCompressedWarning,
    UnprovenError,
    UserError,
    compressed,
)
from kvmerge.method import keep_all
from tests import tiny

PAD = 0


@pytest.fixture(scope="module")
def llama():
    return tiny.new_model()


@pytest.fixture(scope="module")
def prompts():
    """Two prompts, of 30 and 20 tokens, padded on the left into one batch."""
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(3, 97, (1, 30), generator=generator)
    short = torch.randint(3, 97, (1, 20), generator=generator)
    batch = torch.cat([long, torch.cat([torch.full((1, 10), PAD), short], dim=1)])
    return long, short, {"input_ids": batch, "attention_mask": (batch != PAD).long()}


def generate(model, inputs, **options):
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    return model.generate(**inputs, **(fixed | options))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_full_budget_changes_nothing(family, attention, prompts):
    model = tiny.new_model(family)
    model.set_attn_implementation(attention)
    plain = generate(model, prompts[2])
    with compressed(model, "kvmerger", 1):
        assert torch.equal(generate(model, prompts[2]), plain)
    assert model.config._attn_implementation == attention
    assert torch.equal(generate(model, prompts[2]), plain)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("method", ["kvmerger", "h2o", "kvmerger_log"])
def test_padded_rows_answer_as_they_do_alone(llama, prompts, method):
    long, short, batch = prompts
    with compressed(llama, method, 0.5):
        together = generate(llama, batch)[:, -8:]
        alone = [generate(llama, prompt)[:, -8:] for prompt in (long, short)]
    assert torch.equal(together, torch.cat(alone))


def test_each_row_has_its_own_budget_and_bytes_match_the_tensors(llama, prompts):
    with compressed(llama, "h2o", 0.5):
        out = generate(llama, prompts[2], return_dict_in_generate=True)
    cache = out.cache if "cache" in out else out.past_key_values
    assert isinstance(cache, CompressedCache)
    assert [stats.entries for stats in cache.stats] == [[[15, 15]] * 2, [[10, 10]] * 2]
    per_entry = 2 * 16 * 4  # keys and values, head size, float32
    assert [stats.kv_bytes for stats in cache.stats] == [15 * 4 * per_entry, 10 * 4 * per_entry]
    generated = 7  # the last token is never fed
    assert cache.nbytes() == (15 + 10 + 2 * generated) * 4 * per_entry


def test_settings_reach_the_method(llama, prompts):
    with compressed(llama, "kvmerger", 0.35, sigma="mean_distance"):
        by_name = generate(llama, prompts[0])
    with (
        pytest.raises(UserError, match=r"sigm.*Did you mean 'sigma'"),
        compressed(llama, "kvmerger", 0.35, sigm=3),
    ):
        pass
    assert by_name.shape == (1, 38)


def test_hold_keeps_the_budget_while_decoding(llama, prompts):
    with compressed(llama, H2O(), 0.5, decode_policy="hold"):
        out = generate(llama, prompts[0], return_dict_in_generate=True)
    cache = out.cache if "cache" in out else out.past_key_values
    assert cache.nbytes() == 15 * 4 * 2 * 16 * 4


def test_buffers_grow_with_long_answers(llama, prompts):
    with compressed(llama, "full", 1):
        long = generate(llama, prompts[0], max_new_tokens=150, min_new_tokens=150)
    plain = generate(llama, prompts[0], max_new_tokens=150, min_new_tokens=150)
    assert torch.equal(long, plain)


def test_a_manual_loop_works_as_with_any_cache(llama, prompts):
    with torch.no_grad():
        plain = generate(llama, prompts[0])[0, -8:].tolist()
        with compressed(llama, Full(), 1):
            out, tokens = llama(prompts[0], use_cache=True), []
            for _ in range(8):
                token = out.logits[:, -1:].argmax(-1)
                tokens.append(int(token))
                cache = out.cache if "cache" in out else out.past_key_values
                name = "cache" if "cache" in out else "past_key_values"
                out = llama(token, use_cache=True, **{name: cache})
    assert tokens == plain


def test_sampling_works_and_beam_search_says_why_not(llama, prompts):
    with compressed(llama, "h2o", 0.5):
        assert generate(llama, prompts[0], do_sample=True).shape == (1, 38)
        with pytest.raises(UserError, match="beam search is not supported"):
            generate(llama, prompts[0], num_beams=2)


def test_a_block_that_compresses_nothing_warns(llama, prompts):
    with (
        pytest.warns(NothingCompressedWarning, match="no prompt went through LlamaForCausalLM") as said,
        compressed(llama, "h2o", 0.5),
    ):
        generate(tiny.new_model(), prompts[0])  # another object
    assert said[0].filename == __file__


@pytest.mark.parametrize("budget", [0.5, 1, 1000])
def test_a_block_with_a_prompt_does_not_warn(llama, prompts, budget, recwarn):
    with compressed(llama, "h2o", budget):
        generate(llama, prompts[0], max_new_tokens=1, min_new_tokens=1)
    assert not [each for each in recwarn if each.category is NothingCompressedWarning]


def test_an_exception_that_leaves_the_block_is_not_hidden_by_the_warning(llama, recwarn):
    with pytest.raises(RuntimeError, match="inside"), compressed(llama, "h2o", 0.5):
        raise RuntimeError("inside")
    assert not [each for each in recwarn if each.category is NothingCompressedWarning]


def test_what_attention_reads_is_held_inside_the_block(llama, prompts, monkeypatch):
    monkeypatch.setattr(H2O, "compress", lambda self, layer, allowance: keep_all(layer))
    wanted = r"H2O@0.5 on 0: layer 0: attention reads 30 entries .* where 15 were asked for"
    with pytest.raises(UnprovenError, match=wanted), compressed(llama, "h2o", 0.5):
        generate(llama, prompts[2])


def test_positions_by_the_length_of_the_cache_are_found_inside_the_block(llama, prompts, monkeypatch):
    def by_entries(_, seen, kwargs):
        entries = 15 if seen else 0
        return entries + torch.arange(kwargs["input_ids"].shape[1])[None]

    monkeypatch.setattr("kvmerge.api._place", by_entries)
    with (
        pytest.raises(UnprovenError, match="a token at position 15 that stands at 30 of its text"),
        compressed(llama, "h2o", 0.5),
    ):
        generate(llama, prompts[0])


def test_right_padding_is_refused(llama, prompts):
    batch = {key: value.flip(-1) for key, value in prompts[2].items()}
    with compressed(llama, "h2o", 0.5), pytest.raises(UserError, match="padded on the left"):
        generate(llama, batch)


def test_other_families_and_bad_budgets_are_refused(llama):
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=1)
    )
    with (
        pytest.raises(UserError, match="'bloom' is not supported: it adds a bias by distance"),
        compressed(bloom),
    ):
        pass
    for budget in (0, -3, 1.5, float("nan"), "abc"):
        with pytest.raises(UserError, match="budget"), compressed(llama, "h2o", budget):
            pass
    with pytest.raises(UserError, match="settings"), compressed(llama, H2O(), 0.5, heavy=3):
        pass


def test_a_prompt_beyond_the_sliding_window_is_refused(prompts):
    model = tiny.new_model("mistral", sliding_window=16)
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match=r"window of 16 .*30"):
        generate(model, prompts[0])


def test_the_model_is_restored_after_an_error(llama, prompts):
    with pytest.raises(RuntimeError, match="inside"), compressed(llama, "h2o", 0.5):
        raise RuntimeError("inside")
    assert llama.config._attn_implementation == "sdpa"
    assert not llama._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["kvmerger", "h2o", "cam"])
def test_half_precision_gives_finite_logits(prompts, dtype, method):
    model = tiny.new_model().to(dtype)
    with torch.no_grad(), compressed(model, method, 0.5):
        out = model(prompts[0], use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"
        again = model(prompts[0][:, :1], use_cache=True, **{name: out[name]})
    assert again.logits.isfinite().all()
