"""CaM's merging: adding the values of evicted tokens to the values of tokens that follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.cam_probabilities import chance, merge_probabilities


def merge_values(
    values: Tensor,
    attention: Tensor,
    *,
    start: int,
    recent: int,
    merge_budget: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Fold the values of the evicted tokens into the `merge_budget` tokens after each.

    Token `i` in `[start, T - recent)` adds `x_i v_i / merge_budget` to tokens `i+1 … i+merge_budget`,
    in ascending order and in place: what a token receives, it passes on (docs/methods.md). Receivers
    past the end are cut while the divisor stays, as in the authors' code: that mass is lost.

    Args:
        values: `(batch, kv_heads, T, head_dim)`.
        attention: column sums or map, as `merge_probabilities` takes them.
        start: sink tokens kept at the beginning.
        recent: recent tokens kept at the end.
        merge_budget: receivers `m` of each token.
        generator: draws `torch.rand(batch, kv_heads, T)` and merges where the draw is below the
            probability; None merges the expected share `p_i v_i` instead.

    Returns:
        `(batch, kv_heads, T, head_dim)`, the values of all tokens, evicted ones included.
    """
    probabilities = merge_probabilities(attention, start=start, recent=recent)
    share = drawn(probabilities, generator) / merge_budget
    return cascade(values, share, start=start, reach=merge_budget)


def drawn(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return 1 where a uniform draw is below the probability, else 0; without a generator, no draw."""
    if generator is None:
        return probabilities
    draw = torch.rand(probabilities.shape, generator=generator, device=generator.device)
    return (draw.to(probabilities.device) < probabilities).to(probabilities.dtype)


def cascade(values: Tensor, share: Tensor, *, start: int, reach: int) -> Tensor:
    """Add `share_i v_i` to the `reach` tokens after each token `i`, one after the other in place.

    This is a linear recurrence. With `S_j` the mass sent by the tokens before `j`, and `c` the share,
    `S_{j+1} = (1 + c_j) S_j + c_j (v_j - S_{j-reach})`; inside a block of `reach` tokens the delayed
    term is known and cumulative products solve it at once.

    Args:
        values: `(batch, kv_heads, T, head_dim)`.
        share: `(batch, kv_heads, T)`, at most `1 / reach` each, 0 before `start`.
        start: first token that may give.
        reach: tokens after each that receive.

    Returns:
        `(batch, kv_heads, T, head_dim)`, computed in float32 or better.
    """
    batch, kv_heads, length, head_dim = values.shape
    exact = torch.promote_types(values.dtype, torch.float32)
    own, share = values.to(exact), share.to(exact)
    # sent[j]: everything sent by the tokens before j, whoever received it
    sent = torch.zeros(batch, kv_heads, length + 1, head_dim, dtype=exact, device=own.device)
    merged = own.clone()
    for begin in range(start, length, reach):
        end = min(begin + reach, length)
        expired = sent[:, :, max(0, begin - reach) : max(0, end - reach)]
        if expired.shape[2] < end - begin:  # the first window has nothing to expire
            expired = torch.nn.functional.pad(expired, (0, 0, end - begin - expired.shape[2], 0))
        base = own[:, :, begin:end] - expired
        gain = share[:, :, begin:end, None]
        growth = (1 + gain).cumprod(dim=2)  # between 1 and e: `reach` gains of at most 1/reach meet
        inflow = (gain * base / growth).cumsum(dim=2)
        after = growth * (sent[:, :, begin : begin + 1] + inflow)
        before = torch.cat([sent[:, :, begin : begin + 1], after[:, :, :-1]], dim=2)
        sent[:, :, begin + 1 : end + 1] = after
        merged[:, :, begin:end] = base + before
    return merged.to(values.dtype)


def fold_entry(
    values: Tensor,
    scores: Tensor,
    *,
    entry: int,
    merge_budget: int,
    generator: torch.Generator | None,
    window: int | None = None,
) -> Tensor:
    """Fold one entry's value into the entries after it, as CaM does while decoding.

    `p = clamp(s_e / mean(s[e+1 : e+1+window]), 0, 1)`, NaN counting as 0; if drawn, each of the next
    `merge_budget` entries receives `v_e / merge_budget`. Receivers that do not exist are cut while the
    divisor stays.

    Args:
        values: `(batch, kv_heads, n, head_dim)`.
        scores: `(batch, kv_heads, n)` attention of one step or accumulated.
        entry: slot of the entry that leaves.
        merge_budget: receivers `m`.
        generator: draws `torch.rand(batch, kv_heads)`; None merges the expected share.
        window: entries that the probability compares with; None means `merge_budget`.

    Returns:
        `(batch, kv_heads, n, head_dim)`, the folded entry still in its slot.
    """
    window = merge_budget if window is None else window
    rivals = scores[..., entry + 1 : entry + 1 + window].mean(dim=-1)
    merged = drawn(chance(scores[..., entry], rivals), generator)
    exact = torch.promote_types(values.dtype, torch.float32)
    folded = values.to(exact, copy=True)
    share = (merged / merge_budget)[..., None, None].to(exact)
    folded[:, :, entry + 1 : entry + 1 + merge_budget] += share * folded[:, :, entry : entry + 1]
    return folded.to(values.dtype)
