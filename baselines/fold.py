"""What is kept, and what becomes of the rest, as settings of their own: the factorial of merging.

A rule, which is another method, says which tokens keep an entry. Each of the others is routed to one of
them and folded into it, or dropped; a logit bias can stand for how many tokens, or what attention, an
entry stands for; biases and values can be fitted to the prompt's last queries afterwards. Which methods
are corners of this, and which are not, is in docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from baselines.nearest import nearest_in_text, slots_of_nearest
from baselines.refitting import Reference
from kvmerge import merging
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, keep_all, select
from kvmerge.resolve import load_method
from kvmerge.scores import last_rows, row_logits

_CHOICES: dict[str, tuple[str, ...]] = {
    "fold": ("drop", "values", "keys_values"),
    "route": ("position", "cosine", "attention", "set"),
    "weights": ("uniform", "mass", "gaussian"),
    "bias": ("none", "log_size", "log_mass"),
    "refit": ("none", "values", "bias", "both"),
}
_NO_MASS = 1e-12
"""Least attention mass, so that tokens without any weigh alike."""


@runtime_checkable
class Grouping(Protocol):
    """A method that groups tokens into sets, and keeps a pivot of each."""

    @property
    def pivot(self) -> str:
        """Which member is the pivot."""

    def sets(self, entries: Entries, length: int, layer_idx: int, allowance: Allowance) -> Tensor:
        """Return set ids `(batch, kv_heads, T)`, -1 where evicted."""


@dataclass(frozen=True)
class Fold(Method):
    """Settings of the factorial."""

    keep: str = "h2o"
    """The method whose kept tokens keep an entry, by its name, with its default settings."""
    fold: str = "values"
    """What of the other tokens is folded into the entry that they are routed to: `drop` nothing,
    `values`, or `keys_values`."""
    route: str = "position"
    """The kept token that is nearest in the text (`position`), by its key (`cosine`), or by which of
    the prompt's last queries attend to it (`attention`); or the pivot of the token's own set (`set`,
    of rules that make sets)."""
    weights: str = "mass"
    """Weights of the members of an entry: equal (`uniform`), their attention mass (`mass`), or by a
    Gaussian around the kept token's key (`gaussian`)."""
    rows: int | None = None
    """Last rows of the attention map that mass is summed over; None: all."""
    sigma: float = 5.0
    """Width of the Gaussian in key distance."""
    bias: str = "none"
    """Added to an entry's attention logit: nothing, the log of how many tokens it stands for
    (`log_size`), or of their mass as a multiple of the kept token's own (`log_mass`)."""
    refit: str = "none"
    """What is fitted to the last queries: `none`, `values` (ridge regression on their outputs), `bias`
    (non-negative least squares on their attention mass), or `both`, the bias first."""
    reference: int = 256
    """Last queries of the prompt that `route=attention` and fits look at."""
    ridge: float = 0.01
    """How strongly a fit is drawn to what it begins with."""
    rule: Method = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), allowed)
        for name in ("sigma", "ridge"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be a positive number.")
        for name in ("rows", "reference"):
            rows = getattr(self, name)
            if rows is not None and rows < 1:
                raise UserError(f"{name}={rows} must be a whole number of rows, 1 or more.")
        self._check_idle()
        object.__setattr__(self, "rule", self._load_rule())

    def _check_idle(self) -> None:
        """Refuse a setting that the others leave without effect."""
        has_sets = self.fold != "drop" or self.bias != "none"
        used = {
            "route": has_sets,
            "weights": self.fold != "drop",
            "rows": self._uses_mass,
            "sigma": self.fold != "drop" and self.weights == "gaussian",
            "reference": self.refit != "none" or (has_sets and self.route == "attention"),
            "ridge": self.refit != "none",
        }
        for each in fields(self):
            if not used.get(each.name, True) and getattr(self, each.name) != each.default:
                raise UserError(
                    f"{each.name}={getattr(self, each.name)} has no effect with fold={self.fold}, "
                    f"route={self.route}, weights={self.weights}, bias={self.bias} and "
                    f"refit={self.refit}; leave it out, or change one of these."
                )

    def _load_rule(self) -> Method:
        if self.keep == "fold":
            raise UserError("keep=fold: the rule that keeps tokens must be another method.")
        rule = load_method(self.keep)
        if rule.alters_prefill or rule.simulates or rule.acts_on_decode:
            raise UserError(
                f"keep={self.keep} hides entries or decides while decoding; give a method that keeps "
                "some tokens of a finished prompt, e.g. h2o, snapkv, tova, kvmerger."
            )
        if self.route == "set" and not isinstance(rule, Grouping):
            raise UserError(
                f"route=set needs a rule that makes sets, e.g. keep=kvmerger, not keep={self.keep}."
            )
        return rule

    @property
    def needs_scores(self) -> bool:  # type: ignore[override]
        """Whether the rule or the weights ask for the mass over all rows."""
        return self.rule.needs_scores or (self._uses_mass and self.rows is None)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether the rule draws."""
        return self.rule.stochastic

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        """Whether the rule moves keys."""
        return self.rule.needs_rope

    @property
    def allocates(self) -> bool:  # type: ignore[override]
        """Whether the rule divides the budget across layers."""
        return self.rule.allocates

    @property
    def meets_budget(self) -> bool:  # type: ignore[override]
        """Whether the rule does."""
        return self.rule.meets_budget

    @property
    def _uses_mass(self) -> bool:
        return self.bias == "log_mass" or (self.fold != "drop" and self.weights == "mass")

    def allocate(self, layers: Sequence[PrefillLayer], allowance: Allowance) -> list[int]:
        """Divide the budget as the rule does."""
        return self.rule.allocate(layers, allowance)

    def check(self, layer_idx: int, length: int, allowance: Allowance) -> None:
        """Refuse what the rule refuses."""
        self.rule.check(layer_idx, length, allowance)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep what the rule keeps, fold the others into it, and fit the result."""
        positions, set_ids = self._grouped(layer, allowance)
        entries = select(layer, positions)
        if self.fold != "drop" or self.bias != "none":
            entries = self._folded(layer, entries, set_ids)
        return self._refitted(layer, entries)

    def _grouped(self, layer: PrefillLayer, allowance: Allowance) -> tuple[Tensor, Tensor]:
        """Return the kept positions, and the slot that each token of the prompt belongs to."""
        if self.route == "set":
            assert isinstance(self.rule, Grouping)
            scores = layer.column_scores()
            everything = replace(keep_all(layer), scores=scores)
            set_ids = self.rule.sets(everything, layer.length, layer.layer_idx, allowance)
            return merging.pivot_tokens(set_ids, scores, self.rule.pivot), set_ids
        kept = self.rule.compress(layer, allowance)
        if kept.is_ragged:
            raise UserError(
                f"keep={self.keep} keeps more tokens in some heads than in others, which cannot be "
                "folded into; give a rule with as many in each."
            )
        question = "route", self.route, self.reference, kept.positions.cpu().numpy().tobytes()
        return kept.positions, layer.once(question, lambda: self._routed(layer, kept.positions))

    def _routed(self, layer: PrefillLayer, positions: Tensor) -> Tensor:
        if self.route == "position":
            return nearest_in_text(positions, layer.length)
        if self.route == "cosine":
            return slots_of_nearest(layer.keys.float(), positions)
        # one KV head after the other: what attends to it is many times its keys
        return torch.cat(
            [
                slots_of_nearest(self._attention(layer, head), positions[:, head : head + 1])
                for head in range(positions.shape[1])
            ],
            dim=1,
        )

    def _attention(self, layer: PrefillLayer, head: int) -> Tensor:
        """Return what a KV head's tokens get of the last queries: `(batch, 1, T, G rows)` float32."""
        group = layer.queries.shape[1] // layer.keys.shape[1]
        heads = slice(head * group, (head + 1) * group)
        begin = max(0, layer.length - self.reference)
        of_head = layer.queries[:, heads], layer.keys[:, head : head + 1]
        logits = row_logits(*of_head, begin, layer.length, layer.softmax)
        weights = layer.softmax.weights(logits, heads)
        return weights.flatten(2, 3).transpose(2, 3).contiguous()

    def _folded(self, layer: PrefillLayer, entries: Entries, set_ids: Tensor) -> Entries:
        mass = self._mass(layer) if self._uses_mass else None
        sizes = merging.sum_over_sets(set_ids, torch.ones_like(set_ids))
        keys, values, bias = entries.keys, entries.values, None
        if self.fold != "drop":
            weights = self._weights(layer, entries.positions, set_ids, mass)
            values = merging.weighted_sum(layer.values, set_ids, weights)
            if self.fold == "keys_values":
                keys = merging.weighted_sum(layer.keys, set_ids, weights)
        if self.bias == "log_size":
            bias = sizes.float().log()
        elif self.bias == "log_mass":
            assert mass is not None
            own = mass.gather(-1, entries.positions)
            bias = (merging.sum_over_sets(set_ids, mass) / own).log()
        return replace(entries, keys=keys, values=values, sizes=sizes, bias=bias)

    def _mass(self, layer: PrefillLayer) -> Tensor:
        """Return the attention mass of each token: `(batch, kv_heads, T)` float32, above 0."""
        if self.rows is None:
            return layer.column_scores().clamp_min(_NO_MASS)
        rows = min(self.rows, layer.length)
        by_head = last_rows(layer.queries, layer.keys, rows, softmax=layer.softmax).sum(dim=2)
        return by_head.unflatten(1, (layer.keys.shape[1], -1)).sum(dim=2).clamp_min(_NO_MASS)

    def _weights(
        self, layer: PrefillLayer, positions: Tensor, set_ids: Tensor, mass: Tensor | None
    ) -> Tensor:
        """Return the weight of each token in its set, `(batch, kv_heads, T)` float32; sum 1."""
        is_kept = torch.zeros(set_ids.shape, device=set_ids.device).scatter_(-1, positions, 1.0)
        if self.weights == "mass":
            assert mass is not None
            total = merging.sum_over_sets(set_ids, mass).gather(-1, set_ids.clamp_min(0))
            return torch.where(set_ids >= 0, mass / total, 0.0)
        sigma = "inf" if self.weights == "uniform" else self.sigma
        return merging.gaussian_weights(layer.keys, set_ids, is_kept, sigma=sigma, pivot=is_kept)

    def _refitted(self, layer: PrefillLayer, entries: Entries) -> Entries:
        if self.refit == "none":
            return entries
        seen = Reference.of(layer, self.reference)
        if self.refit in ("bias", "both"):
            start = torch.zeros(entries.positions.shape, device=entries.keys.device)
            start = start if entries.bias is None else entries.bias
            fitted = seen.fitted_bias(entries.keys, entries.positions, start, self.ridge)
            entries = replace(entries, bias=fitted)
        if self.refit in ("values", "both"):
            values = seen.fitted_values(
                entries.keys, entries.values, entries.positions, entries.bias, self.ridge
            )
            entries = replace(entries, values=values.to(entries.values.dtype))
        return entries
