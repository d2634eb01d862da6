"""The arithmetic of KVMerger (arXiv 2407.08454): merging sets, Gaussian weights, merged states.

Pure tensor functions, free of loops over tokens and heads. A
*merging set* is a run of neighbouring tokens that becomes one cache entry; its *pivot* is the member
the others are weighted by. What the paper leaves open is settled in docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvmerge import linkage as linkage_scan
from kvmerge import rows
from kvmerge.errors import unknown

LINKAGES = ("adjacent", *linkage_scan.SCANS)
PIVOTS = ("score", "first", "last")
SIGMA_RULES = ("mean_distance", "mean_distance_n", "fixed_point", "inf")
VALUE_SCALES = ("none", "size")
UNDERFILLS = ("split", "keep")


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine along the last axis; a zero vector has cosine 0 with all (docs/methods.md)."""
    norms = left.norm(dim=-1).clamp_min(1e-8) * right.norm(dim=-1).clamp_min(1e-8)
    return (left * right).sum(dim=-1) / norms


def merging_sets(
    keys: Tensor,
    protected: Tensor,
    *,
    budget: int | None = None,
    threshold: float | None = None,
    scores: Tensor | None = None,
    linkage: str = "adjacent",
    underfill: str = "split",
) -> Tensor:
    """Group neighbouring tokens with similar keys into merging sets (docs/methods.md).

    `budget` alone links the most similar neighbours until exactly `budget` entries remain
    (`exact_links`); `threshold` alone links every pair above it (`eps_free`, the paper's Algorithm 1);
    both link above the threshold and then evict the sets with the least score, or split at the
    weakest links, until `budget` entries remain (`eps_evict`).

    Args:
        keys: `(batch, kv_heads, T, head_dim)`.
        protected: `(batch, kv_heads, T)` bool; such a token stays alone and breaks the chain.
        budget: entries kept per KV head, protected ones included.
        threshold: neighbours are linked where their similarity is strictly above it; under the
            scanning linkages a token joins at it, too.
        scores: `(batch, kv_heads, T)`; a set's score is the sum of its members'. Needed only where
            sets must be evicted.
        linkage: what a token is compared with: `adjacent` its neighbour; `anchor` (the default of
            KVMerger) the token that the backward scan opened the set with; `complete` every member.
        underfill: where a threshold leaves fewer sets than the budget: `split` at the weakest links
            until it is met, or `keep` the shorter cache.

    Returns:
        `(batch, kv_heads, T)` int64 set ids. They count up from 0 along the text, protected tokens
        and singletons included; -1 marks the members of evicted sets.

    Raises:
        ValueError: if neither budget nor threshold is given, the budget does not hold the protected
            tokens, or sets must be evicted and there are no scores.
    """
    if linkage not in LINKAGES:
        raise unknown("linkage", linkage, LINKAGES)
    if underfill not in UNDERFILLS:
        raise unknown("underfill", underfill, UNDERFILLS)
    if budget is None and threshold is None:
        raise ValueError("merging_sets needs a budget, a threshold, or both.")
    length = keys.shape[2]
    protected = protected.expand(keys.shape[:3])
    if budget is not None and int(protected.sum(-1).max()) > budget:
        raise ValueError(
            f"{int(protected.sum(-1).max())} protected tokens do not fit a budget of {budget}."
        )
    exact = keys.to(_exact_dtype(keys))
    n_links = None  # how many links must be left, where their number is set
    if budget is not None and (threshold is None or underfill == "split"):
        n_links = max(0, length - budget)
    if linkage == "adjacent":
        strength = _neighbours(exact, protected)
        linked = strength > (-math.inf if threshold is None else threshold)
    else:
        linked, strength = linkage_scan.scan(
            exact, protected, linkage, n_links=n_links, threshold=threshold
        )
    if n_links is not None:
        linked = _strongest(strength, linked, n_links)
    first = torch.ones_like(protected[..., :1])
    set_ids = torch.cat([first, ~linked], dim=-1).cumsum(dim=-1) - 1
    if budget is None or int(set_ids[..., -1].max()) < budget:
        return set_ids
    return _evict_sets(set_ids, protected, scores, budget)


