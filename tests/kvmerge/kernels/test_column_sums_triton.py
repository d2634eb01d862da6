"""The Triton kernel against the softmax map in float64, under Triton's interpreter.

Whether Triton interprets or compiles is settled when it is imported, so the kernel is interpreted in a
process of its own, all cases in one. The interpreter multiplies bfloat16 bit patterns, so bfloat16 is
only compiled here; `scripts/bench/gpu.py` runs it on a card.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path

import pytest
import torch

from kvmerge import scores
from kvmerge.softmax import Softmax
from tests.tiny import normal

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kvmerge.kernels import column_sums_triton as kernel  # noqa: E402

INTERPRET = """
import sys, torch
from kvmerge.kernels.column_sums_triton import column_sums
cases = torch.load(sys.argv[1])
torch.save({name: column_sums(*states, **rest) for name, (states, rest) in cases.items()}, sys.argv[2])
"""
MOST_SHARED_MEMORY = 99 * 1024
"""Bytes that a block may have on GPUs of compute capability 8.6, the least since Ampere."""


def states(batch, kv_heads, group, length, head_dim, dtype=torch.float32):
    """Queries and keys as the models give them: transposed views of (batch, T, heads, head_dim)."""
    queries, keys = (
        factor * normal(batch, length, heads, head_dim, seed=heads + length).transpose(1, 2)
        for heads, factor in ((kv_heads * group, 2), (kv_heads, 1))
    )
    return queries.to(dtype), keys.to(dtype)


def exact(queries, keys, causal=True, scale=None, lengths=None):
    """Log-sum-exp and column sums of the whole map in float64; NaN and 0 for padding."""
    batch, heads, length, head_dim = queries.shape
    group = heads // keys.shape[1]
    lse = torch.full((batch, heads, length), torch.nan)
    sums = torch.zeros(batch, keys.shape[1], length, dtype=torch.float64)
    for row in range(batch):
        real = slice(length - (length if lengths is None else lengths[row]), None)
        query, key = queries[row, :, real].double(), keys[row, :, real].double()
        logits = query @ key.repeat_interleave(group, 0).transpose(1, 2)
        logits *= head_dim**-0.5 if scale is None else scale
        if causal:
            future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        lse[row, :, real] = logits.logsumexp(-1).float()
        sums[row, :, real] = logits.softmax(-1).sum(1).unflatten(0, (-1, group)).sum(1)
    return lse, sums


def shapes():
    """Every length with every dtype, causal or not; groups and head sizes take turns."""
    turns = cycle(product((1, 3, 4), (16, 64, 80)))
    for length in (1, 15, 16, 17, 100, 257):
        for dtype, causal in product((torch.float32, torch.float16), (True, False)):
            group, head_dim = next(turns)
            yield (
                f"{length}-{dtype}-{causal}-{group}-{head_dim}",
                (group, length, head_dim, dtype, causal),
            )


SHAPES = dict(shapes())
PADDED = [40, 33, 5, 0]
LARGE = "large logits"


def cases():
    for name, (group, length, head_dim, dtype, causal) in SHAPES.items():
        yield name, states(1, 2, group, length, head_dim, dtype), {"causal": causal}
    queries, keys = states(len(PADDED), 2, 3, 40, 16)
    for row, count in enumerate(PADDED):
        queries[row, :, : 40 - count] = keys[row, :, : 40 - count] = torch.nan
    for causal in (True, False):
        lengths = torch.tensor(PADDED)
        yield f"padded-{causal}", (queries, keys), {"causal": causal, "lengths": lengths}
    yield "scaled", states(2, 1, 2, 50, 16), {"scale": 0.4}
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in states(1, 1, 2, 50, 16)]
    yield "columns first", columns, {}
    yield LARGE, [10 * t for t in states(1, 1, 1, 50, 16)], {}
    yield "no tokens", states(1, 2, 2, 0, 16), {}


CASES = {name: (given, rest) for name, given, rest in cases()}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    inputs = {name: ((*given, exact(*given, **rest)[0]), rest) for name, (given, rest) in CASES.items()}
    torch.save(inputs, folder / "cases.pt")
    subprocess.run(
        [sys.executable, "-c", INTERPRET, folder / "cases.pt", folder / "sums.pt"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        check=True,
    )
    return torch.load(folder / "sums.pt")


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_the_map(interpreted, name):
    given, rest = CASES[name]
    found = interpreted[name]
    assert found.dtype == torch.float32
    rtol = 1e-3 if name == LARGE else 2e-5  # their log-sum-exp, in float32, has fewer decimals
    torch.testing.assert_close(found.double(), exact(*given, **rest)[1], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_sums_are_those_of_the_torch_version(interpreted, name):
    (queries, keys), rest = CASES[name]
    lse = exact(queries, keys, **rest)[0]
    wanted = scores.column_sums(queries, keys, lse, **rest)
    torch.testing.assert_close(interpreted[name], wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_neither_counted_nor_counting(interpreted, causal):
    found = interpreted[f"padded-{causal}"]
    for row, count in enumerate(PADDED):
        assert not found[row, :, : 40 - count].any()
        torch.testing.assert_close(found[row].sum(-1), torch.full((2,), 3.0 * count))


# --- compiled, which the interpreter does not do


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability"),
    [
        (torch.bfloat16, 128, 80),
        (torch.bfloat16, 128, 90),
        (torch.float16, 80, 80),
        (torch.bfloat16, 256, 80),
        (torch.float32, 64, 80),
    ],
)
def test_compiles_within_the_shared_memory_of_a_gpu(dtype, head_dim, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = kernel._tiles(dtype, head_dim)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"GROUP": 4, "HEAD_DIM": head_dim, "CAUSAL": True, **tiles}
    state = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = {"queries": state, "keys": state, "lse": "*fp32", "sums": "*fp32", "pads": "*i32"}
    types |= {"length": "i32", "kv_heads": "i32", "scale": "fp32"}
    names = kernel._column_sums.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i64") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in signature[n]}
    compiled = triton.compile(
        ASTSource(kernel._column_sums, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    assert compiled.metadata.shared <= MOST_SHARED_MEMORY
    assert ("mma" in compiled.asm["ptx"]) == (dtype != torch.float32)  # tensor cores
    assert "tf32" not in compiled.asm["ptx"]


# --- when it is used


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def taken(monkeypatch):
    """What the kernel was called with; it gives a mark in place of sums."""
    calls = []

    def column_sums(*given, **rest):
        calls.append((given, rest))
        return "the kernel's"

    monkeypatch.setattr(kernel, "column_sums", column_sums)
    monkeypatch.setattr(kernel, "_runs", lambda *_: True)
    return calls


def test_on_a_gpu_the_kernel_is_called(taken):
    queries, keys = states(1, 2, 2, 9, 16)
    queries = queries.as_subclass(OnGpu)
    lse, lengths = torch.zeros(1, 4, 9), torch.tensor([5])
    found = scores.column_sums(queries, keys, lse, causal=False, softmax=Softmax(0.3), lengths=lengths)
    assert found == "the kernel's"
    [(given, rest)] = taken
    assert all(a is b for a, b in zip(given, (queries, keys, lse), strict=True))
    assert rest == {"causal": False, "scale": 0.3, "lengths": lengths}


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"lse": None},
        {"triton": None},
        {"dtype": torch.float64},
        {"head_dim": kernel.MAX_HEAD_DIM + 8},
        {"runs": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_where_the_kernel_cannot_be_used_torch_is(taken, monkeypatch, change):
    queries, keys = states(1, 2, 2, 9, change.get("head_dim", 16), change.get("dtype", torch.float32))
    lse, wanted = exact(queries, keys)
    if "triton" in change:
        monkeypatch.setattr(scores, "find_spec", lambda _: None)
    monkeypatch.setattr(kernel, "_runs", lambda *_: change.get("runs", True))
    if "device" not in change:
        queries = queries.as_subclass(OnGpu)
    found = scores.column_sums(queries, keys, None if "lse" in change else lse)
    assert taken == []
    torch.testing.assert_close(found.double().as_subclass(torch.Tensor), wanted, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_does_not_compile_is_not_used(caplog):
    """As here, where there are no GPU states to run it on."""
    kernel._runs.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernel._runs(torch.device("cpu"), torch.float32, 16)
    assert "summed in torch" in caplog.text
