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

from baselines.cam_merging import cascade, drawn, fold_entry, merge_values
from baselines.cam_probabilities import banded_map, banded_probabilities, merge_probabilities
from kvmerge.budget import count
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all, pick

__all__ = ["CaM", "SinkCaM", "merge_probabilities", "merge_values"]

SAMPLES = ("bernoulli", "expected")
SCORES = ("column", "banded")
DECODE_RECEIVERS = 32
"""Most receivers of an entry that is folded while decoding (`utils_hh`)."""


@dataclass(frozen=True)
class SinkCaM(Method):
    """Settings of every variant of CaM, and their eviction: the oldest entry after the sinks."""

    start: int | None = None
    """A fixed number of sink tokens instead of half of the budget; the rest is recent."""
    sample: str = "bernoulli"
    """`bernoulli` merges each token or not (the authors); `expected` merges its expected share."""

    needs_scores: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sample not in SAMPLES:
            raise unknown("sample", self.sample, SAMPLES)
        if self.start is not None and self.start < 0:
            raise UserError(f"start={self.start} is negative; give a count, or null for half.")

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
        """Return the receivers of an entry that is folded while decoding."""
        return min(DECODE_RECEIVERS, recent)

    def check(self, layer_idx: int, length: int, allowance: Allowance) -> None:
        """Refuse a budget without a recent token to merge into, as `counts` does."""
        self.counts(allowance, length)

    def counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Return the sinks and recent tokens kept of a prompt of `length` tokens.

        Raises:
            UserError: if no recent token is left to merge into.
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

    score: str = "column"
    """`column` sums each column of full attention; `banded` only what sinks and recent window see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise unknown("score", self.score, SCORES)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the sinks and the recent tokens, with the values between folded in."""
        start, recent = self.counts(allowance, layer.length)
        if self.score == "banded":
            blocks = banded_map(layer, start, recent)
            chances = banded_probabilities(blocks, start=start, recent=recent)
        else:
            chances = merge_probabilities(layer.column_scores(), start=start, recent=recent)
        share = drawn(chances, allowance.generator) / recent
        values = cascade(layer.values, share, start=start, reach=recent)
        entries = replace(keep_all(layer), values=values)
        return pick(entries, outer(entries, start, recent))


def with_mass(entries: Entries, step: DecodeStep) -> Entries:
    """Add the attention of the step to the entries' scores."""
    assert entries.scores is not None
    return replace(entries, scores=entries.scores + step.mass(entries.scores.shape[1]))


def outer(entries: Entries, start: int, recent: int) -> Tensor:
    """Return the slots of the first `start` and the last `recent` entries: `(batch, kv_heads, n)`."""
    batch, kv_heads, stored = entries.positions.shape
    slots = torch.arange(stored, device=entries.positions.device)
    kept = torch.cat([slots[:start], slots[stored - recent :]])
    return kept.expand(batch, kv_heads, -1)
