"""StreamingLLM: keep the first tokens, the attention sinks, and the last ones (arXiv 2309.17453).

Follows `StartRecentKVCache` of the authors' repository (mit-han-lab/streaming-llm at 2e50426). The
authors number positions by place in the cache; `pos=rolled` does so here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvmerge.errors import UserError
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all, pick


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Settings of StreamingLLM."""

    sinks: int = 4
    """First tokens kept; a budget that does not exceed them keeps one recent token."""

    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.sinks) is not int or self.sinks < 0:
            raise UserError(f"sinks={self.sinks} must be a whole number of tokens, 0 or more.")

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep the sinks and the recent tokens."""
        return self._trim(keep_all(layer), allowance.n_keep)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Drop the oldest entry after the sinks."""
        return self._trim(entries, step.allowance.n_keep)

    def _trim(self, entries: Entries, n_keep: int) -> Entries:
        batch, kv_heads, stored = entries.positions.shape
        slots = keep(stored, n_keep, sinks=self.sinks).to(entries.positions.device)
        return pick(entries, slots.expand(batch, kv_heads, -1))


def keep(stored: int, n_keep: int, *, sinks: int) -> Tensor:
    """Return which of `stored` entries stay: `(min(stored, n_keep),)` int64 slots, ascending."""
    n_keep = min(stored, n_keep)
    sinks = min(sinks, n_keep - 1)
    return torch.cat([torch.arange(sinks), torch.arange(stored - n_keep + sinks, stored)])