def set_counts(
    keys: Tensor, protected: Tensor, thresholds: Sequence[float], *, linkage: str = "adjacent"
) -> Tensor:
    """Return how many sets `merging_sets` finds at each threshold: `(batch, kv_heads, thresholds)`.

    Arguments as there; the similarities are computed once. The scanning linkages end sets after 128
    tokens here.
    """
    if linkage not in LINKAGES:
        raise unknown("linkage", linkage, LINKAGES)
    exact, protected = keys.to(_exact_dtype(keys)), protected.expand(keys.shape[:3])
    if linkage != "adjacent":
        return linkage_scan.counts(exact, protected, linkage, thresholds)
    strength = _neighbours(exact, protected)
    return torch.stack(
        [keys.shape[2] - (strength > threshold).sum(dim=-1) for threshold in thresholds], dim=-1
    )


def _neighbours(keys: Tensor, protected: Tensor) -> Tensor:
    """Return the similarity of each token and the next, -inf where they may not be linked."""
    closed = protected[..., :-1] | protected[..., 1:]
    return cosine(keys[..., :-1, :], keys[..., 1:, :]).masked_fill(closed, -math.inf)


def _strongest(strength: Tensor, linked: Tensor, n_links: int) -> Tensor:
    """Keep at most `n_links` of the links a head: the strongest, ties to the larger index."""
    if not 0 < n_links < strength.shape[-1]:
        return linked if n_links else torch.zeros_like(linked)
    ranked = strength.masked_fill(~linked, -math.inf)
    least = ranked.kthvalue(ranked.shape[-1] - n_links + 1, dim=-1, keepdim=True).values
    above, tied = ranked > least, ranked == least
    room = n_links - above.sum(dim=-1, keepdim=True)
    return linked & (above | (tied & (tied.flip(-1).cumsum(dim=-1).flip(-1) <= room)))


def _evict_sets(set_ids: Tensor, protected: Tensor, scores: Tensor | None, budget: int) -> Tensor:
    """Evict unprotected sets with the least score until `budget` remain; number the rest anew."""
    if scores is None:
        raise ValueError(
            f"{int(set_ids[..., -1].max()) + 1} sets exceed the budget of {budget}: scores are needed "
            "to choose the sets to evict."
        )
    set_scores = _segment(set_ids, scores.to(torch.float64), "sum", int(set_ids.max()) + 1)
    safe = _segment(set_ids, protected.to(torch.float64), "sum", set_scores.shape[-1]) > 0
    n_sets = set_ids[..., -1:] + 1
    exists = torch.arange(set_scores.shape[-1], device=set_ids.device) < n_sets
    rank_by = set_scores.masked_fill(safe, math.inf).masked_fill(~exists, -math.inf)
    order = torch.sort(rank_by, dim=-1, descending=True, stable=True).indices[..., :budget]
    kept = torch.zeros_like(exists).scatter_(-1, order, True) & exists
    renumbered = torch.where(kept, kept.cumsum(dim=-1) - 1, -1)
    return renumbered.gather(-1, set_ids)


def _segment(set_ids: Tensor, source: Tensor, reduce: str, n_sets: int) -> Tensor:
    """Reduce `source` `(batch, kv_heads, T)` over each set; evicted tokens (-1) are left out."""
    start = {"sum": 0, "amax": -math.inf, "amin": math.inf}[reduce]
    if not source.is_floating_point() and reduce != "sum":
        start = torch.iinfo(source.dtype).min if reduce == "amax" else torch.iinfo(source.dtype).max
    out = torch.full((*set_ids.shape[:2], n_sets + 1), start, dtype=source.dtype, device=source.device)
    index = torch.where(set_ids < 0, n_sets, set_ids)
    return out.scatter_reduce_(-1, index, source, reduce)[..., :n_sets]


