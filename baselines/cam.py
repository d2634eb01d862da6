"""CaM: fold the values of evicted tokens into the tokens that follow (Zhang et al., ICML 2024).

Follows `utils_lm_eval` of the authors' repository (zyxxmu/cam at fc80e64): the first and the last
tokens stay; each token between them adds its value, divided by the number of receivers, to the tokens
after it, with a probability given by its share of attention. Updates are sequential, so mass cascades
through tokens that are themselves evicted. Keys are never touched. The authors' other two variants are
in `baselines.cam_variants`; how all three are read is in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from baselines.cam_merging import cascade, drawn, fold_entry, fold_into_kept, merge_values, receivers
from baselines.cam_probabilities import (
    banded_map,
    banded_probabilities,
    chance,
    mean_probabilities,
    merge_probabilities,
    span_means,
    window_max,
)
from baselines.h2o import keep
from kvmerge.budget import count
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all, pick

__all__ = ["CaM", "SinkCaM", "merge_probabilities", "merge_values"]

SAMPLES = ("bernoulli", "expected")
BASES = ("sink", "h2o")
SCORES = ("column", "banded")
PREFILLS = ("lm_eval", "none", "mean")
DECODE_RECEIVERS = 32
"""Most receivers of an entry that is folded while decoding (`utils_hh`)."""


@dataclass(frozen=True)
class SinkCaM(Method):
    """Settings of every variant of CaM, and their eviction: the oldest entry after the sinks."""

    start: int | None = None
    """A fixed number of sink tokens instead of half of the budget; the rest is recent."""
    m: int | None = None
    """Receivers of each merged token; None: as many as there are recent tokens."""
    sample: str = "bernoulli"
    """`bernoulli` merges each token or not (the authors); `expected` merges its expected share."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sample not in SAMPLES:
            raise unknown("sample", self.sample, SAMPLES)
        if self.start is not None and self.start < 0:
            raise UserError(f"start={self.start} is negative; give a count, or null for half.")
        if self.m is not None and self.m < 1:
            raise UserError(f"m={self.m}: a merged token needs at least 1 receiver.")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether merges are drawn."""
        return self.sample == "bernoulli"

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Fold the oldest entry after the sinks into those that follow it, and drop it."""
        entries = with_mass(entries, step)
        assert entries.scores is not None
        stored = entries.scores.shape[-1]
        if stored <= step.allowance.n_keep:
            return entries
        start, recent = self.counts(step.allowance, step.prompt_length)
        values = fold_entry(
            entries.values,
            entries.scores,
            entry=start,
            merge_budget=self.decode_receivers(recent),
            generator=step.allowance.generator,
        )
        return pick(replace(entries, values=values), outer(entries, start, stored - start - 1))

    def decode_receivers(self, recent: int) -> int:
        """Receivers of an entry that is folded while decoding."""
        return min(self.m or DECODE_RECEIVERS, recent)

    def counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Sinks and recent tokens kept of a prompt of `length` tokens.

        Raises `UserError` if no recent token is left to merge into.
        """
        start = self.start
        if start is None:
            start = allowance.n_keep - count(allowance.budget / 2, length)
        recent = allowance.n_keep - start
        if recent < 1:
            raise UserError(
                f"CaM needs at least 1 recent token to merge into; a budget of {allowance.n_keep} of "
                f"{length} prompt tokens leaves none beside {start} sinks."
            )
        return start, recent


@dataclass(frozen=True)
class CaM(SinkCaM):
    """Settings of CaM on a prompt."""

    base: str = "sink"
    """What is kept: `sink` and recent tokens (the authors), or the `h2o` tokens: the next `m` kept ones
    share the value, and nothing cascades."""
    score: str = "column"
    """`column` sums each column of full attention; `banded` only what sinks and recent window see."""
    prefill: str = "lm_eval"
    """The merge probability on the prompt: against the `lm_eval` maximum, or the `mean` of the
    receivers; `none` evicts the prompt's tokens unmerged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("base", BASES), ("score", SCORES), ("prefill", PREFILLS)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.score == "banded" and (self.base, self.prefill) != ("sink", "lm_eval"):
            raise UserError("score=banded is defined for base=sink with prefill=lm_eval only.")
        if self.prefill == "mean" and self.base == "sink" and self.m is not None:
            raise UserError(
                "prefill=mean merges almost every token, and with base=sink each passes on what it "
                "received, so that m receivers would gather the whole prompt. Use m=null or base=h2o."
            )

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the sinks and the recent tokens, with the values between folded in."""
        start, recent = self.counts(allowance, layer.length)
        m = self.m or recent
        entries = keep_all(layer)
        if self.base == "h2o":
            return self._fold_h2o(entries, start, recent, m, self.prefill, allowance)
        if self.prefill != "none":
            if self.score == "banded":
                chances = banded_probabilities(
                    banded_map(layer, start, recent), start=start, recent=recent
                )
            elif self.prefill == "mean":
                chances = mean_probabilities(
                    layer.column_scores(), start=start, recent=recent, receivers=m
                )
            else:
                chances = merge_probabilities(layer.column_scores(), start=start, recent=recent)
            share = drawn(chances, allowance.generator) / m
            entries = replace(entries, values=cascade(layer.values, share, start=start, reach=m))
        return pick(entries, outer(entries, start, recent))

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Fold the entry that leaves into those that follow it, and drop it."""
        if self.base == "sink":
            return super().hold(entries, step)
        entries = with_mass(entries, step)
        heavy, recent = self.counts(step.allowance, step.prompt_length)
        m = self.decode_receivers(recent)
        return self._fold_h2o(entries, heavy, recent, m, "mean", step.allowance)

    def _fold_h2o(
        self, entries: Entries, heavy: int, recent: int, m: int, rule: str, allowance: Allowance
    ) -> Entries:
        """Keep what H2O keeps; under `lm_eval` the heavy hitters are the rivals that sinks would be."""
        scores = entries.scores
        assert scores is not None
        kept = keep(scores, heavy=heavy, recent=recent)
        if rule == "none":
            return pick(entries, kept)
        if rule == "mean":
            first, _ = receivers(kept, scores.shape[-1], m)
            best = span_means(scores.gather(-1, kept), first, m)
        else:
            best = window_max(scores, recent)
            if heavy:
                hitters = scores.gather(-1, kept[..., :heavy])
                best = torch.maximum(best, hitters.amax(dim=-1, keepdim=True))
        share = drawn(chance(scores, best), allowance.generator)
        values = fold_into_kept(entries.values, share, kept, m)
        return replace(pick(entries, kept), values=values)


def with_mass(entries: Entries, step: DecodeStep) -> Entries:
    """The entries, their scores grown by the attention of the step."""
    assert entries.scores is not None
    return replace(entries, scores=entries.scores + step.mass(entries.scores.shape[1]))


def outer(entries: Entries, start: int, recent: int) -> Tensor:
    """Slots of the first `start` and the last `recent` entries: `(batch, kv_heads, start + recent)`."""
    batch, kv_heads, stored = entries.positions.shape
    slots = torch.arange(stored, device=entries.positions.device)
    kept = torch.cat([slots[:start], slots[stored - recent :]])
    return kept.expand(batch, kv_heads, -1)
