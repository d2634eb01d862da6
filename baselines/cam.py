"""CaM: fold the values of evicted tokens into the tokens that follow (Zhang et al., ICML 2024).

Follows `utils_lm_eval` of the authors' repository (zyxxmu/cam at fc80e64): the first and the last
tokens stay; each token between them adds its value, divided by the number of receivers, to the tokens
after it, with a probability given by its share of attention. Updates are sequential, so mass cascades
through tokens that are themselves evicted. Keys are never touched. The reading of the three official
variants is in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge.budget import count
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, pick, select

SAMPLES = ("bernoulli", "expected")
DECODE_RECEIVERS = 32
"""Most receivers of an entry that is folded while decoding (`utils_hh`)."""


@dataclass(frozen=True)
class CaM(Method):
    """Settings of CaM."""

    sample: str = "bernoulli"
    """`bernoulli` merges each token or not (the authors); `expected` merges its expected share."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sample not in SAMPLES:
            raise unknown("sample", self.sample, SAMPLES)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether merges are drawn."""
        return self.sample == "bernoulli"

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the sinks and the recent tokens, with the values between folded in."""
        length = layer.length
        start, recent = self.counts(allowance, length)
        values = merge_values(
            layer.values,
            layer.column_scores(),
            start=start,
            recent=recent,
            merge_budget=recent,
            generator=allowance.generator,
        )
        tokens = torch.arange(length, device=values.device)
        kept = torch.cat([tokens[:start], tokens[length - recent :]])
        entries = select(layer, kept.expand(*layer.keys.shape[:2], -1))
        return replace(entries, values=values[:, :, kept])

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Fold the oldest entry after the sinks into those that follow it, and drop it."""
        assert entries.scores is not None
        scores = entries.scores + step.mass(entries.scores.shape[1])
        entries = replace(entries, scores=scores)
        stored = scores.shape[-1]
        if stored <= step.allowance.n_keep:
            return entries
        start, recent = self.counts(step.allowance, step.prompt_length)
        values = fold_entry(
            entries.values,
            scores,
            entry=start,
            merge_budget=min(DECODE_RECEIVERS, recent),
            generator=step.allowance.generator,
        )
        slots = torch.arange(stored, device=scores.device)
        kept = torch.cat([slots[:start], slots[start + 1 :]])
        return pick(replace(entries, values=values), kept.expand(*scores.shape[:2], -1))

    def counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Sinks and recent tokens kept of a prompt of `length` tokens."""
        recent = count(allowance.budget / 2, length)
        if recent < 1:
            raise UserError(
                f"CaM needs at least 1 recent token to merge into; a budget of {allowance.n_keep} of "
                f"{length} prompt tokens leaves none."
            )
        return allowance.n_keep - recent, recent


def merge_probabilities(attention: Tensor, *, start: int, recent: int) -> Tensor:
    """Probability that each evicted token is merged: its score against the best it competes with.

    `p_i = clamp(s_i / max(s[0:start], s[i:i+recent]), 0, 1)` for `start <= i < T - recent`, NaN
    counting as 0 (methods.md 3.2).

    Args:
        attention: `(batch, kv_heads, T)` column sums, or the `(batch, kv_heads, T, T)` map of which
            each column is summed only over the rows before `i + recent` (the official banded form).
        start: sink tokens kept at the beginning.
        recent: recent tokens kept at the end, and the width of the window.

    Returns:
        `(batch, kv_heads, T)`, 0 outside the evicted range.
    """
    length = attention.shape[-1]
    shape = (*attention.shape[:2], length)
    probabilities = torch.zeros(shape, dtype=attention.dtype, device=attention.device)
    evicted = torch.arange(start, length - recent, device=attention.device)
    if evicted.numel() == 0:
        return probabilities
    if attention.dim() == 4:
        own, best = _banded_scores(attention, evicted, start, recent)
    else:
        own = attention[..., evicted]
        best = _window_max(attention, recent)[..., evicted]
        if start:
            best = torch.maximum(best, attention[..., :start].amax(dim=-1, keepdim=True))
    probabilities[..., evicted] = (own / best).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return probabilities


