"""H2O as the authors simulate it: nothing is dropped, a mask hides what would have been.

Two readings of FMInference/H2O at ac75c2a that differ from its real drop (`baselines.h2o`): the
decoding mask of `h2o_hf/utils_hh` and the single-pass mask of `h2o_hf/utils_lm_eval`. They cost as much
as the full cache and serve to check the numbers of papers that used them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from baselines.heavy_hitters import HeavyHitters
from kvmerge.errors import unknown
from kvmerge.method import (
    Allowance,
    DecodeStep,
    Entries,
    PrefillLayer,
    hide,
    keep_all,
    top_positions,
)
from kvmerge.scores import attention_blocks

LEAKS = ("global", "local")


@dataclass(frozen=True)
class H2OSimDecode(HeavyHitters):
    """Settings of `utils_hh`: after each step a mask says what the next one may see."""

    acts_on_decode: ClassVar[bool] = True
    simulates: ClassVar[bool] = True

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep all, and hide what the first decode step may not see."""
        entries = replace(keep_all(layer), scores=self.prompt_scores(layer))
        return self._masked(entries, allowance, layer.length)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Add the step's attention to the scores, and hide what the next step may not see."""
        entries = replace(entries, scores=self.updated_scores(entries, step))
        return self._masked(entries, step.allowance, step.prompt_length)

    def _masked(self, entries: Entries, allowance: Allowance, length: int) -> Entries:
        assert entries.scores is not None
        heavy, recent = self.counts(allowance, length)
        visible, scores = decode_mask(entries.scores, heavy=heavy, recent=recent)
        return hide(replace(entries, scores=scores), visible)


@dataclass(frozen=True)
class H2OSimPrefill(HeavyHitters):
    """Settings of `utils_lm_eval`: one pass whose rows see heavy hitters and a band.

    The authors score texts in that one pass and never decode. Here a generated token sees what the next
    row of the mask would have seen (*ours*): the heavy hitters of the prompt and the tokens behind it.
    Under `append` that band grows with the answer; under `hold` it moves on.
    """

    leak: str = "global"
    """`global`: hitters chosen once by all rows, later ones included. `local`: by the rows before each,
    a variant that the authors left commented out."""

    alters_prefill: ClassVar[bool] = True
    simulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leak not in LEAKS:
            raise unknown("leak", self.leak, LEAKS)

    def visible(self, layer: PrefillLayer, allowance: Allowance) -> Tensor:
        """Return what each row of the prompt may see."""
        length = layer.length
        heavy, recent = self.counts(allowance, length)
        if self.leak == "local":
            return self._local(layer, heavy)[0] | band(length, recent, layer.keys.device)
        return prefill_mask(self.prompt_scores(layer), heavy=heavy, recent=recent)

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        """Keep all, and hide what the first generated token may not see."""
        heavy, recent = self.counts(allowance, layer.length)
        local = self.leak == "local"
        scores = self._local(layer, heavy)[1] if local else self.prompt_scores(layer)
        return self._masked(replace(keep_all(layer), scores=scores), heavy, recent, layer.length)

    def hold(self, entries: Entries, step: DecodeStep) -> Entries:
        """Move the band on by one token."""
        heavy, recent = self.counts(step.allowance, step.prompt_length)
        return self._masked(entries, heavy, recent, step.prompt_length)

    def _masked(self, entries: Entries, heavy: int, recent: int, length: int) -> Entries:
        assert entries.scores is not None
        n_stored = entries.scores.shape[-1]
        heavy = max(heavy - 1, 0) if self.leak == "local" else heavy  # the row itself counts as one
        visible = torch.zeros_like(entries.scores, dtype=torch.bool)
        visible.scatter_(-1, top_positions(entries.scores[..., :length], heavy), True)
        visible[..., max(0, n_stored - recent) :] = True
        return hide(entries, torch.nn.functional.pad(visible, (0, 1), value=True))

    def _local(self, layer: PrefillLayer, heavy: int) -> tuple[Tensor, Tensor]:
        dtype = layer.keys.dtype if self.score_dtype == "model" else torch.float32
        blocks = attention_blocks(layer.queries, layer.keys, softmax=layer.softmax)
        rows = (self.joined(weights.to(dtype).float(), layer.keys) for _, weights in blocks)
        return local_mask(rows, layer.length, heavy=heavy, dtype=dtype)


