"""CaM's merge probabilities: how likely an evicted token's value is folded into those that follow.

The authors' three variants compare a token's attention with the maximum of its rivals or with the mean
of its receivers, on column sums of all rows or only of those that a sink and recent window still sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kvmerge.method import PrefillLayer
from kvmerge.scores import attention_blocks


def merge_probabilities(attention: Tensor, *, start: int, recent: int) -> Tensor:
    """Return the probability that each evicted token is merged: its score against its best rival.

    `p_i = clamp(s_i / max(s[0:start], s[i:i+recent]), 0, 1)` for `start <= i < T - recent`, NaN
    counting as 0 (docs/methods.md).

    Args:
        attention: `(batch, kv_heads, T)` column sums, or the `(batch, kv_heads, T, T)` map of which
            each column is summed only over the rows before `i + recent` (the official banded form).
        start: sink tokens kept at the beginning.
        recent: recent tokens kept at the end, and the width of the window.

    Returns:
        `(batch, kv_heads, T)`, 0 outside the evicted range.
    """
    if attention.dim() == 4:
        return banded_probabilities([(0, attention)], start=start, recent=recent)
    best = window_max(attention, recent)
    if start:
        best = torch.maximum(best, attention[..., :start].amax(dim=-1, keepdim=True))
    return _between(chance(attention, best), start, recent)


def banded_probabilities(blocks: Iterable[tuple[int, Tensor]], *, start: int, recent: int) -> Tensor:
    """Return `merge_probabilities` of a map that comes in blocks of rows (`utils_lm_eval`).

    The official code averages each column over the rows before `i + recent`; the count cancels.

    Args:
        blocks: first row, and rows `(batch, kv_heads, n, columns)`, in order, ending with row `T - 1`.
    """
    found = []
    for rows, sums in running_sums(blocks):
        columns = torch.arange(sums.shape[-1], device=sums.device)
        token = rows - recent + 1  # the last row whose attention counts for this token
        rivals = (columns < start) | (columns >= token[:, None]) & (columns <= rows[:, None])
        best = sums.masked_fill(~rivals, float("-inf")).amax(dim=-1)
        found.append(chance(_own(sums, token), best))
    # row i + recent - 1 decides on token i
    shifted = torch.nn.functional.pad(torch.cat(found, dim=-1)[..., recent - 1 :], (0, recent - 1))
    return _between(shifted, start, recent)


def streamed_probabilities(
    blocks: Iterable[tuple[int, Tensor]], *, start: int, recent: int, receivers: int
) -> tuple[Tensor, Tensor]:
    """Return the probabilities of tokens that leave one by one as the prompt is read (`generate_task`).

    At row `t` token `i = t - recent` leaves: `p_i = s_i / mean(s[i+1 : i+1+receivers])` over what the
    rows up to `t` have given.

    Args:
        blocks: first row, and rows `(batch, kv_heads, n, columns)`, in order, ending with row `T - 1`.
        receivers: tokens compared with, those past row `t` left out.

    Returns:
        probabilities `(batch, kv_heads, T)`, 0 outside the evicted range; column sums of all rows
        `(batch, kv_heads, T)`.
    """
    found = []
    for rows, sums in running_sums(blocks):
        columns = torch.arange(sums.shape[-1], device=sums.device)
        token = rows - recent
        last = torch.minimum(rows, token + receivers)
        after = (columns > token[:, None]) & (columns <= last[:, None])
        found.append(chance(_own(sums, token), (sums * after).sum(dim=-1) / after.sum(dim=-1)))
        total = sums[..., -1, :]
    shifted = torch.nn.functional.pad(torch.cat(found, dim=-1)[..., recent:], (0, recent))
    return _between(shifted, start, recent), total


def banded_map(layer: PrefillLayer, start: int, recent: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the map of a layer whose rows see the sinks, themselves and `recent` tokens before.

    Yields:
        the first row of a block; `(batch, kv_heads, n, columns)` weights summed over each group.
    """

    def visible(rows: Tensor, columns: Tensor) -> Tensor:
        return (columns < start) | (rows - columns <= recent)

    blocks = attention_blocks(layer.queries, layer.keys, softmax=layer.softmax, visible=visible)
    for begin, weights in blocks:
        yield begin, weights.unflatten(1, (layer.keys.shape[1], -1)).sum(dim=2)


def running_sums(blocks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the column sums of a map up to each of its rows.

    Yields:
        the block's rows `(n,)`; sums `(batch, kv_heads, n, columns)` over all rows up to each.
    """
    total: Tensor | None = None
    for begin, weights in blocks:
        sums = weights.cumsum(dim=-2)
        if total is not None:
            sums[..., : total.shape[-1]] += total.unsqueeze(-2)
        total = sums[..., -1, :]
        yield torch.arange(begin, begin + sums.shape[-2], device=sums.device), sums


def window_max(scores: Tensor, width: int) -> Tensor:
    """Return the maximum of `scores[i : i + width]` for each `i`, in time independent of the width.

    Running maxima forwards and backwards inside blocks of `width` meet in every window.
    """
    length = scores.shape[-1]
    padding = -length % width + width
    padded = torch.nn.functional.pad(scores, (0, padding), value=float("-inf"))
    blocks = padded.unflatten(-1, (-1, width))
    from_start = blocks.cummax(dim=-1).values.flatten(-2)
    to_end = blocks.flip(-1).cummax(dim=-1).values.flip(-1).flatten(-2)
    return torch.maximum(to_end[..., :length], from_start[..., width - 1 : width - 1 + length])


def _own(sums: Tensor, token: Tensor) -> Tensor:
    """Return the sum of one token's column in each row; any value where `token` `(n,)` is negative."""
    index = token.clamp(min=0).view(1, 1, -1, 1).expand(*sums.shape[:3], 1)
    return sums.gather(-1, index)[..., 0]


def chance(own: Tensor, rival: Tensor) -> Tensor:
    """Return the ratio of two scores as a probability, NaN counting as 0 (the authors)."""
    return (own / rival).nan_to_num(nan=0.0).clamp(0.0, 1.0)


def _between(probabilities: Tensor, start: int, recent: int) -> Tensor:
    """Keep only those of the evicted tokens, 0 for the others."""
    tokens = torch.arange(probabilities.shape[-1], device=probabilities.device)
    evicted = (tokens >= start) & (tokens < len(tokens) - recent)
    return probabilities * evicted
