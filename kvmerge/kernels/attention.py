"""The attention kernels: of a whole prompt, with its column sums, and of new tokens over a cache.

Everything that depends on the names inside torch is in this folder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvmerge.kernels import tiled
from kvmerge.scores import column_sums, sums_by_triton
from kvmerge.softmax import Softmax

Read = Callable[[int, Tensor, Tensor, Tensor | None], None]
"""Told by attention over a cache what it is about to read: (new tokens, keys, values, bias), the very
tensors that it multiplies and adds."""


def attention_and_scores(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: Softmax,
    *,
    scored: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend causally over a whole prompt, and sum how much of it each key received.

    Args:
        queries: `(1, heads, T, head_dim)`.
        keys: `(1, kv_heads, T, head_dim)`.
        values: `(1, kv_heads, T, head_dim)`.
        softmax: the layer's.
        scored: whether the scores are wanted.
        window: the last tokens that a row sees, itself among them; None: all before it.

    Returns:
        output `(1, heads, T, head_dim)`; column sums `(1, kv_heads, T)` float32, or None.
    """
    if tiled.suits(queries):
        return tiled.attend(queries, keys, values, softmax, scored=scored, window=window)
    if window is not None or not softmax.is_plain:
        out, sums = tiled.attend(
            queries.float(), keys.float(), values.float(), softmax, scored=scored, window=window
        )
        return out.to(values.dtype), sums
    out, lse = prefill_attention(queries, keys, values, softmax.scale)
    return out, column_sums(queries, keys, lse, softmax=softmax) if scored else None


def prompt_kernel(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: Softmax,
    *,
    scored: bool,
    window: int | None = None,
) -> str:
    """Name what `attention_and_scores` works by: records tell runs of different kernels apart by it.

    The arguments are that function's. `tiled-torch` and `tiled-onednn` name the library that
    multiplies; `flash`, `efficient` and `flash-cpu` torch's fused kernels, `sdpa` whatever torch takes
    otherwise; `+triton` follows where the column sums have a kernel of their own.
    """
    if tiled.suits(queries) or window is not None or not softmax.is_plain:
        return f"tiled-{tiled.faster_products(queries)}"
    kernel = _fused_kernel(queries, keys, values)
    has_lse = kernel != "sdpa"
    return f"{kernel}+triton" if scored and has_lse and sums_by_triton(queries, softmax) else kernel


def prefill_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Attend causally over a whole prompt, with the log-sum-exp of its rows where the kernel gives it.

    Args:
        queries: `(1, heads, T, head_dim)`.
        keys: `(1, kv_heads, T, head_dim)`; not repeated for the heads of a group.
        values: `(1, kv_heads, T, head_dim)`.

    Returns:
        output `(1, heads, T, head_dim)`; lse `(1, heads, T)` float32 natural log, or None.
    """
    kernel = _fused_kernel(queries, keys, values)
    if kernel == "flash":
        # No public call returns the log-sum-exp. This kernel takes grouped heads as they are.
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, True, scale=scale
        )
        return out, lse
    packed = _packed(queries, keys, values)
    out, lse = _packed_attention(kernel, *packed, scale)
    return out.flatten(0, 1).unsqueeze(0), None if lse is None else lse.flatten(0, 1).unsqueeze(0)


def _fused_kernel(queries: Tensor, keys: Tensor, values: Tensor) -> str:
    """Name torch's kernel for a prompt: `flash`, `efficient`, `flash-cpu` or `sdpa`."""
    if queries.device.type == "cpu":
        return "flash-cpu"
    if queries.is_cuda:
        if queries.shape[-1] % 8 == 0 and _can_use_flash(queries, keys, values):
            return "flash"
        if _can_use_efficient(*_packed(queries, keys, values)):
            return "efficient"
    return "sdpa"


def _packed(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move KV heads to the batch axis, so that a group shares its keys by a stride of 0.

    Returns:
        `(kv_heads, group, T, head_dim)` each.
    """
    packed = queries.squeeze(0).unflatten(0, (keys.shape[1], -1))
    shared_keys, shared_values = (
        state.transpose(0, 1).expand(-1, packed.shape[1], -1, -1) for state in (keys, values)
    )
    return packed, shared_keys, shared_values


def _packed_attention(
    kernel: str, queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Attend over `(kv_heads, group, T, head_dim)` states: output; lse, or None."""
    if kernel == "flash-cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, True, scale=scale
        )
    if kernel == "efficient":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            queries, keys, values, None, True, 0.0, True, scale=scale
        )
        return out, lse.narrow(-1, 0, queries.shape[2])  # the kernel pads it to a multiple of 32
    return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale), None


