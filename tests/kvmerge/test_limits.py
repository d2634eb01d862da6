"""How long a text may be: positions, and every RoPE type of transformers against `generate`."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baselines.full import Full
from kvmerge.api import compressed
from kvmerge.budget import Budget
from kvmerge.engine import Request, Stop, run_sample, run_samples, score_continuations
from kvmerge.errors import UserError
from kvmerge.limits import check_fits, is_past_the_switch, positions
from kvmerge.session import Row
from tests.tiny import any_model, new_model, prompt

ORIGINAL = 48
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [4.0, 3.0, 5.0, 2.0, 6.0, 3.0, 4.0, 7.0],
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}
FULL = Row(Full(), Budget.parse(1))


def rope_model(rope, family="llama"):
    """A model of 48 positions, stretched to 192."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0} | ROPES[rope]
    longest = ORIGINAL if rope == "dynamic" else 4 * ORIGINAL
    more = {"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}
    return new_model(family, rope_parameters=parameters, max_position_embeddings=longest, **more)


def generated(model, input_ids, tokens):
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(
            input_ids,
            do_sample=False,
            max_new_tokens=tokens,
            attention_mask=torch.ones_like(input_ids),
        )
    return out[0, input_ids.shape[1] :].tolist()


def test_every_rope_type_of_transformers_is_here():
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("length", [20, 40, 47, 48, 49, 80])
@pytest.mark.parametrize(
    ("family", "rope"), [*(("llama", rope) for rope in ROPES), ("phi3", "longrope")]
)
def test_the_full_cache_is_generates_answer_or_is_refused(family, rope, length):
    """Below the original length, across it, at its edges, and beyond, whatever ran before."""
    tokens = 16
    wanted = generated(rope_model(rope, family), prompt(length), tokens)
    used = rope_model(rope, family)
    generated(used, prompt(90, seed=3), 4)  # dynamic NTK keeps what this leaves behind
    crosses = length <= ORIGINAL < length + tokens
    beyond = length + tokens >= ORIGINAL
    refused = {"dynamic": beyond, "longrope": crosses}.get(rope, False)
    if refused:
        with pytest.raises(UserError, match=r"llama|phi3"):
            run_sample(used, prompt(length), [FULL], Stop(tokens, frozenset()))
    else:
        results, _ = run_sample(used, prompt(length), [FULL], Stop(tokens, frozenset()))
        assert results[0].token_ids == wanted
    try:
        with compressed(used, "full", 1):
            found = generated(used, prompt(length), tokens)
    except UserError as error:
        assert rope in str(error) or "positions" in str(error)  # noqa: PT017
        assert refused
    else:
        assert found == wanted


def test_texts_of_both_factors_of_longrope_do_not_share_a_batch():
    """The rotation goes by the longest of a batch, so the short one would be turned by the long's."""
    model = rope_model("longrope")
    prompts = [prompt(20), prompt(80, seed=1), prompt(25, seed=2)]
    stop = Stop(8, frozenset())
    alone = [run_sample(model, ids, [FULL], stop)[0][0].token_ids for ids in prompts]
    together = run_samples(model, [Request(ids, [FULL]) for ids in prompts], stop)
    assert [rows[0].token_ids for rows, _ in together] == alone
    texts = [[5, 6, 7, 8]] * 3
    requests = [Request(ids, [FULL], reference=0) for ids in prompts]
    scored = [score_continuations(model, [request], [texts[0]])[0][0][0].nll for request in requests]
    of_all = score_continuations(model, requests, texts)
    assert [rows[0].nll for rows, _ in of_all] == pytest.approx(scored, rel=1e-5)


def test_the_switch_is_after_the_original_length():
    config = rope_model("longrope").config
    assert [is_past_the_switch(config, length) for length in (47, 48, 49)] == [False, False, True]
    assert not is_past_the_switch(rope_model("yarn").config, 1000)


# --- positions


def test_prompt_and_answer_must_fit_the_models_positions():
    model = new_model(max_position_embeddings=40)
    run_sample(model, prompt(32), [FULL], Stop(8, frozenset()))
    with pytest.raises(UserError, match=r"llama has 40 positions; .* has 33 .* up to 8\..*max_l"):
        run_sample(model, prompt(33), [FULL], Stop(8, frozenset()))
    with pytest.raises(UserError, match="40 positions"):
        score_continuations(model, [Request(prompt(39), [FULL])], [[3, 4]])


def test_a_context_of_ones_own_is_the_limit_where_it_is_shorter():
    model = new_model(max_position_embeddings=40)
    for context, limit in ((20, 20), (100, 40), (None, 40)):
        with pytest.raises(UserError, match=f"{limit} positions"):
            check_fits(model.config, limit, 1, context=context)
        check_fits(model.config, limit - 1, 1, context=context)


def test_a_protocol_may_overrun_them():
    model = new_model(max_position_embeddings=40)
    request = Request(prompt(45), [FULL], context=30, may_overrun=True)
    assert run_samples(model, [request], Stop(2, frozenset()))[0][0][0].token_ids


def test_no_prompt_runs_before_all_of_a_batch_are_known_to_fit(monkeypatch):
    model = new_model(max_position_embeddings=40)
    monkeypatch.setattr("kvmerge.engine.forward", lambda *_, **__: pytest.fail("a prompt was run"))
    requests = [Request(prompt(length), [FULL]) for length in (10, 40)]
    with pytest.raises(UserError, match="the prompt has 40"):
        run_samples(model, requests, Stop(1, frozenset()))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_generate_is_stopped_at_the_last_position(kind):
    """Learned positions end in an index error, rotated ones in untrained territory."""
    model = any_model(kind, max_position_embeddings=40)
    plain = generated(model, prompt(33), 8)
    with compressed(model, "full", 1):
        assert generated(model, prompt(33), 8) == plain
        with pytest.raises(UserError, match=r"40 positions; the prompt has 33 and the answer up to 8"):
            generated(model, prompt(33), 9)


def test_a_stretched_models_positions_count():
    def stated(**rope):
        parameters = {"rope_theta": 10000.0} | rope
        return positions(new_model(rope_parameters=parameters, max_position_embeddings=48).config)

    assert stated(rope_type="default") == 48
    assert stated(rope_type="yarn", factor=4.0, original_max_position_embeddings=48) == 192
    assert positions(rope_model("longrope").config) == 192
