"""Calls inside a `compressed` block: budget 1 is plain transformers, or there is a sentence."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache

from baselines.full import Full
from kvmerge import CompressedCache, UserError, compressed
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.hook import CACHE_NAMES, cache_name, hooked
from kvmerge.resolve import choices, load_method
from kvmerge.session import Row
from tests import tiny
from tests.tiny import prompt

METHODS = {name: load_method(name) for name in choices("method")}


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


def test_a_cache_goes_to_no_part_of_its_model(model):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        with pytest.raises(UserError, match="called as a whole"):
            model.model(token, **named(model.model, cache))
        model(token, **named(model, cache))
    with pytest.raises(UserError, match="called as a whole"):
        model.model(token, **named(model.model, cache))


@pytest.mark.parametrize("copied", [copy.copy, pickle.dumps])
def test_a_cache_is_not_pickled_or_copied_in_part(model, copied):
    with compressed(model, "h2o", 0.5):
        cache, _ = prefilled(model)
        with pytest.raises(UserError, match=r"cannot be pickled, or copied in part; copy\.deepcopy"):
            copied(cache)


@pytest.mark.parametrize("policy", ["append", "hold"])
@pytest.mark.parametrize("method", ["h2o", "kvmerger_log", "h2o_sim_decode"])
def test_copies_of_a_cache_go_on_each_by_itself(model, method, policy):
    """One prompt, three answers: each as if the prompt had been prefilled for it."""

    def answers(cache, first):
        """Logits of five tokens more, the first of them given."""
        found, token = [], torch.tensor([[first]])
        for _ in range(5):
            out = model(token, **named(model, cache))
            found.append(out.logits)
            token = out.logits.argmax(-1)
        return torch.cat(found, 1)

    with torch.no_grad(), compressed(model, method, 0.5, decode_policy=policy) as c:
        wanted = [answers(prefilled(model)[0], first) for first in (5, 6, 7)]
        cache, _ = prefilled(model)
        copies = [cache, copy.deepcopy(cache), copy.deepcopy(cache)]
        found = [answers(each, first) for each, first in zip(copies, (5, 6, 7), strict=True)]
        with pytest.raises(UserError, match="only there"):
            tiny.new_model()(torch.tensor([[5]]), **named(model, copies[1]))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert c.summary().decode_steps.tolist() == [5, 5, 5, 5, 4, 4]
    assert c.summary().turn.tolist() == [1, 1, 1, 1, 2, 2]


def test_a_cache_with_gradients_is_not_copied(model):
    with compressed(model, "h2o", 0.5):
        cache = cache_of(model(prompt(30), use_cache=True))
        with pytest.raises(UserError, match=r"have gradients cannot be copied.*no_grad"):
            copy.deepcopy(cache)


def test_a_copy_is_of_its_block_too(model):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        copied = copy.deepcopy(cache)
    with compressed(model, "full", 1), pytest.raises(UserError, match="only there"):
        model(token, **named(model, copied))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied_inside_its_block(model, copied):
    """The copy would go through the block of the first."""
    with (
        compressed(model, "h2o", 0.5),
        pytest.raises(UserError, match="cannot be copied or pickled inside"),
    ):
        copied(model)
    copied(model)


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1.self_attn.q_proj", "lm_head"])
def test_a_cache_whose_call_failed_midway_is_not_used_again(model, monkeypatch, part):
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        monkeypatch.setattr(model.get_submodule(part), "forward", None)
        with pytest.raises(TypeError), torch.no_grad():
            model(token, **named(model, cache))
        monkeypatch.undo()
        with pytest.raises(UserError, match="earlier call on this cache ended in an error"):
            model(token, **named(model, cache))
        with pytest.raises(UserError, match="only there"):
            tiny.new_model()(token, **named(model, cache))
        generate(model)  # the block serves on


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
        first = generate(model, return_dict_in_generate=True)
        cache = cache_of(first)
        generate(model, torch.cat([first.sequences, prompt(7, seed=5)], 1), **named(model, cache))
        assert isinstance(cache, CompressedCache)
        assert cache.get_seq_length() == 30 + 8 + 7 + 7  # the last token is never fed
        assert cache.stats[0].entries == [[15, 15]] * 2


def test_a_model_that_trains_is_refused():
    model = tiny.new_model(attention_dropout=0.1).train()
    with compressed(model, "h2o", 0.5), pytest.raises(UserError, match=r"model\.eval"):
        model(prompt(30))


# --- two blocks on one model


@pytest.mark.parametrize("outer", METHODS)
def test_a_block_inside_another_is_refused_for_every_pair_of_methods(model, outer):
    """Neither is ignored: the inner one is refused, and the outer one answers as it did."""
    with compressed(model, METHODS[outer], 0.5 if outer != "full" else 1) as c:
        alone = generate(model, tokens=4)
        for inner in METHODS.values():
            for budget in (0.25, 1):
                with (
                    pytest.raises(UserError, match="inside another block"),
                    compressed(model, inner, budget),
                ):
                    pass
        assert torch.equal(generate(model, tokens=4), alone)
    assert c.generations[0].rows == c.generations[1].rows
    assert is_as_before(model)


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


def test_a_model_that_shares_layers_is_refused(model):
    """Their attention would be replaced twice, by configurations of two models."""
    other = type(model)(copy.deepcopy(model.config)).eval()
    other.model = model.model
    plain = generate(model)
    for first, second in ((model, other), (other, model)):
        with (
            compressed(first, "full", 1),
            pytest.raises(UserError, match="inside another block"),
            compressed(second, "h2o", 0.5),
        ):
            pass
    with compressed(model, "full", 1):
        assert torch.equal(generate(model), plain)
    assert is_as_before(model)


def test_a_model_without_its_head_is_refused(model):
    with pytest.raises(UserError, match="LlamaModel cannot generate"), compressed(model.model):
        pass


def test_a_block_may_be_a_decorator(model):
    @compressed(model, "full", 1)
    def answer():
        return generate(model)

    plain = generate(model)
    assert torch.equal(answer(), plain)
    assert torch.equal(answer(), plain)
    assert is_as_before(model)


def test_a_generator_that_is_left_in_the_middle_closes_its_block(model):
    def answers():
        with compressed(model, "h2o", 0.5):
            while True:
                yield generate(model)

    left = answers()
    next(left)
    with pytest.raises(UserError, match="inside another block"):
        next(answers())
    left.close()
    assert is_as_before(model)


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


class Pause:
    """A streamer that stops at its `count`-th token; 1 is the prompt."""

    def __init__(self, count):
        self.left, self.reached, self.go_on = count, threading.Event(), threading.Event()

    def put(self, _):
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.go_on.wait(30)

    def end(self):
        pass


def started(call, pause):
    """Run a call in a thread, up to its pause; its results come when it has been joined."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert pause.reached.wait(30)
    return thread, found


