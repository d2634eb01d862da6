"""The attention kernels against plain torch, and the hook into transformers."""

import pytest
import torch

from kvmerge.errors import UserError
from kvmerge.hook import NAME, forward, hooked
from kvmerge.kernels import choice
from kvmerge.kernels.attention import (
    attention_and_scores,
    cached_attention,
    prefill_attention,
    prompt_kernel,
)
from kvmerge.softmax import Softmax
from tests.kvmerge import oracles
from tests.tiny import AnySession, new_model, normal, prompt, shared_model


def plain(queries, keys, values, scale, bias=None):
    rows = zip(queries, keys, values, [None] * len(queries) if bias is None else bias, strict=True)
    return torch.stack([oracles.attend(q, k, v, scale, b) for q, k, v, b in rows])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("scale", [0.25, 0.4])
def test_a_prefill_and_its_log_sum_exp_are_those_of_the_whole_map(heads, kv_heads, length, scale):
    # as the models give them: a transposed view of (1, T, heads, head_dim)
    queries = normal(1, length, heads, 16, seed=1).transpose(1, 2)
    keys = normal(1, length, kv_heads, 16, seed=2).transpose(1, 2)
    values = normal(1, length, kv_heads, 16, seed=3).transpose(1, 2)
    out, lse = prefill_attention(queries, keys, values, scale)
    torch.testing.assert_close(out, plain(queries, keys, values, scale), atol=1e-5, rtol=0)
    assert lse is not None
    assert lse.dtype == torch.float32
    logits = queries @ keys.repeat_interleave(heads // kv_heads, dim=1).transpose(2, 3) * scale
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    wanted = logits.masked_fill(future, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefill_lse_of_half_precision_is_float32(dtype):
    states = [normal(1, heads, 33, 16, seed=heads).to(dtype) for heads in (4, 2, 2)]
    out, lse = prefill_attention(*states, 0.25)
    exact_out, exact_lse = prefill_attention(*(state.float() for state in states), 0.25)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, exact_lse, atol=2e-3, rtol=0)
    torch.testing.assert_close(out.float(), exact_out, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("n_new", "length"), [(1, 1), (1, 9), (3, 3), (3, 9)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_over_a_cache_is_that_of_repeated_keys(heads, kv_heads, n_new, length, with_bias):
    rows = 3
    queries = normal(rows, n_new, heads, 16, seed=1).transpose(1, 2)
    # views into larger buffers, as the cache hands them over
    keys = normal(rows, kv_heads, length + 5, 16, seed=2)[:, :, :length]
    values = normal(rows, kv_heads, length + 5, 16, seed=3)[:, :, :length]
    bias = normal(rows, kv_heads, length, seed=4) if with_bias else None
    found = cached_attention(queries, keys, values, Softmax(0.3), bias)
    assert found.shape == queries.shape
    torch.testing.assert_close(found, plain(queries, keys, values, 0.3, bias), atol=1e-5, rtol=0)


def test_minus_infinity_hides_an_entry():
    queries, keys = normal(1, 2, 2, 8, seed=1), normal(1, 1, 6, 8, seed=2)
    values = normal(1, 1, 6, 8, seed=3)
    bias = torch.zeros(1, 1, 6)
    bias[..., 1] = -torch.inf
    rest = [0, 2, 3, 4, 5]
    torch.testing.assert_close(
        cached_attention(queries, keys, values, Softmax(0.3), bias),
        cached_attention(queries, keys[:, :, rest], values[:, :, rest], Softmax(0.3)),
    )


def test_a_hooked_model_has_its_own_attention_again_afterwards():
    model = shared_model()
    before = model.config._attn_implementation
    input_ids = prompt(9)
    logits = model(input_ids).logits
    with hooked(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids).logits, logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_hooked_model_has_its_own_attention_again_after_an_error(implementation):
    model = new_model()
    model.set_attn_implementation(implementation)

    class Broken(AnySession):
        def attend(self, *_):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"), hooked(model):
        forward(model, Broken(), prompt(4), torch.arange(4)[None])
    assert model.config._attn_implementation == implementation


def test_a_hooked_model_needs_a_session():
    model = shared_model()
    with hooked(model), pytest.raises(UserError, match="did not come through"):
        model(prompt(3))


def test_the_session_is_given_the_scale_of_the_model():
    seen = []

    class Recorder(AnySession):
        def attend(self, layer_idx, queries, keys, values, softmax):
            seen.append((layer_idx, queries.shape, keys.shape, softmax))
            return torch.zeros_like(queries)

    model = shared_model()
    with hooked(model):
        out = forward(model, Recorder(), prompt(5), torch.arange(5)[None], logits_to_keep=1)
    assert out.shape == (1, 1, 97)
    assert seen == [(i, (1, 4, 5, 16), (1, 2, 5, 16), Softmax(0.25)) for i in range(2)]


@pytest.mark.parametrize("scored", [True, False])
def test_the_kernel_and_its_log_sum_exp_give_the_same(monkeypatch, scored):
    states = [torch.randn(1, heads, 90, 16) for heads in (6, 2, 2)]
    wanted = attention_and_scores(*states, Softmax(0.25), scored=scored)
    monkeypatch.setattr("kvmerge.kernels.tiled.suits", lambda _: False)
    found = attention_and_scores(*states, Softmax(0.25), scored=scored)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    assert (found[1] is None) == (wanted[1] is None) == (not scored)
    if scored:
        torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-5)


def test_the_kernel_of_a_prompt_is_named_by_what_runs():
    def named(dtype, window=None, softcap=None):
        states = (torch.ones(1, heads, 9, 16, dtype=dtype) for heads in (4, 2, 2))
        return prompt_kernel(*states, Softmax(0.25, softcap), scored=True, window=window)

    assert named(torch.float32) == "tiled-torch"
    assert named(torch.bfloat16) == named(torch.float16) == "flash-cpu"
    assert named(torch.bfloat16, window=4) == "tiled-torch"
    assert named(torch.bfloat16, softcap=30.0) == "tiled-torch"


def test_a_long_prompt_names_the_library_that_multiplies(monkeypatch):
    states = [torch.ones(1, heads, 512, 16) for heads in (4, 2, 2)]
    for way in choice.WAYS:
        monkeypatch.setenv(choice.VARIABLE, way)
        assert prompt_kernel(*states, Softmax(0.25), scored=True) == f"tiled-{way}"
