"""The GPU branches of the prefill, traced abstractly: fake tensors have a device, but no data.

What the kernels compute is checked on a card by `scripts/bench/gpu.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvmerge.kernels.attention import prefill_attention, prompt_kernel
from kvmerge.softmax import Softmax

FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"


class Calls(TorchDispatchMode):
    """Records the attention kernels that are called, with the shapes of their queries and keys."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "attention" in name:
            self.seen.append((name, tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def trace(monkeypatch):
    """Run a prefill on a GPU whose kernels are those named; gives output, lse and the calls."""

    def run(kernels, dtype, length=33, head_dim=64):
        for name in ("flash", "efficient"):
            allowed = name in kernels
            monkeypatch.setattr(
                torch.backends.cuda, f"can_use_{name}_attention", lambda _, yes=allowed: yes
            )
        with FakeTensorMode(), Calls() as calls:
            # as the models give them: a transposed view of (1, T, heads, head_dim)
            queries, keys, values = (
                torch.empty(1, length, heads, head_dim, dtype=dtype, device="cuda").transpose(1, 2)
                for heads in (8, 2, 2)
            )
            try:
                out, lse = prefill_attention(queries, keys, values, 0.1)
            except RuntimeError as error:
                if "driver version" not in str(error):
                    raise
                pytest.skip("a CUDA build of torch 2.6 asks the card for this, and there is no driver")
            run.named = prompt_kernel(queries, keys, values, Softmax(0.1), scored=False)
        return out, lse, calls.seen

    return run


@pytest.mark.parametrize("length", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_flash_attention_and_its_lse(trace, dtype, length):
    out, lse, calls = trace({"flash", "efficient"}, dtype, length)
    assert calls == [(FLASH, (1, 8, length, 64), (1, 2, length, 64))]
    assert (out.shape, out.dtype) == ((1, 8, length, 64), dtype)
    assert (lse.shape, lse.dtype) == ((1, 8, length), torch.float32)


@pytest.mark.parametrize("length", [1, 32, 33])
def test_float32_takes_the_efficient_kernel_without_repeating_keys(trace, length):
    out, lse, calls = trace({"efficient"}, torch.float32, length)
    assert calls == [(EFFICIENT, (2, 4, length, 64), (2, 4, length, 64))]
    assert (out.shape, out.dtype) == ((1, 8, length, 64), torch.float32)
    assert (lse.shape, lse.dtype) == ((1, 8, length), torch.float32)


def test_a_head_size_that_flash_attention_would_need_padded(trace):
    out, lse, calls = trace({"flash", "efficient"}, torch.float16, head_dim=36)
    assert [name for name, *_ in calls] == [EFFICIENT]
    assert out.shape == (1, 8, 33, 36)
    assert lse.shape == (1, 8, 33)


def test_without_a_kernel_that_gives_it_the_lse_is_none(trace):
    out, lse, _ = trace(set(), torch.float16)
    assert out.shape == (1, 8, 33, 64)
    assert lse is None


@pytest.mark.parametrize(
    ("kernels", "name"),
    [({"flash", "efficient"}, "flash"), ({"efficient"}, "efficient"), ((), "sdpa")],
)
def test_records_get_the_name_of_the_kernel_that_ran(trace, kernels, name):
    trace(kernels, torch.float16)
    assert trace.named == name