def test_a_cache_in_another_threads_call_is_refused(model):
    """Between the tokens of its answer too, and the answer is what it would have been."""
    with compressed(model, "h2o", 0.5):
        first = generate(model, return_dict_in_generate=True)
        text = torch.cat([first.sequences, prompt(5)], 1)
        wanted = generate(model, text, **named(model, copy.deepcopy(cache_of(first))))
        cache, pause = cache_of(first), Pause(4)
        thread, found = started(
            lambda: generate(model, text, streamer=pause, **named(model, cache)), pause
        )
        for call in (
            lambda: model(prompt(1), **named(model, cache)),
            lambda: generate(model, text, **named(model, cache)),
            lambda: copy.deepcopy(cache),
        ):
            with pytest.raises(UserError, match="another thread is using this cache"):
                call()
        assert generate(model).shape == (1, 38)  # a prompt of one's own is welcome
        pause.go_on.set()
        thread.join()
    assert torch.equal(found[0], wanted)


def pause_before(monkeypatch, module, pause):
    """Make a part of a model pause before it runs."""
    forward = module.forward

    def slow(*arguments, **kwargs):
        pause.put(None)
        return forward(*arguments, **kwargs)

    monkeypatch.setattr(module, "forward", slow)


def test_a_cache_that_is_open_to_one_thread_is_closed_to_others(model, monkeypatch):
    """Another model knows nothing of blocks: only the cache itself can refuse it."""
    with compressed(model, "h2o", 0.5):
        cache, token = prefilled(model)
        wanted = model(token, **named(model, copy.deepcopy(cache))).logits
        pause = Pause(1)
        pause_before(monkeypatch, model.model.embed_tokens, pause)
        thread, found = started(lambda: model(token, **named(model, cache)).logits, pause)
        with pytest.raises(UserError, match="only there"):
            tiny.new_model()(token, **named(model, cache))
        pause.go_on.set()
        thread.join()
    assert torch.equal(found[0], wanted)


