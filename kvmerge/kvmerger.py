"""KVMerger: merge neighbouring key/value states instead of evicting them (arXiv 2407.08454).

The recent tokens and the top tokens by attention mass stay as they are; the tokens between them are
grouped into merging sets of neighbours with similar keys, and each set becomes one entry by Gaussian
weights around its pivot. The authors published no code: what the paper leaves open, and how it is
read here, is in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge import merging
from kvmerge.budget import count
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, top_positions

BUDGET_MODES = ("exact_links", "eps_evict", "eps_free")
ATTN_BIASES = ("none", "log_size")


@dataclass(frozen=True)
class KVMerger(Method):
    """Settings of KVMerger; the defaults are the reading documented in docs/methods.md."""

    budget_mode: str = "exact_links"
    """`exact_links` meets the budget by linking the most similar neighbours; `eps_evict` links
    above `epsilon`, then evicts or splits; `eps_free` links above `epsilon` and takes what comes."""
    epsilon: float = 0.75
    """Cosine threshold of the `eps_*` modes (the paper's value)."""
    sigma: float | str = 5.0
    """Width of the Gaussian (the paper's best is 5), or a rule's name."""
    value_scale: str = "none"
    """`none` stores mean values, `size` multiplies them by the set's size (as printed)."""
    attn_bias: str = "none"
    """`log_size` adds log(size) to each entry's attention logit; not in the paper."""
    linkage: str = "adjacent"
    """What a token is compared with: `adjacent`, `anchor` or `complete`."""
    pivot: str = "score"
    """Which member is the pivot: `score` (the paper), `random`, `first` or `last`."""
    recent: float | None = None
    """Fraction of the prompt kept as recent tokens; None follows the paper's two budgets."""
    top: float | None = None
    """Fraction of the prompt kept as top tokens by score; None follows the paper's two budgets."""

    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget_mode not in BUDGET_MODES:
            raise unknown("budget_mode", self.budget_mode, BUDGET_MODES)
        if self.attn_bias not in ATTN_BIASES:
            raise unknown("attn_bias", self.attn_bias, ATTN_BIASES)
        if self.value_scale not in merging.VALUE_SCALES:
            raise unknown("value_scale", self.value_scale, merging.VALUE_SCALES)
        if self.linkage not in merging.LINKAGES:
            raise unknown("linkage", self.linkage, merging.LINKAGES)
        if self.pivot not in (*merging.PIVOTS, "random"):
            raise unknown("pivot", self.pivot, (*merging.PIVOTS, "random"))
        if isinstance(self.sigma, str) and self.sigma not in merging.SIGMA_RULES:
            raise unknown("sigma rule", self.sigma, merging.SIGMA_RULES)
        if not isinstance(self.sigma, str) and not self.sigma > 0:
            raise UserError(f"sigma={self.sigma} must be a positive key distance or a rule's name.")
        if self.attn_bias == "log_size" and self.value_scale == "size":
            raise UserError(
                "attn_bias=log_size with value_scale=size counts set sizes twice; "
                "use value_scale=none with it."
            )
        for name in ("recent", "top"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise UserError(f"{name}={share} must be a fraction of the prompt in [0, 1).")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Only random pivots draw."""
        return self.pivot == "random"

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Merge one layer down to the allowance (methods.md 4.3)."""
        scores = layer.column_scores()
        n_recent, n_top = self.protected_counts(allowance, layer.length)
        protected = torch.zeros_like(scores, dtype=torch.bool)
        protected[..., layer.length - n_recent :] = True
        candidates = scores[..., : layer.length - n_recent]
        protected.scatter_(-1, top_positions(candidates, n_top), True)

        set_ids = merging.merging_sets(
            layer.keys,
            protected,
            budget=None if self.budget_mode == "eps_free" else allowance.n_keep,
            threshold=None if self.budget_mode == "exact_links" else self.epsilon,
            scores=scores,
            linkage=self.linkage,
        )
        return self.merge(layer, set_ids, allowance.generator)

    def merge(self, layer: PrefillLayer, set_ids: Tensor, generator: torch.Generator | None) -> Entries:
        """Turn given merging sets into entries."""
        scores = layer.column_scores()
        pivot: str | Tensor = self.pivot
        ranking = scores
        if pivot == "random":
            pivot = ranking = torch.rand(scores.shape, generator=generator).to(scores.device)
        elif pivot in ("first", "last"):
            order = torch.arange(layer.length, device=scores.device).expand_as(scores)
            ranking = order.float() if pivot == "last" else -order.float()
        keys, values = merging.gaussian_merge(
            layer.keys,
            layer.values,
            set_ids,
            scores,
            sigma=self.sigma,
            value_scale=self.value_scale,
            pivot=pivot,
        )
        sizes, pivots, _ = merging.set_summary(set_ids, ranking)
        bias = None
        if self.attn_bias == "log_size":
            bias = sizes.float().log()
        elif bool((sizes == 0).any()):  # heads of unequal length: padding must get no attention
            bias = torch.where(sizes > 0, 0.0, -torch.inf)
        return Entries(keys, values, pivots, sizes, bias)

    def protected_counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Recent and top tokens kept as they are (methods.md 4.1), leaving room to merge into.

        Raises `UserError` where no merged entry would remain.
        """
        recent = recent_share(allowance.budget) if self.recent is None else self.recent
        top = top_share(allowance.budget) if self.top is None else self.top
        n_recent = max(1, count(recent, length))
        n_top = count(top, length)
        excess = n_recent + n_top + 1 - allowance.n_keep
        if excess > 0:
            shrink = min(excess, n_top)
            n_top -= shrink
            n_recent -= excess - shrink
        if n_recent < 1:
            raise UserError(
                f"KVMerger needs a budget of at least 2 entries (1 recent, 1 merged); "
                f"{allowance.n_keep} of {length} prompt tokens were allowed."
            )
        return n_recent, n_top


def recent_share(budget: float) -> float:
    """Recent tokens as a fraction of the prompt: .17 at 50%, .08 at 35% (the paper), interpolated."""
    return max(0.02, 0.08 + 0.09 * (budget - 0.35) / 0.15)


def top_share(budget: float) -> float:
    """Top tokens as a fraction of the prompt: .12 at 50%, .02 at 35% (the paper), interpolated."""
    return max(0.0, 0.02 + 0.10 * (budget - 0.35) / 0.15)
