"""The authors' other two variants of CaM (zyxxmu/cam at fc80e64; the default is `baselines.cam`).

`utils_hh` hides the middle of the prompt behind a mask and merges only while decoding. `generate_task`
reads a text token by token and really drops and merges one entry a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from baselines.cam import SinkCaM, outer
from baselines.cam_merging import cascade, drawn, fold_entry
from baselines.cam_probabilities import banded_map, streamed_probabilities
from kvmerge.errors import UserError
from kvmerge.method import (
    Allowance,
    DecodeStep,
    Entries,
    PrefillLayer,
    hide,
    keep_all,
    pick,
)


def check_receivers(m: int) -> None:
    """Refuse a merged token without a receiver.

    Raises:
        UserError: if `m` is not a whole number of 1 or more.
    """
    if type(m) is not int or m < 1:
        raise UserError(f"m={m}: a merged token needs at least 1 receiver.")


@dataclass(frozen=True)
class CaMHH(SinkCaM):
    """Settings of `utils_hh`. The prompt is never merged: what lies between the sinks and the recent
    tokens is hidden, and entries that leave the window while decoding are folded into those after
    them. Nothing is dropped, so it costs as much as the full cache."""

    m: int = 32
    """Receivers of each entry (the authors)."""
    bug_compat: bool = False
    """Repeat what looks unintended in the authors' code: the entry that is folded is still seen at the
    next step; it gives `1 / m` even where fewer receivers follow; its rivals are the whole window, not
    the receivers; and where the budget holds everything the first mask hides everything."""

    needs_scores: ClassVar[bool] = False
    acts_on_decode: ClassVar[bool] = True
    simulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_receivers(self.m)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep all, and hide what the first decode step may not see."""
        entries = replace(keep_all(layer), scores=None)
        start, recent = self.counts(allowance, layer.length)
        return self._masked(entries, start, recent)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Fold the entry that leaves the window into those that follow it, and hide it."""
        stored = entries.positions.shape[-1]
        start, recent = self.counts(step.allowance, step.prompt_length)
        leaving = stored - recent
        followers = recent - 1
        m = self.m
        if self.bug_compat:
            leaving, followers = leaving + 1, followers - 1
        elif followers:
            m = min(m, followers)
        if followers > 0 or self.bug_compat:
            values = fold_entry(
                entries.values,
                step.mass(entries.keys.shape[1]),
                entry=leaving,
                merge_budget=m,
                generator=step.allowance.generator,
                window=followers if self.bug_compat else m,
            )
            entries = replace(entries, values=values)
        return self._masked(entries, start, recent)

    def counts(self, allowance: Allowance, length: int) -> tuple[int, int]:
        """Return the sinks and recent tokens; `bug_compat` needs 2 of these, as the authors do."""
        start, recent = super().counts(allowance, length)
        if self.bug_compat and recent < 2:
            raise UserError(
                f"bug_compat=true needs 2 recent tokens; a budget of {allowance.n_keep} of {length} "
                "prompt tokens leaves 1. Raise the budget or use bug_compat=false."
            )
        return start, recent

    def _masked(self, entries: Entries, start: int, recent: int) -> Entries:
        """Let the next token see the sinks and `recent` tokens, itself among them."""
        batch, kv_heads, stored = entries.positions.shape
        columns = torch.arange(stored + 1, device=entries.positions.device)
        visible = (columns < start) | (columns > stored - recent)
        if stored <= start + recent:
            visible = torch.full_like(visible, not self.bug_compat)
        return hide(entries, visible.expand(batch, kv_heads, -1))


@dataclass(frozen=True)
class CaMGenerate(SinkCaM):
    """Settings of `generate_task`. The authors feed the prompt token by token, each row attending to
    the compressed cache; here the prompt has run with full attention, and its eviction and merging are
    replayed on the layer's queries and keys (*ours*). While decoding, every step is theirs; they number
    positions by the cache (`pos=rolled`)."""

    m: int = 16
    """Receivers of each entry (the authors)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_receivers(self.m)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Evict and merge the prompt as if it had come token by token."""
        start, recent = self.counts(allowance, layer.length)
        chances, scores = streamed_probabilities(
            banded_map(layer, start, recent), start=start, recent=recent, receivers=self.m
        )
        share = drawn(chances, allowance.generator) / self.m
        values = cascade(layer.values, share, start=start, reach=min(self.m, recent))
        entries = replace(keep_all(layer), values=values, scores=scores)
        return pick(entries, outer(entries, start, recent))

    def decode_receivers(self, recent: int) -> int:
        """Return the receivers of an entry, those that do not exist included: the divisor stays."""
        return self.m