def test_a_block_waits_for_the_pass_that_another_thread_is_in(model, monkeypatch):
    """Else the rest of its layers would attend without the cache, and the last token be wrong."""
    with compressed(model, "h2o", 0.5):
        wanted = generate(model)
    pause = Pause(8)
    pause_before(monkeypatch, model.model.layers[1], pause)
    with compressed(model, "h2o", 0.5):
        thread, found = started(lambda: generate(model), pause)  # stops in its 8th and last pass
        threading.Timer(0.2, pause.go_on.set).start()
    assert is_as_before(model)
    thread.join()
    assert torch.equal(found[0], wanted)


def test_a_block_does_not_wait_for_a_thread_whose_call_was_refused(model):
    """One that lives on, between its calls."""
    pause = Pause(1)

    def refused():
        for call in (lambda: model(prompt(600)), lambda: model(prompt(3), use_cache=False)):
            with pytest.raises(UserError):
                call()
        pause.put(None)

    with compressed(model, "h2o", 0.5):
        generate(model)
        thread, found = started(refused, pause)
    assert is_as_before(model)
    pause.go_on.set()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(
    ("count", "message"), [(1, "block that this call was made in has ended"), (4, "used only there")]
)
def test_a_generation_that_outlives_its_block_is_refused(model, count, message):
    """Before its prompt was compressed as well, when nothing would show that it was not."""
    pause = Pause(count)
    with compressed(model, "h2o", 0.5):
        generate(model)
        thread, found = started(lambda: generate(model, streamer=pause), pause)
    pause.go_on.set()
    thread.join()
    assert isinstance(found[0], UserError)
    assert message in str(found[0])


def test_a_generate_that_was_held_on_to_is_refused_after_its_block(model):
    with compressed(model, "h2o", 0.5):
        held = model.generate
        generate(model)
    with pytest.raises(UserError, match="block that this call was made in has ended"):
        held(prompt(30))
    with (
        compressed(model, "full", 1),
        pytest.raises(UserError, match="block that this call was made in has ended"),
    ):
        held(prompt(30))


@pytest.mark.parametrize("count", [1, 4])
def test_a_generation_does_not_slip_into_the_next_block(model, count):
    pause = Pause(count)
    with compressed(model, "h2o", 0.5):
        generate(model)
        thread, found = started(lambda: generate(model, streamer=pause), pause)
    with compressed(model, "h2o", 0.25) as c:
        generate(model)
        pause.go_on.set()
        thread.join()
    assert isinstance(found[0], UserError)
    assert len(c.generations) == 1


@pytest.mark.parametrize("count", [1, 4])
def test_a_plain_generation_does_not_slip_into_a_block(model, count):
    pause = Pause(count)
    thread, found = started(lambda: generate(model, streamer=pause), pause)
    with compressed(model, "h2o", 0.5) as c:
        generate(model)
        pause.go_on.set()
        thread.join()
    assert isinstance(found[0], UserError)
    assert len(c.generations) == 1


def test_threads_have_a_block_each_on_models_of_their_own():
    models = [tiny.new_model(), tiny.new_model("qwen3")]
    wanted, found = {}, {}

    def serve(into, index):
        with compressed(models[index], "kvmerger", 0.5):
            into[index] = [generate(models[index], prompt(20 + step)) for step in range(4)]

    for index in range(2):
        serve(wanted, index)
    threads = [threading.Thread(target=serve, args=(found, index)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        torch.equal(*pair)
        for index in range(2)
        for pair in zip(found[index], wanted[index], strict=True)
    )


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