def decode_mask(scores: Tensor, *, heavy: int, recent: int) -> tuple[Tensor, Tensor]:
    """Return what the next step may see, and the scores it starts from (`utils_hh`, docs/methods.md).

    Two quirks are kept. The token that has just left the recent window is hidden for one step though
    its score is kept (the mask is one column wider than the candidates). And with `recent=0` no score
    is ever zeroed, so evicted tokens may return.

    Args:
        scores: `(batch, kv_heads, n)` accumulated over all steps so far.
        heavy: heavy hitters.
        recent: recent tokens, the next one included.

    Returns:
        visible `(batch, kv_heads, n + 1)` bool, the next token last; scores `(batch, kv_heads, n)` with
        those of evicted tokens zeroed.
    """
    length = scores.shape[-1]
    visible = scores.new_ones((*scores.shape[:-1], length + 1), dtype=torch.bool)
    if length > heavy + recent:
        visible[..., : length + 1 - recent] = False
        visible.scatter_(-1, top_positions(scores[..., : length - recent], heavy), True)
    survives = visible[..., :-1].clone()
    survives[..., length - recent if recent else 0 :] = True
    return visible, scores * survives


def prefill_mask(scores: Tensor, *, heavy: int, recent: int) -> Tensor:
    """Return what each row of a single pass may see (`utils_lm_eval`, docs/methods.md).

    The heavy hitters are open to every row that comes after them, chosen by the attention of all rows,
    later ones included: an oracle leak that is part of the authors' code. Beside them a row sees itself
    and the `recent` tokens before it.

    Args:
        scores: `(batch, kv_heads, T)` attention column sums.
        heavy: heavy hitters.
        recent: width of the band, the row itself not counted.

    Returns:
        `(batch, kv_heads, T, T)` bool, row by column.
    """
    length = scores.shape[-1]
    hitters = torch.zeros_like(scores, dtype=torch.bool)
    hitters.scatter_(-1, top_positions(scores, heavy), True)
    causal = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    return (hitters.unsqueeze(-2) & causal) | band(length, recent, scores.device)


def band(length: int, recent: int, device: torch.device) -> Tensor:
    """Return `(T, T)` bool: each row sees itself and the `recent` tokens before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(-recent)


def local_mask(
    rows: Iterable[Tensor], length: int, *, heavy: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the heavy hitters of each row by the rows before it.

    This is `local_heavy_hitter_mask` of `utils_lm_eval`.

    The first `heavy` rows see everything. Each later row sees itself and the `heavy - 1` best tokens by
    the attention so far, which then grows by the row's own; a token that is not seen loses its score.

    Args:
        rows: blocks of the unmasked map in order, each `(batch, kv_heads, n, columns)`.
        length: prompt tokens `T`.
        heavy: heavy hitters, the row itself counted.
        dtype: sums are rounded to it after each row.

    Returns:
        `(batch, kv_heads, T, T)` bool, the band left out; `(batch, kv_heads, T)` scores at the end.
    """
    seen: list[Tensor] = []
    running: Tensor | None = None
    for block in rows:
        padded = torch.nn.functional.pad(block, (0, length - block.shape[-1]))
        for row in padded.unbind(dim=2):
            running = torch.zeros_like(row) if running is None else running
            visible = torch.zeros_like(row, dtype=torch.bool)
            token = len(seen)
            if token < heavy:
                visible[..., : token + 1] = True
            else:
                visible.scatter_(-1, top_positions(running, max(heavy - 1, 0)), True)
                visible[..., token] = True
            running = (running + row).to(dtype).float() * visible
            seen.append(visible)
    assert running is not None
    return torch.stack(seen, dim=2), running