def _can_use_flash(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    return torch.backends.cuda.can_use_flash_attention(_kernel_params(queries, keys, values))


def _can_use_efficient(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    return torch.backends.cuda.can_use_efficient_attention(_kernel_params(queries, keys, values))


def _kernel_params(queries: Tensor, keys: Tensor, values: Tensor) -> torch.backends.cuda.SDPAParams:
    """Describe causal attention without dropout, as torch's tests of its GPU kernels do."""
    grouped = queries.shape[1] != keys.shape[1]
    return torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, True, grouped)


def cached_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: Softmax,
    bias: Tensor | None = None,
    window: int | None = None,
    read: Read | None = None,
) -> Tensor:
    """Attend with `n` new tokens over a cache whose last `n` entries are their own.

    Args:
        queries: `(rows, heads, n, head_dim)`.
        keys: `(rows, kv_heads, length, head_dim)`, a view into a larger buffer is fine.
        values: `(rows, kv_heads, length, head_dim)`.
        softmax: the layer's.
        bias: `(rows, kv_heads, length)` added to the logits, or None.
        window: the last entries that a token sees, its own among them; None: all.
        read: told what is read.

    Returns:
        `(rows, heads, n, head_dim)`.
    """
    rows, heads, n_new, head_dim = queries.shape
    if window is not None:  # nothing before the first token's window is seen
        seen = slice(max(0, keys.shape[2] - window - n_new + 1), None)
        keys, values = keys[:, :, seen], values[:, :, seen]
        bias = None if bias is None else bias[:, :, seen]
    if read is not None:
        read(n_new, keys, values, bias)
    kv_heads, length = keys.shape[1], keys.shape[2]
    group = heads // kv_heads
    # The query heads of a group become rows of one attention over their KV head: no repeated keys.
    packed = queries.reshape(rows, kv_heads, group * n_new, head_dim)
    mask = None
    if n_new > 1:
        hidden = torch.ones(n_new, length, dtype=torch.bool, device=queries.device)
        hidden = hidden.triu(length - n_new + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril_(length - n_new - window)
        mask = torch.zeros(n_new, length, dtype=queries.dtype, device=queries.device)
        mask = mask.masked_fill_(hidden, float("-inf")).repeat(group, 1)
    if bias is not None:
        wide = bias.to(queries.dtype).unsqueeze(2)
        mask = wide.expand(-1, -1, packed.shape[2], -1) if mask is None else mask + wide
    if softmax.is_plain:
        out = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=softmax.scale)
    else:
        out = _whole_map(packed, keys, values, softmax, mask, n_new)
    return out.reshape(rows, heads, n_new, head_dim)


def _whole_map(
    packed: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, mask: Tensor | None, n_new: int
) -> Tensor:
    """Attend as `cached_attention` does, by logits in float32 that a softmax of any kind is made of."""
    logits = softmax.logits(torch.matmul(packed, keys.transpose(2, 3)).float())
    if mask is not None:
        logits = logits + mask
    weights = softmax.weights(logits.unflatten(2, (-1, n_new))).flatten(2, 3)
    return torch.matmul(weights.to(values.dtype), values)


def weighted_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    softmax: Softmax,
    bias: Tensor | None = None,
    read: Read | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with one new token and return the weights too, for methods that look at them.

    Args:
        queries: `(rows, heads, 1, head_dim)`.
        keys: `(rows, kv_heads, length, head_dim)`.
        values: `(rows, kv_heads, length, head_dim)`.
        softmax: the layer's.
        bias: `(rows, kv_heads, length)` added to the logits, or None.
        read: told what is read.

    Returns:
        output `(rows, heads, 1, head_dim)`; weights `(rows, heads, length)` float32.
    """
    if read is not None:
        read(1, keys, values, bias)
    kv_heads = keys.shape[1]
    grouped = queries.squeeze(2).unflatten(1, (kv_heads, -1))  # (rows, kv_heads, group, head_dim)
    logits = softmax.logits(torch.matmul(grouped, keys.transpose(2, 3)).float())
    if bias is not None:
        logits = logits + bias.unsqueeze(2)
    weights = softmax.weights(logits.unsqueeze(3)).squeeze(3)
    out = torch.matmul(weights.to(values.dtype), values)
    return out.flatten(1, 2).unsqueeze(2), weights.flatten(1, 2)


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax, visible: Tensor
) -> Tensor:
    """Attend over a whole prompt through an explicit mask, for methods that alter the prefill.

    Args:
        queries: `(1, heads, T, head_dim)`.
        keys: `(1, kv_heads, T, head_dim)`.
        values: `(1, kv_heads, T, head_dim)`.
        softmax: the layer's.
        visible: `(1, kv_heads, T, T)` bool, row by column.

    Returns:
        `(1, heads, T, head_dim)`.
    """
    group = queries.shape[1] // keys.shape[1]
    keys, values, visible = (t.repeat_interleave(group, dim=1) for t in (keys, values, visible))
    if softmax.is_plain:
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, scale=softmax.scale
        )
    logits = softmax.logits(torch.matmul(queries, keys.transpose(2, 3)).float())
    weights = softmax.weights(logits.masked_fill_(~visible, float("-inf")))
    return torch.matmul(weights.to(values.dtype), values)
