"""Calls inside a `compressed` block: budget 1 is plain transformers, or there is a sentence."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from baselines.full import Full
from kvmerge import CompressedCache, UserError, compressed
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.hook import CACHE_NAMES, cache_name, hooked
from kvmerge.session import Row
from tests import tiny
from tests.tiny import prompt


@pytest.fixture
def model():
    made = tiny.new_model()
    made.generation_config.eos_token_id = None
    return made


def generate(model, input_ids=None, tokens=8, **options):
    input_ids = prompt(30) if input_ids is None else input_ids
    given = {"attention_mask": torch.ones_like(input_ids), "do_sample": False} | options
    return model.generate(input_ids, max_new_tokens=tokens, **given)


def cache_of(out):
    return next(out[name] for name in CACHE_NAMES if name in out)


def prefilled(model, input_ids=None, **options):
    """The cache of a prompt, and its next token."""
    with torch.no_grad():
        out = model(prompt(30) if input_ids is None else input_ids, use_cache=True, **options)
    return cache_of(out), out.logits[:, -1:].argmax(-1)


def named(model, cache):
    return {cache_name(model): cache}


def is_as_before(model):
    return (
        model.config._attn_implementation == "sdpa"
        and not model._forward_pre_hooks
        and "generate" not in vars(model)
    )


# --- what a cache may be used for


def test_decoding_outside_the_block_is_refused(model):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
    with pytest.raises(UserError, match=r"only there.*inside the block"):
        model(token, **named(model, cache))
    with pytest.raises(UserError, match="only there"):
        generate(model, torch.cat([prompt(30), token], 1), **named(model, cache))


@pytest.mark.parametrize("entrance", ["forward", "generate"])
def test_a_cache_of_another_block_is_refused(model, entrance):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
    text = torch.cat([prompt(30), token], 1)
    call = {"forward": lambda **given: model(token, **given),
            "generate": lambda **given: generate(model, text, **given)}[entrance]  # fmt: skip
    with compressed(model, "full", 1), pytest.raises(UserError, match="only by the model of that"):
        call(**named(model, cache))


def test_a_cache_of_another_model_is_refused(model):
    other = tiny.new_model()
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        with pytest.raises(UserError, match="only by the model of that block"):
            other(token, **named(model, cache))
        with (
            compressed(other, "h2o", 0.5),
            pytest.raises(UserError, match="only by the model of that block"),
        ):
            other(token, **named(model, cache))
        model(token, **named(model, cache))  # it has not been touched


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_of_ones_own_is_refused(model, name, filled):
    own = cache_of(model(prompt(5), use_cache=True)) if filled else DynamicCache(config=model.config)
    with compressed(model, "h2o", 0.5):
        for call in (model, lambda ids, **given: generate(model, ids, **given)):
            with pytest.raises(UserError, match="cache of your own"):
                call(prompt(30), **{name: own})
    assert own.get_seq_length() == (5 if filled else 0)


def test_a_static_cache_of_ones_own_is_refused(model):
    own = StaticCache(config=model.config, max_cache_len=60)
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match="cache of your own"):
        generate(model, **named(model, own))


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("cut back", lambda cache: cache.crop(3)),
        ("copied", lambda cache: cache.batch_repeat_interleave(2)),
        ("divided", lambda cache: cache.batch_select_indices(torch.tensor([0]))),
        ("emptied", lambda cache: cache.reset()),
        ("beam search", lambda cache: cache.reorder_cache(torch.tensor([0]))),
    ],
)
def test_what_a_merged_cache_cannot_do_says_so(model, what, call):
    with compressed(model, "h2o", 0.5):
        cache, _ = prefilled(model)
        with pytest.raises(UserError, match=what):
            call(cache)


def test_a_cache_whose_call_failed_midway_is_not_used_again(model, monkeypatch):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        monkeypatch.setattr(model.model.layers[1].self_attn.q_proj, "forward", None)
        with pytest.raises(TypeError), torch.no_grad():
            model(token, **named(model, cache))
        with pytest.raises(UserError, match="earlier call on this cache ended in an error"):
            model(token, **named(model, cache))


# --- what generate may be asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache=False leaves nothing to compress"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size cannot be used"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens cannot"),
        ({"cache_implementation": "static"}, "cache_implementation='static' would be replaced"),
        ({"cache_implementation": "quantized"}, "would be replaced"),
        ({"num_beams": 2}, "beam search is not supported"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "no attention maps"),
    ],
)
@pytest.mark.parametrize("given", ["as an option", "in its configuration", "in the model's"])
def test_generation_that_needs_another_cache_is_refused(model, options, message, given):
    config = copy.deepcopy(model.generation_config)
    config.update(**options)
    if given == "in the model's":
        model.generation_config = config
    options = {"as an option": options, "in its configuration": {"generation_config": config}}.get(
        given, {}
    )
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match=message):
        generate(model, **options)


def test_an_assistant_is_refused(model):
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match="assistant_model cannot"):
        generate(model, assistant_model=tiny.new_model())


def test_a_call_without_a_cache_is_refused(model):
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match="use_cache=False leaves"):
        model(prompt(30), use_cache=False)
    model.config.use_cache = False
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match="use_cache=False leaves"):
        model(prompt(30))


def test_a_call_that_goes_round_the_model_is_refused(model):
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match="Call the whole model"):
        model.model(prompt(30))


def test_several_answers_to_one_prompt_are_rows_of_the_batch(model):
    wanted = generate(model, num_return_sequences=3, do_sample=True, top_k=1)
    with compressed(model, "full", 1):
        assert torch.equal(generate(model, num_return_sequences=3, do_sample=True, top_k=1), wanted)


def test_generate_given_by_position_is_checked_too(model):
    config = copy.deepcopy(model.generation_config)
    config.use_cache = False
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match="use_cache=False"):
        model.generate(prompt(30), config)


# --- positions, masks and shapes


BATCH = torch.cat([prompt(30), torch.cat([torch.zeros(1, 10, dtype=torch.long), prompt(20)], 1)])
MASK = (BATCH != 0).long()


def test_positions_that_are_not_the_texts_are_refused(model):
    packed = torch.cat([torch.arange(15), torch.arange(15)])[None]
    with compressed(model, "h2o", 0.5):
        with pytest.raises(UserError, match=r"go on at \[0\]"):
            model(prompt(30), position_ids=packed)
        cache, token = prefilled(model)
        with pytest.raises(UserError, match=r"go on at \[30\]"):
            model(token, **named(model, cache), position_ids=torch.tensor([[15]]))
        cache, token = prefilled(model, BATCH, attention_mask=MASK)
        with pytest.raises(UserError, match=r"go on at \[30, 20\]"):
            model(token, **named(model, cache), position_ids=torch.tensor([[30], [30]]))


def test_a_padded_batch_needs_its_mask_only_once(model):
    """Each row's positions are known from its prompt, so a loop that drops the mask is right too."""

    def loop(with_mask):
        out = model(BATCH, attention_mask=MASK, use_cache=True)
        mask, tokens = MASK, []
        for _ in range(6):
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(token)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            given = {"attention_mask": mask} if with_mask else {}
            out = model(token, **named(model, cache_of(out)), use_cache=True, **given)
        return torch.cat(tokens, 1)

    wanted = generate(model, BATCH, 6, attention_mask=MASK)[:, 30:]
    with torch.inference_mode(), compressed(model, "full", 1):
        assert torch.equal(loop(True), wanted)
        assert torch.equal(loop(False), wanted)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 30).long(),  # the new token is missing
        torch.ones(1, 32).long(),
        torch.cat([torch.zeros(1, 4), torch.ones(1, 27)], 1).long(),  # hides part of the prompt
        torch.cat([torch.ones(1, 30), torch.zeros(1, 1)], 1).long(),
        torch.ones(1, 1, 1, 31).long(),
    ],
)
def test_a_mask_that_is_not_the_texts_is_refused(model, mask):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        with pytest.raises(UserError, match="attention_mask must"):
            model(token, **named(model, cache), attention_mask=mask)


