"""KVMerger: merge neighbouring key/value states instead of evicting them (arXiv 2407.08454).

The recent tokens and the top tokens by attention mass stay as they are; the tokens between them are
grouped into merging sets of neighbours with similar keys, and each set becomes one entry by Gaussian
weights around its pivot. The authors published no code: what the paper leaves open, and how it is
read here, is in docs/methods.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvmerge import merging
from kvmerge.budget import at_least_one, count, recent_share, top_share
from kvmerge.errors import UserError, unknown
from kvmerge.files import read_regular
from kvmerge.method import (
    Allowance,
    DecodeStep,
    Entries,
    Method,
    PrefillLayer,
    keep_all,
    top_positions,
)
from kvmerge.rope import Rope

THRESHOLDS = Path(__file__).with_name("thresholds")
"""Calibrated thresholds that are part of the package, a file a model and budget."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "budget_mode": ("exact_links", "eps_evict", "eps_free", "eps_layer"),
    "value_scale": merging.VALUE_SCALES,
    "attn_bias": ("none", "log_size"),
    "linkage": merging.LINKAGES,
    "underfill": merging.UNDERFILLS,
    "pivot": (*merging.PIVOTS, "random"),
    "rope": ("post", "pre"),
}


@dataclass(frozen=True)
class KVMerger(Method):
    """Settings of KVMerger; the defaults are the reading documented in docs/methods.md."""

    budget_mode: str = "exact_links"
    """`exact_links` meets the budget by the threshold that it needs; `eps_evict` links from
    `epsilon` on, then evicts or splits; `eps_free` links from `epsilon` on and takes what comes;
    `eps_layer` is `eps_evict` with a threshold for each layer, from `thresholds`."""
    epsilon: float = 0.75
    """Cosine threshold of `eps_evict` and `eps_free` (the paper's value)."""
    thresholds: str | None = None
    """Of `eps_layer`: a JSON file with a threshold for each layer, as `scripts.calibrate` writes it, or
    the name of one in `kvmerge/thresholds`, e.g. `smollm2-135m@0.35`."""
    underfill: str = "split"
    """Where a threshold merges more than the budget asks: `split` sets again, or `keep` fewer."""
    sigma: float | str = 5.0
    """Width of the Gaussian (the paper's best is 5), or a rule's name."""
    value_scale: str = "none"
    """`none` stores mean values, `size` multiplies them by the set's size (as printed)."""
    attn_bias: str = "none"
    """`log_size` adds log(size) to each entry's attention logit; not in the paper."""
    linkage: str = "anchor"
    """What a token is compared with: the token that opened the set (`anchor`, the paper's Figure 4),
    all members (`complete`), or its neighbour (`adjacent`)."""
    pivot: str = "score"
    """Which member is the pivot: `score` (the paper), `random`, `first` or `last`."""
    rope: str = "post"
    """Keys are averaged after RoPE (`post`, the paper), or turned to the pivot's position first
    (`pre`)."""
    recent: float | None = None
    """Fraction of the prompt kept as recent tokens; None follows the paper's two budgets."""
    top: float | None = None
    """Fraction of the prompt kept as top tokens by score; None follows the paper's two budgets."""
    merge_every: int = 64
    """Decode steps between two merges under `decode_policy=hold`."""

    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), allowed)
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
        if type(self.merge_every) is not int or self.merge_every < 1:
            raise UserError(f"merge_every={self.merge_every} must be a whole number of 1 or more.")
        if (self.budget_mode == "eps_layer") != (self.thresholds is not None):
            raise UserError(
                "budget_mode=eps_layer and thresholds=FILE need each other; "
                "`python -m scripts.calibrate` makes the file."
            )
        if self.thresholds is not None:
            self.layer_thresholds()

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Only random pivots draw."""
        return self.pivot == "random"

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        """Only `rope=pre` turns keys."""
        return self.rope == "pre"

    @property
    def holds(self) -> bool:  # type: ignore[override]
        """A cache without a budget cannot return to it."""
        return self.budget_mode != "eps_free" and self.underfill == "split"

    @property
    def meets_budget(self) -> bool:  # type: ignore[override]
        """A threshold alone says nothing of a budget, and may merge more than one asks for."""
        return self.holds

    @property
    def hold_every(self) -> int:  # type: ignore[override]
        """Entries are merged again only now and then."""
        return self.merge_every

    def check(self, layer_idx: int, length: int, allowance: Allowance) -> None:
        """Refuse a budget that leaves nothing to merge into, and a layer without a threshold."""
        self.protected_counts(allowance, length)
        self._threshold(layer_idx)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Merge one layer down to the allowance (docs/methods.md)."""
        entries = replace(keep_all(layer), scores=layer.column_scores())
        if allowance.n_keep >= layer.length:
            return entries
        return self._merge(entries, layer.length, layer.layer_idx, allowance, layer.rope)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Add the step's attention to the scores; every `merge_every` steps merge again."""
        assert entries.scores is not None
        scores = entries.scores + step.mass(entries.scores.shape[1])
        entries = replace(entries, scores=scores)
        due = (step.step + 1) % self.merge_every == 0
        if not due or scores.shape[-1] <= step.allowance.n_keep:
            return entries
        return self._merge(entries, step.prompt_length, step.layer_idx, step.allowance, step.rope)

    def _merge(
        self,
        entries: Entries,
        length: int,
        layer_idx: int,
        allowance: Allowance,
        rope: Rope | None,
    ) -> Entries:
        """Merge entries, some of which may be merged already, down to the allowance."""
        scores = entries.scores
        assert scores is not None
        set_ids = self.sets(entries, length, layer_idx, allowance)
        pivot: str | Tensor = self.pivot
        if pivot == "random":
            draw = torch.rand(scores.shape, generator=allowance.generator)
            pivot = draw.to(scores.device)
        return self.merged(entries, set_ids, pivot, rope)

    def sets(self, entries: Entries, length: int, layer_idx: int, allowance: Allowance) -> Tensor:
        """Return merging sets that leave the allowance: `(batch, kv_heads, n)` ids, -1 where evicted.

        Args:
            entries: with their scores.
            length: prompt tokens, to which the protected fractions refer.
            layer_idx: chooses the threshold under `budget_mode=eps_layer`.
            allowance: what may remain.
        """
        scores = entries.scores
        assert scores is not None
        return merging.merging_sets(
            entries.keys,
            self.protected(scores, length, allowance),
            budget=None if self.budget_mode == "eps_free" else allowance.n_keep,
            threshold=self._threshold(layer_idx),
            scores=scores,
            linkage=self.linkage,
            underfill=self.underfill,
        )

    def protected(self, scores: Tensor, length: int, allowance: Allowance) -> Tensor:
        """Return which entries stay as they are: the last ones, and the best before them by score.

        Args:
            scores: `(batch, kv_heads, n)` of the stored entries.
            length: prompt tokens, to which the protected fractions refer.
            allowance: must leave room for at least one merged entry.

        Returns:
            `(batch, kv_heads, n)` bool.
        """
        n_recent, n_top = self.protected_counts(allowance, length)
        candidates = scores[..., : scores.shape[-1] - n_recent]
        protected = torch.zeros_like(scores, dtype=torch.bool)
        protected[..., candidates.shape[-1] :] = True
        return protected.scatter_(-1, top_positions(candidates, n_top), True)

    def merged(
        self, entries: Entries, set_ids: Tensor, pivot: str | Tensor, rope: Rope | None = None
    ) -> Entries:
        """Turn merging sets into entries."""
        scores, sizes = entries.scores, entries.sizes
        assert scores is not None
        weights = merging.gaussian_weights(
            entries.keys, set_ids, scores, sigma=self.sigma, pivot=pivot, sizes=sizes
        )
        pivots = merging.pivot_tokens(set_ids, scores, pivot).clamp_min(0)
        positions = entries.positions.gather(-1, pivots)
        keys = entries.keys
        if rope is not None and self.rope == "pre":
            keys = rope.rotate(keys, positions.gather(-1, set_ids.clamp_min(0)) - entries.positions)
        ones = torch.ones_like(set_ids) if sizes is None else sizes
        new_sizes = merging.sum_over_sets(set_ids, ones)
        bias = None
        if self.attn_bias == "log_size":
            bias = new_sizes.float().log()
        elif bool((new_sizes == 0).any()):  # heads of unequal length: padding gets no attention
            bias = torch.where(new_sizes > 0, 0.0, -torch.inf)
        return Entries(
            merging.weighted_sum(keys, set_ids, weights),
            merging.merge_values(
                entries.values, set_ids, weights, value_scale=self.value_scale, sizes=sizes
            ),
            positions,
            new_sizes,
            bias,
            merging.sum_over_sets(set_ids, scores),
        )

    def protected_counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Return the recent and top tokens kept as they are, leaving room to merge into.

        Raises:
            UserError: where no merged entry would remain.
        """
        recent = recent_share(allowance.budget) if self.recent is None else self.recent
        top = top_share(allowance.budget) if self.top is None else self.top
        n_recent = at_least_one(recent, length)
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

    def files(self) -> tuple[Path, ...]:
        """Return the file of calibrated thresholds, where one is named."""
        if self.thresholds is None:
            return ()
        path = Path(self.thresholds).expanduser()
        shipped = THRESHOLDS / f"{self.thresholds}.json"
        return (shipped if not path.exists() and shipped.is_file() else path,)

    def layer_thresholds(self) -> list[float]:
        """Read the calibrated threshold of each layer.

        Raises:
            UserError: if there is no such file or name, it does not hold a number for each layer, or it
                was made for another linkage.
        """
        (path,) = self.files()
        try:
            content: Any = json.loads(read_regular(path).decode("utf-8"))
        except (OSError, ValueError) as error:
            names = ", ".join(sorted(file.stem for file in THRESHOLDS.glob("*.json")))
            raise UserError(
                f"thresholds={path} cannot be read: {error}. Give a file, or the name of what is here: "
                f"{names}."
            ) from error
        if isinstance(content, dict):
            made_for = content.get("linkage", "adjacent")  # files of earlier versions do not say
            if made_for != self.linkage:
                raise UserError(
                    f"thresholds={path} were calibrated for linkage={made_for}, not {self.linkage}; "
                    f"give linkage={made_for}, or calibrate anew with `python -m scripts.calibrate`."
                )
        values = content.get("thresholds") if isinstance(content, dict) else content
        if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
            raise UserError(f"thresholds={path} must hold a list with a number for each layer.")
        return values

    def _threshold(self, layer_idx: int) -> float | None:
        if self.budget_mode == "exact_links":
            return None
        if self.thresholds is None:
            return self.epsilon
        thresholds = self.layer_thresholds()
        if layer_idx >= len(thresholds):
            raise UserError(
                f"thresholds={self.thresholds} has {len(thresholds)} layers; the model has more."
            )
        return thresholds[layer_idx]
