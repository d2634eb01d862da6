"""Other kernels than the one that is fastest here, to see what the choice alone changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeAlias

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvmerge.errors import unknown
from kvmerge.kernels import choice, tiled

_Forcing: TypeAlias = Callable[[], AbstractContextManager[None]]
_ON_CPU: dict[str, _Forcing] = {
    "tiled-torch": partial(choice.products_by, "torch"),
    "tiled-onednn": partial(choice.products_by, "onednn"),
    "flash-cpu": tiled.unused,
}
# With the plain kernel behind it: the fused ones do not take every mask that decoding needs.
_ON_GPU: dict[str, _Forcing] = {
    "flash": partial(sdpa_kernel, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
    "efficient": partial(sdpa_kernel, [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    "sdpa": partial(sdpa_kernel, [SDPBackend.MATH]),
}
KERNELS = (*_ON_CPU, *_ON_GPU)
"""Names of kernels for a prompt's attention (`kvmerge.kernels.attention.prompt_kernel`)."""


def forced(kernel: str) -> AbstractContextManager[None]:
    """Have a kernel used inside the block for every prompt that it can compute.

    Raises:
        UserError: for a name that is none of `KERNELS`.
    """
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    return (_ON_CPU | _ON_GPU)[kernel]()


def obstacle(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """Say why a kernel cannot be used; empty where it can, as far as device and dtype tell."""
    if kernel in _ON_GPU:
        return "" if device.type == "cuda" else "a kernel of GPUs"
    if device.type != "cpu":
        return "a kernel of CPUs"
    return "" if dtype == torch.float32 else f"a choice there is in float32, not in {dtype}"