def test_a_batch_of_other_size_is_refused(model):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        with pytest.raises(UserError, match="the batch has 2 rows, and its cache 1"):
            model(token.expand(2, 1), **named(model, cache))


def test_a_conversation_goes_on_from_its_cache(model):
    """What was said is compressed once; the next turn is appended, as generate does it."""
    plain = generate(model, return_dict_in_generate=True)
    turn = torch.cat([plain.sequences, prompt(7, seed=5)], 1)
    wanted = generate(model, turn)
    with compressed(model, "full", 1):
        first = generate(model, return_dict_in_generate=True)
        cache = cache_of(first)
        assert torch.equal(generate(model, turn, **named(model, cache)), wanted)
    with compressed(model, "h2o", 0.5):
        cache = cache_of(generate(model, return_dict_in_generate=True))
        generate(model, turn, **named(model, cache))
        assert isinstance(cache, CompressedCache)
        assert cache.get_seq_length() == 30 + 8 + 7 + 7  # the last token is never fed
        assert cache.stats[0].entries == [[15, 15]] * 2


def test_a_model_that_trains_is_refused():
    model = tiny.new_model(attention_dropout=0.1).train()
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match=r"model\.eval"):
        model(prompt(30))


# --- two blocks on one model


@pytest.mark.parametrize("outer", ["compressed", "hooked", "a run"])
def test_a_second_block_is_refused_and_the_first_goes_on(model, outer):
    plain = generate(model)
    with compressed(model, "full", 1) if outer == "compressed" else hooked(model):
        with pytest.raises(UserError, match="inside another block"), compressed(model, "h2o", 0.5):
            pass
        with pytest.raises(UserError, match="inside another block"):
            run_sample(model, prompt(9), [Row(Full(), Budget.parse(1))], Stop(1, frozenset()))
        if outer == "compressed":
            assert torch.equal(generate(model), plain)
    assert is_as_before(model)
    assert torch.equal(generate(model), plain)


