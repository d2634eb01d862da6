"""D2O: H2O that merges an evicted token into its nearest kept key, if near enough (arXiv 2406.13035).

Follows `modeling_llama3_7b_13b_d2o` of the authors' repository (AIoT-MLSys-Lab/D2O at 12c99d8). Their
code compresses at the first decode step rather than after the prompt, spares three layers, and decides
about the n-th evicted token of all heads at once although the heads evict different tokens;
`bug_compat` does all that, and docs/methods.md lists the differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from baselines.heavy_hitters import even_counts, keep
from baselines.nearest import nearest, others
from kvmerge import rows
from kvmerge.budget import at_least_one, half
from kvmerge.errors import unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all, pick
from kvmerge.scores import head_column_sums

ALLOCATIONS = ("uniform", "variance")
SINKS = 4
"""First entries that always rank among the heavy hitters."""


@dataclass(frozen=True)
class D2O(Method):
    """Settings of D2O."""

    alloc: str = "uniform"
    """`uniform` gives each layer the budget; `variance` (the authors) gives a layer less, the nearer
    most of its heads are to the one whose column sums vary most."""
    bug_compat: bool = False
    """Follow the authors' code to the letter: compress from the first decode step on, spare the first
    two layers and the last, and merge the n-th evicted token of all heads or of none."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.alloc not in ALLOCATIONS:
            raise unknown("alloc", self.alloc, ALLOCATIONS)

    @property
    def allocates(self) -> bool:  # type: ignore[override]
        """Whether layers keep different numbers of entries."""
        return self.alloc == "variance" or self.bug_compat

    @property
    def meets_budget(self) -> bool:  # type: ignore[override]
        """Limits and rounding of the authors' shares leave the mean only near the budget."""
        return not self.allocates

    @property
    def acts_on_decode(self) -> bool:  # type: ignore[override]
        """The authors' code does nothing before the first decode step."""
        return self.bug_compat

    def allocate(self, layers: Sequence[PrefillLayer], allowance: Allowance) -> list[int]:
        """Return the entries per KV head for each layer."""
        length = layers[0].length
        shares = [allowance.budget] * len(layers)
        if self.alloc == "variance":
            sums = [head_column_sums(each.queries, each.keys, softmax=each.softmax) for each in layers]
            levels = torch.cat([variance_level(of_layer).cpu() for of_layer in sums])
            shares = layer_shares(levels, allowance.budget).tolist()
        if not self.bug_compat:
            return [at_least_one(share, length) for share in shares]
        # two equal halves, as shares of the prompt and the first answer token
        counts = [2 * at_least_one(share / 2, length + 1) for share in shares]
        spared = (0, 1, len(layers) - 1)
        return [length if layer in spared else n for layer, n in enumerate(counts)]

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Evict and merge, or leave it to the first decode step."""
        entries = replace(keep_all(layer), scores=layer.column_scores())
        if self.bug_compat or allowance.n_keep >= layer.length:
            return entries
        return self._evict(entries, *even_counts(allowance, layer.length))

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Add the step's attention to the scores, then evict and merge again."""
        assert entries.scores is not None
        scores = entries.scores + step.mass(entries.scores.shape[1])
        entries = replace(entries, scores=scores)
        if not self.bug_compat:
            return self._evict(entries, *even_counts(step.allowance, step.prompt_length))
        if step.allowance.n_keep >= step.prompt_length:  # a spared layer, or no budget to meet
            return entries
        each = half(step.allowance.n_keep)
        return self._evict(entries, each, each)

    def _evict(self, entries: Entries, heavy: int, recent: int) -> Entries:
        assert entries.scores is not None
        if entries.scores.shape[-1] <= heavy + recent:
            return entries
        forced = entries.scores.clone()
        forced[..., :SINKS] = torch.inf
        slots = keep(forced, heavy=heavy, recent=recent)
        keys, values, threshold = merge_evicted(
            entries.keys,
            entries.values,
            slots,
            entries.state,
            by_position=self.bug_compat,
        )
        return replace(pick(entries, slots), keys=keys, values=values, state=threshold)


def merge_evicted(
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    threshold: Tensor | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    by_position: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the evicted entries into the kept ones whose keys are nearest.

    An evicted entry with cosine `u` to its nearest kept key is merged where `u` reaches the threshold
    `alpha * threshold + beta * mean(u)`, or `mean(u)` at the first call. A kept entry becomes the plain
    mean of itself and of `u_i k_i` (and `u_i v_i`) over what is merged into it; the authors do not
    normalise by the weights.

    Args:
        keys: `(batch, kv_heads, n, head_dim)`.
        values: `(batch, kv_heads, n, head_dim)`.
        kept: `(batch, kv_heads, k)` int64 slots, ascending.
        threshold: `(batch,)` of the step before; None at the first.
        alpha: weight of that threshold (the authors' value).
        beta: weight of the new mean (the authors' value).
        by_position: compare the mean over heads of each place in the list of evicted entries, so that
            a place is merged in all heads or in none (the authors); else each head's own entry.

    Returns:
        keys, values `(batch, kv_heads, k, head_dim)` in their input dtype; threshold `(batch,)`.
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    evicted = others(kept, keys.shape[2])
    (kept_keys, evicted_keys), (kept_values, evicted_values) = (
        [rows.take(states.to(exact), slots) for slots in (kept, evicted)] for states in (keys, values)
    )
    similarity, closest = nearest(evicted_keys, kept_keys)
    typical = similarity.mean(dim=(1, 2))
    threshold = typical if threshold is None else alpha * threshold + beta * typical
    measure = similarity.mean(dim=1, keepdim=True) if by_position else similarity
    merges = (measure >= threshold[:, None, None]).expand_as(similarity).to(exact)
    members = torch.ones_like(kept, dtype=exact).scatter_add_(-1, closest, merges)
    weights = (merges * similarity).unsqueeze(-1)

    def mean(own: Tensor, given: Tensor) -> Tensor:
        return rows.add(own, closest, weights * given) / members.unsqueeze(-1)

    merged_keys, merged_values = mean(kept_keys, evicted_keys), mean(kept_values, evicted_values)
    return merged_keys.to(keys.dtype), merged_values.to(values.dtype), threshold


def variance_level(sums: Tensor) -> Tensor:
    """Return where the heads lie, on average, between the most even one and the least even one.

    Args:
        sums: `(batch, heads, T)` attention column sums of each query head.

    Returns:
        `(batch,)` in [0, 1], their variances over tokens, scaled by the lowest and the highest.
    """
    variance = sums.var(dim=-1)
    low, high = variance.amin(-1, keepdim=True), variance.amax(-1, keepdim=True)
    return ((variance - low) / (high - low + 1e-6)).mean(dim=-1)


def layer_shares(levels: Tensor, budget: float) -> Tensor:
    """Return the share that each layer keeps: `softmax(-level) * layers * budget` in [.01, 1].

    Args:
        levels: `(layers,)` as `variance_level` gives them.
        budget: mean fraction, before the limits are applied.

    Returns:
        `(layers,)` float64.
    """
    return ((-levels.double()).softmax(0) * len(levels) * budget).clamp(0.01, 1.0)
