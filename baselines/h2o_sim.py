"""H2O as the authors simulate it: nothing is dropped, a mask hides what would have been.

Two readings of FMInference/H2O at ac75c2a that differ from its real drop (`baselines.h2o`): the
decoding mask of `h2o_hf/utils_hh` and the single-pass mask of `h2o_hf/utils_lm_eval`. They cost as much
as the full cache and serve to check the numbers of papers that used them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmerge.method import top_positions


def decode_mask(scores: Tensor, *, heavy: int, recent: int) -> tuple[Tensor, Tensor]:
    """What the next step may see, and the scores it starts from (`utils_hh`, methods.md 2.3).

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
    """What each row of a single pass may see (`utils_lm_eval`, methods.md 2.4).

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
    tokens = torch.arange(length, device=scores.device)
    age = tokens[:, None] - tokens
    return (hitters.unsqueeze(-2) | (age <= recent)) & (age >= 0)
