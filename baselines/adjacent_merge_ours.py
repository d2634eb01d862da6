"""Adjacent merging: the neighbours that attention cares least for become one, pass after pass (ours).

The merge of KVSlimmer (arXiv 2603.00907; lianjunl13-sudo/KVSlimmer at eca7a68), which needs no
gradient, on the cache of AsymKV (arXiv 2506.05410; the-scale-lab/Asymkv at 6e844dc). Theirs compresses
chunk by chunk while it reads the prompt; this does it once, after one prefill: hence the name.
Keys are averaged by how much attention depends on them, values are plain means, and how many tokens an
entry stands for multiplies its attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge import merging
from kvmerge.errors import UserError
from kvmerge.method import Allowance, Entries, Method, PrefillLayer
from kvmerge.scores import products

_BLOCK_ELEMENTS = 2**21
"""Logits alive at once."""
_SMALLEST = 1e-30
"""Least attention of a whole head, so that one that nobody attends to has shares, of 0."""


@dataclass(frozen=True)
class AdjacentMerge(Method):
    """Settings of adjacent merging."""

    sinks: int = 32
    """First tokens, which stay; at most half of what the window leaves of the budget."""
    window: int = 256
    """Last tokens, which observe the others and stay; at most half of the budget."""
    rows: int = 32
    """How many of them observe, evenly spaced, the last among them."""
    late: float = 49.35
    """What a pair at the start of the text costs beside an equal one at its end."""

    needs_rope: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.sinks) is not int or self.sinks < 0:
            raise UserError(f"sinks={self.sinks} must be a whole number of tokens, 0 or more.")
        if type(self.window) is not int or self.window < 1:
            raise UserError(f"window={self.window} must be a whole number of tokens, 1 or more.")
        if type(self.rows) is not int or self.rows < 1:
            raise UserError(f"rows={self.rows} must be a whole number of tokens, 1 or more.")
        if not 0 < self.late < math.inf:
            raise UserError(f"late={self.late} must be above 0; 1 treats all pairs alike.")

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Hold the sinks and the window, and merge neighbours between them."""
        n_sinks, n_window = self.held(allowance.n_keep)
        middle = slice(n_sinks, layer.length - n_window)
        mass = received(layer, self.observers(layer.length, n_window))[..., middle]
        importance = key_importance(mass, layer.values[:, :, middle])
        n_middle = allowance.n_keep - n_sinks - n_window
        entry, share = merge_neighbours(mass, importance, n_middle, late=self.late)
        set_ids = torch.arange(layer.length, device=mass.device).repeat(*mass.shape[:2], 1)
        set_ids[..., middle] = n_sinks + entry
        set_ids[..., layer.length - n_window :] -= layer.length - allowance.n_keep
        weights = torch.ones_like(set_ids, dtype=share.dtype)
        weights[..., middle] = share
        return merged(layer, set_ids, weights)

    def held(self, n_keep: int) -> tuple[int, int]:
        """Return how many sinks and how many last tokens stay; an entry is left for the others."""
        n_window = min(self.window, n_keep // 2)
        return min(self.sinks, (n_keep - n_window) // 2), n_window

    def observers(self, length: int, n_window: int) -> Tensor:
        """Return the tokens of the window that observe, the last first; without a window the last."""
        count = max(1, min(self.rows, n_window))
        return length - 1 - torch.arange(count) * n_window // count


def received(layer: PrefillLayer, rows: Tensor) -> Tensor:
    """Return the attention that each token receives from some rows, a mean over the group.

    Args:
        layer: a finished layer.
        rows: `(r,)` tokens whose queries ask.

    Returns:
        `(batch, kv_heads, T)` float32.
    """
    tokens = torch.arange(layer.length, device=layer.keys.device)
    sums = torch.zeros(layer.keys.shape[:3], device=layer.keys.device)
    at_once = max(16, _BLOCK_ELEMENTS // (layer.queries.shape[1] * layer.length))
    for block in rows.to(tokens.device).split(at_once):
        logits = products(layer.queries[:, :, block], layer.keys, layer.softmax)
        logits.masked_fill_(tokens > block.unsqueeze(-1), -torch.inf)
        sums += layer.softmax.weights(logits).sum(dim=3).mean(dim=2)
    return sums


def key_importance(mass: Tensor, values: Tensor) -> Tensor:
    """Return KVSlimmer's estimate of how much the output depends on each key.

    `a (1 - 2 a) |v - o|_1`, with `a` the share of the attention and `o = sum a v`.

    Args:
        mass: `(batch, kv_heads, n)` attention received.
        values: `(batch, kv_heads, n, head_dim)`.

    Returns:
        `(batch, kv_heads, n)` float32.
    """
    share, values = mass / mass.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST), values.float()
    output = share.unsqueeze(2) @ values
    return share * (1 - 2 * share) * (values - output).abs().sum(dim=-1)


def merge_neighbours(
    mass: Tensor, importance: Tensor, n_keep: int, *, late: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Merge adjacent entries, two by two, until `n_keep` are left; the same ones in all KV heads.

    Each pass takes as many of the cheapest pairs as there are entries too many. Of pairs that overlap,
    the first, the third and so on are merged, so that a pass does at least half of what is left to do.

    Args:
        mass: `(batch, kv_heads, n)` attention received.
        importance: `(batch, kv_heads, n)`, see `key_importance`.
        n_keep: entries to leave, 1 to n.
        late: see `pair_costs`.

    Returns:
        the entry that each token is in, `(batch, kv_heads, n)` int64, from 0 on along the text; and the
        token's share of the entry's key, alike, float32.
    """
    entry = torch.arange(mass.shape[-1], device=mass.device).expand_as(mass)
    total, share, sizes = mass.sum(dim=-1, keepdim=True), torch.ones_like(mass), torch.ones_like(mass)
    while bool(((excess := entry[:, :1, -1:] + 1 - n_keep) > 0).any()):
        pairs = every_other(cheapest(pair_costs(mass, sizes, late), excess)).expand_as(mass[..., 1:])
        part = key_parts(importance, mass / total.clamp_min(_SMALLEST), pairs)
        joined = torch.cat([torch.zeros_like(entry[..., :1]), (~pairs).cumsum(dim=-1)], dim=-1)
        joined = joined.masked_fill(sizes == 0, -1)  # samples with fewer entries than the longest
        share = share * part.gather(-1, entry)
        entry = joined.gather(-1, entry)
        importance = merging.sum_over_sets(joined, part**2 * importance)
        mass, sizes = (merging.sum_over_sets(joined, each) for each in (mass, sizes))
    return entry, share


def pair_costs(mass: Tensor, sizes: Tensor, late: float) -> Tensor:
    """Return what merging each entry with the next one costs, over all KV heads.

    The attention of both times the tokens of both; the last pair's is divided by `late`, the others' by
    less the earlier they are.

    Args:
        mass: `(batch, kv_heads, n)` attention received.
        sizes: `(batch, kv_heads, n)` tokens of each entry; 0 is padding.
        late: above 0.

    Returns:
        `(batch, 1, n - 1)`, infinite where there is no next entry.
    """
    of_both = (mass[..., :-1] + mass[..., 1:]) * (sizes[..., :-1] + sizes[..., 1:])
    real = sizes[:, :1] > 0
    n_pairs = (real.sum(dim=-1, keepdim=True) - 1).clamp_min(1)
    place = torch.arange(1, mass.shape[-1], device=mass.device) / n_pairs
    costs = of_both.sum(dim=1, keepdim=True) / late**place
    return costs.masked_fill(~real[..., 1:], torch.inf)


def cheapest(costs: Tensor, count: Tensor) -> Tensor:
    """Return which costs are among the least of their row; of equal ones the lower.

    Args:
        costs: `(…, n)`.
        count: `(…, 1)` how many of each row.
    """
    ranks = costs.sort(dim=-1, stable=True).indices.argsort(dim=-1)
    return ranks < count


def every_other(pairs: Tensor) -> Tensor:
    """Return the first, third, … of each run of chosen pairs, which do not overlap: `(…, n)` bool."""
    place = torch.arange(pairs.shape[-1], device=pairs.device)
    before = torch.where(pairs, -1, place).cummax(dim=-1).values
    return pairs & ((place - before) % 2 == 1)


def key_parts(importance: Tensor, attention: Tensor, pairs: Tensor) -> Tensor:
    """Return what part each entry has in the key of what it is merged to; 1 where it stays alone.

    KVSlimmer's closed form: the second-order error of the output is least where the first key counts
    `h1 - c` and the second `h2 - c`, with `c` their joint term, which follows from `h` and attention.

    Args:
        importance: `(batch, kv_heads, n)`, `h`.
        attention: `(batch, kv_heads, n)` shares of the whole.
        pairs: `(batch, kv_heads, n - 1)` bool, none that overlap.
    """
    spread = (importance / (attention * (1 - 2 * attention))).nan_to_num(0.0)
    joint = attention[..., :-1] * attention[..., 1:] * (spread[..., :-1] + spread[..., 1:])
    one, other = importance[..., :-1] - joint, importance[..., 1:] - joint
    # Where few tokens have most attention these may lie outside of 0 to 1; where none has any, 0 / 0.
    first = (one / (one + other)).nan_to_num(0.5).clamp(0, 1)
    alone = torch.ones_like(importance[..., :1])
    as_first = torch.cat([torch.where(pairs, first, 1.0), alone], dim=-1)
    as_second = torch.cat([alone, torch.where(pairs, 1 - first, 1.0)], dim=-1)
    return as_first * as_second


def merged(layer: PrefillLayer, set_ids: Tensor, weights: Tensor) -> Entries:
    """Turn sets of neighbours into entries, each at the position of its last token.

    Args:
        layer: a finished layer.
        set_ids: `(batch, kv_heads, T)`, the same in all KV heads.
        weights: `(batch, kv_heads, T)` each token's share of its entry's key.
    """
    assert layer.rope is not None, "the session gives it to methods that set needs_rope = True"
    positions = merging.pivot_tokens(set_ids, weights, "last")
    sizes = merging.sum_over_sets(set_ids, torch.ones_like(set_ids))
    # Theirs stores keys before RoPE, and turns them to where the last token of an entry stands.
    ahead = positions.gather(-1, set_ids) - torch.arange(layer.length, device=set_ids.device)
    return Entries(
        merging.weighted_sum(layer.rope.rotate(layer.keys, ahead[:, :1]), set_ids, weights),
        merging.weighted_sum(layer.values, set_ids, 1 / sizes.to(weights.dtype).gather(-1, set_ids)),
        positions,
        sizes,
        sizes.float().log(),
    )