def set_summary(set_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return size, pivot and score of each set.

    Args:
        set_ids: `(batch, kv_heads, T)` as `merging_sets` returns them.
        scores: `(batch, kv_heads, T)`.

    Returns:
        sizes (int64), pivots (int64 token index, the member with the largest score, ties to the
        lower index), scores (sum over members); `(batch, kv_heads, sets)` each. Where heads have
        fewer sets than the longest, the rest has size 0, pivot -1 and score 0.
    """
    sizes = sum_over_sets(set_ids, torch.ones_like(set_ids))
    return sizes, pivot_tokens(set_ids, scores), sum_over_sets(set_ids, scores)


def sum_over_sets(set_ids: Tensor, amounts: Tensor) -> Tensor:
    """Sum `amounts` `(batch, kv_heads, T)` over each set: `(batch, kv_heads, sets)`."""
    return _segment(set_ids, amounts, "sum", int(set_ids.max()) + 1)


def pivot_tokens(set_ids: Tensor, scores: Tensor, pivot: str | Tensor = "score") -> Tensor:
    """Return the token index of each set's pivot `(batch, kv_heads, sets)`, -1 for padding.

    Args:
        set_ids: `(batch, kv_heads, T)`.
        scores: `(batch, kv_heads, T)`.
        pivot: `score` (largest score, ties to the lower index), `first`, `last`, or a tensor like
            `scores` whose largest member decides instead (random pivots).
    """
    if isinstance(pivot, str) and pivot not in PIVOTS:
        raise unknown("pivot", pivot, PIVOTS)
    n_sets = int(set_ids.max()) + 1
    tokens = torch.arange(set_ids.shape[-1], device=set_ids.device).expand_as(set_ids)
    if isinstance(pivot, str) and pivot == "last":
        return _segment(set_ids, tokens, "amax", n_sets).clamp_min(-1)
    if isinstance(pivot, str) and pivot == "first":
        best = torch.ones_like(set_ids, dtype=torch.bool)
    else:
        rank_by = scores if isinstance(pivot, str) else pivot
        top = _segment(set_ids, rank_by, "amax", n_sets)
        best = rank_by == top.gather(-1, set_ids.clamp_min(0))
    candidates = torch.where(best & (set_ids >= 0), tokens, set_ids.shape[-1])
    pivots = _segment(set_ids, candidates, "amin", n_sets)
    return torch.where(pivots < set_ids.shape[-1], pivots, -1)


def gaussian_merge(
    keys: Tensor,
    values: Tensor,
    set_ids: Tensor,
    scores: Tensor,
    *,
    sigma: float | str = 5.0,
    value_scale: str = "none",
    pivot: str | Tensor = "score",
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge each set into one key and one value with Gaussian weights around its pivot.

    `g_i = exp(-|k_p - k_i|^2 / (2 sigma^2))`, `w_i = g_i / sum g`, `k* = sum w_i k_i` and
    `v* = sum w_i v_i` (docs/methods.md). A singleton comes back bit for bit.

    Args:
        keys: `(batch, kv_heads, T, head_dim)`.
        values: `(batch, kv_heads, T, head_dim)`.
        set_ids: `(batch, kv_heads, T)` as `merging_sets` returns them; -1 is left out.
        scores: `(batch, kv_heads, T)`, which choose the pivot.
        sigma: width of the Gaussian in key distance, or a rule's name (docs/methods.md).
        value_scale: `none` stores the mean value; `size` multiplies it by the set's size, as the
            paper prints it.
        pivot: see `pivot_tokens`.
        sizes: `(batch, kv_heads, T)` tokens that each input already stands for; None means 1 each.

    Returns:
        keys and values, `(batch, kv_heads, sets, head_dim)` in their input dtype; zeros pad heads with
        fewer sets than the longest.
    """
    weights = gaussian_weights(keys, set_ids, scores, sigma=sigma, pivot=pivot, sizes=sizes)
    merged = merge_values(values, set_ids, weights, value_scale=value_scale, sizes=sizes)
    return weighted_sum(keys, set_ids, weights), merged


def gaussian_weights(
    keys: Tensor,
    set_ids: Tensor,
    scores: Tensor,
    *,
    sigma: float | str = 5.0,
    pivot: str | Tensor = "score",
    sizes: Tensor | None = None,
) -> Tensor:
    """Return the weight of each token in its set, `(batch, kv_heads, T)` float32 or better; sum 1.

    An input that already stands for several tokens counts as often (`sizes`). Arguments as in
    `gaussian_merge`.
    """
    inside = set_ids >= 0
    distance = pivot_distances(keys, set_ids, pivot_tokens(set_ids, scores, pivot))
    spread = _over_set(set_ids, distance) > 0
    # All members on the pivot: the weights are equal whatever the width.
    weight = _bell(distance, torch.where(spread, set_widths(distance, set_ids, sigma), 1.0))
    if sizes is not None:
        weight = weight * sizes
    return torch.where(inside, weight / _over_set(set_ids, weight), 0.0)


def pivot_distances(keys: Tensor, set_ids: Tensor, pivots: Tensor) -> Tensor:
    """Return how far each key is from its set's pivot (L2), 0 where it is evicted.

    Args:
        keys: `(batch, kv_heads, T, head_dim)`.
        set_ids: `(batch, kv_heads, T)`.
        pivots: `(batch, kv_heads, sets)`, as `pivot_tokens` returns them.

    Returns:
        `(batch, kv_heads, T)` float32 or better.
    """
    key = keys.to(_exact_dtype(keys))
    of_token = pivots.clamp_min(0).gather(-1, set_ids.clamp_min(0))
    return (rows.take(key, of_token) - key).norm(dim=-1).masked_fill(set_ids < 0, 0.0)


def set_widths(distance: Tensor, set_ids: Tensor, sigma: float | str) -> Tensor:
    """Return the sigma of each token's set, by a number or a rule (docs/methods.md).

    Args:
        distance: `(batch, kv_heads, T)`, as `pivot_distances` returns them.
        set_ids: `(batch, kv_heads, T)`.
        sigma: see `gaussian_merge`.

    Returns:
        like `distance`; 0 by the rules of mean distances where all members are on the pivot.
    """
    if not isinstance(sigma, str) or sigma == "inf":
        return torch.full_like(distance, float(sigma))
    size = _over_set(set_ids, torch.ones_like(distance))
    if sigma == "mean_distance":
        return _over_set(set_ids, distance) / (math.sqrt(2) * (size - 1).clamp_min(1))
    if sigma == "mean_distance_n":
        return _over_set(set_ids, distance) / (math.sqrt(2) * size)
    if sigma != "fixed_point":
        raise unknown("sigma rule", sigma, SIGMA_RULES)
    width = torch.full_like(distance, 5.0)
    for _ in range(100):
        previous = width
        width = _over_set(set_ids, _bell(distance, width)) / (math.sqrt(2) * size)
        if float((width - previous).abs().max()) < 1e-6:
            break
    return width


def _over_set(set_ids: Tensor, amounts: Tensor) -> Tensor:
    """Sum over each token's set, given back to the token."""
    return sum_over_sets(set_ids, amounts).gather(-1, set_ids.clamp_min(0))


def _bell(distance: Tensor, width: Tensor) -> Tensor:
    """Return the unnormalised weight: 1 at the pivot, less with the distance from it."""
    return torch.exp(-(distance**2) / (2 * width.clamp_min(1e-6) ** 2))


def merge_values(
    values: Tensor,
    set_ids: Tensor,
    weights: Tensor,
    *,
    value_scale: str = "none",
    sizes: Tensor | None = None,
) -> Tensor:
    """Return the weighted mean of each set's values, times its size under `value_scale=size`.

    A value that was stored as size times mean is averaged as the mean. Arguments as in
    `gaussian_merge`; weights `(batch, kv_heads, T)` as `gaussian_weights` returns them.
    """
    if value_scale not in VALUE_SCALES:
        raise unknown("value_scale", value_scale, VALUE_SCALES)
    if value_scale == "none":
        return weighted_sum(values, set_ids, weights)
    counts = torch.ones_like(weights) if sizes is None else sizes.to(weights.dtype)
    total = _over_set(set_ids, counts)
    return weighted_sum(values, set_ids, weights * total / counts)


def weighted_sum(states: Tensor, set_ids: Tensor, weights: Tensor) -> Tensor:
    """Sum each set's states by weight: `(batch, kv_heads, sets, head_dim)`, dtype of `states`."""
    n_sets = int(set_ids.max()) + 1
    terms = weights.unsqueeze(-1) * states.to(_exact_dtype(states))
    nothing = terms.new_zeros(*set_ids.shape[:2], n_sets + 1, states.shape[3])
    out = rows.add(nothing, torch.where(set_ids < 0, n_sets, set_ids), terms)
    return out[:, :, :n_sets].to(states.dtype)


def _exact_dtype(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
