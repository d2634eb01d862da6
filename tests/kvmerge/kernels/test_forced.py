"""A forced kernel is the one that runs, inside its block alone, and computes the same."""

from __future__ import annotations

import pytest
import torch

from kvmerge.errors import UserError
from kvmerge.kernels import tiled
from kvmerge.kernels.attention import attention_and_scores, prompt_kernel
from kvmerge.kernels.forced import KERNELS, forced, obstacle
from kvmerge.softmax import Softmax

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("kernel", ["tiled-torch", "tiled-onednn", "flash-cpu"])
def test_a_kernel_is_forced_inside_its_block_and_computes_the_same(monkeypatch, kernel):
    monkeypatch.setattr(tiled, "_WORTH_A_CHOICE", 1)
    monkeypatch.setenv("KVMERGE_CPU_PRODUCTS", "torch")
    states = [torch.randn(1, heads, 40, 16) for heads in (4, 2, 2)]
    softmax = Softmax(0.25)
    wanted = attention_and_scores(*states, softmax, scored=True)
    with forced(kernel):
        assert prompt_kernel(*states, softmax, scored=True) == kernel
        found = attention_and_scores(*states, softmax, scored=True)
    assert prompt_kernel(*states, softmax, scored=True) == "tiled-torch"
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "flash", "efficient"),
    [("flash", True, False), ("efficient", False, True), ("sdpa", False, False)],
)
def test_kernels_of_gpus_leave_one_fused_way_beside_the_plain_one(kernel, flash, efficient):
    enabled = torch.backends.cuda
    with forced(kernel):
        assert (enabled.flash_sdp_enabled(), enabled.mem_efficient_sdp_enabled()) == (flash, efficient)
        assert enabled.math_sdp_enabled()
    assert enabled.flash_sdp_enabled()


def test_a_kernel_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown kernel 'tiled-mkl'.*flash-cpu"):
        forced("tiled-mkl")


def test_what_a_device_or_a_dtype_lacks_is_said():
    usable = {
        (device.type, dtype): [k for k in KERNELS if not obstacle(k, device, dtype)]
        for device in (CPU, GPU)
        for dtype in (torch.float32, torch.bfloat16)
    }
    on_gpu = ["flash", "efficient", "sdpa"]
    assert usable == {
        ("cpu", torch.float32): ["tiled-torch", "tiled-onednn", "flash-cpu"],
        ("cpu", torch.bfloat16): [],
        ("cuda", torch.float32): on_gpu,
        ("cuda", torch.bfloat16): on_gpu,
    }
