"""Attention column sums against the whole softmax map."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmerge import scores
from kvmerge.kernels.attention import prefill_attention
from kvmerge.scores import column_sums
from tests.kvmerge import oracles
from tests.tiny import normal, quick


def states(batch, kv_heads, group, length, head_dim, seed, dtype=torch.float32):
    queries = 2 * normal(batch, kv_heads * group, length, head_dim, seed=seed, dtype=dtype)
    return queries, normal(batch, kv_heads, length, head_dim, seed=seed + 1, dtype=dtype)


def exact_lse(queries, keys, scale, causal):
    group = queries.shape[1] // keys.shape[1]
    repeated = keys.repeat_interleave(group, dim=1)
    return torch.tensor(
        oracles.each_head(
            lambda q, k: oracles.log_sum_exp(q, k, scale=scale, causal=causal), queries, repeated
        )
    ).view(queries.shape[:3])


@quick
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.integers(1, 9),
    causal=st.booleans(),
    given_lse=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
def test_equals_the_map(batch, kv_heads, group, length, causal, given_lse, scale, seed):
    queries, keys = states(batch, kv_heads, group, length, 4, seed)
    lse = exact_lse(queries, keys, 0.5 if scale is None else scale, causal) if given_lse else None
    found = column_sums(queries, keys, lse, causal=causal, scale=scale)
    wanted = oracles.column_sums(queries, keys, causal=causal, scale=scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


@quick
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_left_padding_is_neither_counted_nor_counting(lengths, causal, seed):
    queries, keys = states(len(lengths), 2, 2, 7, 4, seed)
    real = torch.tensor(lengths)
    found = column_sums(queries, keys, causal=causal, lengths=real)
    wanted = oracles.column_sums(queries, keys, causal=causal, lengths=real)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    for row, count in enumerate(lengths):
        assert not found[row, :, : 7 - count].any()
        alone = column_sums(
            queries[row : row + 1, :, 7 - count :], keys[row : row + 1, :, 7 - count :], causal=causal
        )
        torch.testing.assert_close(found[row : row + 1, :, 7 - count :], alone)


def test_the_lse_of_padding_is_never_read():
    queries, keys = states(1, 1, 2, 6, 4, seed=3)
    lse = exact_lse(queries[:, :, 2:], keys[:, :, 2:], 0.5, causal=True)
    padded = torch.cat([torch.full((1, 2, 2), torch.nan), lse], dim=-1)
    torch.testing.assert_close(
        column_sums(queries, keys, padded, lengths=torch.tensor([4])),
        column_sums(queries, keys, lengths=torch.tensor([4])),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("block_elements", [1, 2**12, 2**21])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_do_not_show(monkeypatch, block_elements, causal):
    """Lengths around the block size, against one softmax over the whole map."""
    monkeypatch.setattr(scores, "_BLOCK_ELEMENTS", block_elements)
    for length in (15, 16, 17, 300):
        queries, keys = states(1, 2, 2, length, 8, seed=length, dtype=torch.float64)
        logits = queries @ keys.repeat_interleave(2, dim=1).transpose(2, 3) * 8**-0.5
        if causal:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        wanted = logits.softmax(-1).sum(2).unflatten(1, (2, 2)).sum(2)
        lse = logits.logsumexp(-1)
        for given_lse in (None, lse):
            found = column_sums(queries, keys, given_lse, causal=causal)
            torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-5)
            total = found.sum(-1)  # each of the G * T rows sums to 1
            torch.testing.assert_close(total, torch.full_like(total, 2.0 * length), rtol=1e-5, atol=0)


def test_group_sum_is_the_sum_of_its_query_heads():
    queries, keys = states(1, 2, 3, 8, 4, seed=5)
    each = column_sums(queries, keys.repeat_interleave(3, dim=1))
    torch.testing.assert_close(
        column_sums(queries, keys), each.unflatten(1, (2, 3)).sum(2), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    queries, keys = (state.to(dtype) for state in states(1, 2, 2, 200, 16, seed=7))
    found = column_sums(queries, keys)
    wanted = column_sums(queries.float(), keys.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_with_the_kernels_lse(dtype, error):
    """Logits are rounded to the inputs' dtype here, so single columns are off; totals are not."""
    queries, keys = (state.to(dtype) for state in states(1, 2, 2, 300, 16, seed=7))
    _, lse = prefill_attention(queries, keys, keys, 0.25)
    found = column_sums(queries, keys, lse)
    wanted = column_sums(queries.float(), keys.float())
    torch.testing.assert_close(found, wanted, rtol=error, atol=1e-3)
    torch.testing.assert_close(found.sum(-1), torch.full((1, 2), 600.0), rtol=2e-3, atol=0)


def test_large_logits_do_not_overflow():
    queries, keys = states(1, 1, 1, 6, 4, seed=1)
    found = column_sums(queries * 1000, keys)
    assert found.isfinite().all()
    assert found.sum().item() == pytest.approx(6)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((1, 4, 5, 8), (1, 3, 5, 8)),
        ((1, 4, 5, 8), (1, 2, 6, 8)),
        ((1, 4, 5, 8), (1, 2, 5, 4)),
        ((2, 4, 5, 8), (1, 2, 5, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(queries, keys):
    with pytest.raises(ValueError, match="do not fit"):
        column_sums(torch.zeros(queries), torch.zeros(keys))


def test_an_lse_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="lse has shape"):
        column_sums(torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_scored_in_float32(dtype):
    queries, keys = (normal(1, heads, 300, 16, seed=heads).to(dtype) for heads in (4, 2))
    _, lse = prefill_attention(queries, keys, keys, 0.25)
    exact = column_sums(queries.double(), keys.double(), scale=0.25)
    torch.testing.assert_close(column_sums(queries, keys, lse, scale=0.25), exact, rtol=2e-3, atol=0)