def _window_max(scores: Tensor, width: int) -> Tensor:
    """Maximum of `scores[i : i + width]` for each `i`, in time independent of the width.

    Running maxima forwards and backwards inside blocks of `width` meet in every window.
    """
    length = scores.shape[-1]
    padding = -length % width + width
    padded = torch.nn.functional.pad(scores, (0, padding), value=float("-inf"))
    blocks = padded.unflatten(-1, (-1, width))
    from_start = blocks.cummax(dim=-1).values.flatten(-2)
    to_end = blocks.flip(-1).cummax(dim=-1).values.flip(-1).flatten(-2)
    return torch.maximum(to_end[..., :length], from_start[..., width - 1 : width - 1 + length])


def _banded_scores(
    attention: Tensor, evicted: Tensor, start: int, recent: int
) -> tuple[Tensor, Tensor]:
    """Own score and best competing score of each evicted token, over the rows before `i + recent`.

    The official code averages over those rows; the count cancels in the ratio.
    """
    running = attention.cumsum(dim=-2)  # column sums over the rows up to each row
    last_row = evicted + recent - 1
    up_to = running[..., last_row, :]  # (batch, kv_heads, evicted, T)
    tokens = torch.arange(attention.shape[-1], device=attention.device)
    window = (tokens >= evicted[:, None]) & (tokens < evicted[:, None] + recent)
    competing = window | (tokens < start)
    own = up_to.gather(-1, evicted.view(1, 1, -1, 1).expand(*up_to.shape[:3], 1))[..., 0]
    return own, up_to.masked_fill(~competing, float("-inf")).amax(dim=-1)


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
    in ascending order and in place: what a token receives, it passes on (methods.md 3.2). Receivers
    past the end are cut while the divisor stays, as in the authors' code: that mass is lost.

    The cascade is a linear recurrence. With `c_i = x_i / m` and `S_j` the mass received by token `j`
    from all before it, less what left the window, `S_{j+1} = (1 + c_j) S_j + c_j (v_j - S_{j-m})`;
    inside a block of `m` tokens the delayed term is known and cumulative products solve it at once.

    Args:
        values: `(batch, kv_heads, T, head_dim)`.
        attention: column sums or map, as `merge_probabilities` takes them.
        start: sink tokens kept at the beginning.
        recent: recent tokens kept at the end.
        merge_budget: receivers `m` of each token.
        generator: draws `torch.rand(batch, kv_heads, T)` and merges where the draw is below the
            probability; None merges the expected share `p_i v_i` instead.

    Returns:
        `(batch, kv_heads, T, head_dim)`: the values of all tokens, evicted ones included.
    """
    batch, kv_heads, length, _ = values.shape
    probability = merge_probabilities(attention, start=start, recent=recent)
    if generator is not None:
        draw = torch.rand(batch, kv_heads, length, generator=generator, device=generator.device)
        probability = (draw.to(probability.device) < probability).to(probability.dtype)
    exact = torch.float64 if values.dtype == torch.float64 else torch.float32
    share = (probability / merge_budget).to(exact)
    own = values.to(exact)
    # sent[j]: everything sent by the tokens before j, whoever received it
    sent = torch.zeros(batch, kv_heads, length + 1, values.shape[-1], dtype=exact, device=own.device)
    merged = own.clone()
    for begin in range(start, length, merge_budget):
        end = min(begin + merge_budget, length)
        expired = sent[:, :, max(0, begin - merge_budget) : max(0, end - merge_budget)]
        if expired.shape[2] < end - begin:  # the first window has nothing to expire
            expired = torch.nn.functional.pad(expired, (0, 0, end - begin - expired.shape[2], 0))
        base = own[:, :, begin:end] - expired
        gain = share[:, :, begin:end, None]
        growth = (1 + gain).cumprod(dim=2)  # between 1 and e, since m gains of at most 1/m meet here
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
    others = scores[..., entry + 1 : entry + 1 + window]
    ratio = scores[..., entry] / others.mean(dim=-1)
    share = ratio.nan_to_num(nan=0.0).clamp(0.0, 1.0)
    if generator is not None:
        draw = torch.rand(share.shape, generator=generator, device=generator.device)
        share = (draw.to(share.device) < share).to(share.dtype)
    exact = torch.float64 if values.dtype == torch.float64 else torch.float32
    folded = values.to(exact, copy=True)
    gift = (share / merge_budget)[..., None, None].to(exact) * folded[:, :, entry : entry + 1]
    folded[:, :, entry + 1 : entry + 1 + merge_budget] += gift
    return folded.to(values.dtype)