def test_a_model_that_shares_its_configuration_is_refused(model):
    """Its attention would be replaced too: the configuration says which one is used."""
    twin = type(model)(model.config).eval()
    with (
        compressed(model, "h2o", 0.5),
        pytest.raises(UserError, match="inside another block"),
        compressed(twin, "h2o", 0.5),
    ):
        pass
    with compressed(twin, "h2o", 0.5):
        pass


def test_two_models_have_a_block_each(model):
    other = tiny.new_model("qwen3")
    plain = generate(model), generate(other)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(compressed(model, "full", 1))
        second.enter_context(compressed(other, "full", 1))
        assert torch.equal(generate(model), plain[0])
        first.close()  # not in the order they were opened
        assert is_as_before(model)
        assert torch.equal(generate(other), plain[1])
    assert is_as_before(other)


def test_of_blocks_in_many_threads_one_is_open(model):
    """Whoever has it gets its own budget's answer; the others are told, and can try again."""
    with compressed(model, "h2o", 0.5):
        wanted = {0.5: generate(model)}
    with compressed(model, "h2o", 0.25):
        wanted[0.25] = generate(model)
    refused, wrong = [], []
    together = threading.Barrier(4)

    def serve(budget):
        together.wait()
        for _ in range(5):
            try:
                with compressed(model, "h2o", budget):
                    if not torch.equal(generate(model), wanted[budget]):
                        wrong.append(budget)
            except UserError as error:
                assert "inside another block" in str(error)  # noqa: PT017
                refused.append(budget)

    threads = [threading.Thread(target=serve, args=(budget,)) for budget in (0.5, 0.25) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(refused) < 20
    assert is_as_before(model)


def test_one_block_serves_many_threads(model):
    """As a streamer does it, which generates in a thread of its own."""
    with compressed(model, "h2o", 0.5):
        wanted = generate(model)
        found = [None] * 3

        def serve(index):
            found[index] = generate(model)

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(each, wanted) for each in found)


def test_the_model_is_as_it_was_after_a_refused_block(model):
    for broken in ({"budget": 0}, {"decode_policy": "never"}, {"method": "nope"}):
        with pytest.raises(UserError), compressed(model, **broken):
            pass
        assert is_as_before(model)
    with compressed(model, "h2o", 0.5):
        pass


def test_a_generate_of_the_users_own_is_kept(model):
    def own(*arguments, **kwargs):
        return type(model).generate(model, *arguments, **kwargs)

    model.generate = own
    with compressed(model, "full", 1):
        generate(model)
    assert model.generate is own
