"""What transformers sees as the cache inside a `with compressed(...)` block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvmerge.errors import UserError
from kvmerge.session import CacheSession, RowStats

ELSEWHERE = (
    "this cache was made inside a `with compressed(...)` block, and can be used only there and only by "
    "the model of that block. Keep the whole loop inside the block."
)
BEAMS = (
    "beam search is not supported on a compressed cache: each beam would need its own compressed copy. "
    "Use num_beams=1 (greedy or sampling)."
)


class CompressedCache(Cache):
    """A cache that counts tokens, while the entries live in a session.

    Its length is the number of tokens seen, not of entries stored, so that the next token takes its
    true position in the text. It serves one forward call at a time, and only after the block that made
    it has let the call in: elsewhere it holds nothing that a model could attend to.
    """

    def __init__(self, session: CacheSession, width: int) -> None:
        """Wrap a session whose prefill is about to run.

        Args:
            width: tokens of the prefill's batch, padding among them.
        """
        super().__init__(layers=[_CountingLayer() for _ in range(session.num_layers)])
        self.session = session
        self.width = width

    @property
    def stats(self) -> list[RowStats]:
        """Entries and bytes that each row of the batch kept of its prompt."""
        return self.session.stats

    def nbytes(self) -> int:
        """Count the bytes of all keys and values stored now, generated tokens included."""
        return sum(layer.nbytes() for layer in self.session.layers)

    def text_columns(self, columns: int) -> Tensor:
        """Return which of the columns seen and coming hold a row's text: `(batch, columns)` bool."""
        return left_padded(self.session.lengths, self.width, columns)

    def let_in(self) -> None:
        """Let one forward call use every layer once.

        Raises:
            UserError: if an earlier call ended before its last layer.
        """
        if len({layer.seen for layer in self.layers}) > 1:  # type: ignore[union-attr]
            raise UserError("an earlier call on this cache ended in an error; start a new one.")
        for layer in self.layers:
            layer.open = True  # type: ignore[union-attr]

    def crop(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to forget tokens: what was merged cannot be taken apart."""
        self._refuse("cut back, as assisted generation does")

    def batch_repeat_interleave(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to repeat rows."""
        self._refuse("copied for several answers; repeat the prompt in the batch instead")

    def batch_select_indices(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to choose rows."""
        self._refuse("divided")

    def reset(self) -> NoReturn:
        """Refuse to start again."""
        self._refuse("emptied; call the model without one to start again")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"a compressed cache cannot be {what}.")


class _CountingLayer(CacheLayerMixin):
    """A cache layer that passes new states through and only counts them."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.open = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.open:
            raise UserError(ELSEWHERE)
        self.open = False
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """Return the same, by the name that earlier 5.x versions call."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UserError(BEAMS)


def left_padded(lengths: Sequence[int], width: int, columns: int) -> Tensor:
    """Return where prompts of some lengths and what follows them stand: `(batch, columns)` bool.

    Args:
        lengths: tokens of each prompt.
        width: columns of the prompts, padding on the left.
        columns: columns in all.
    """
    padding = width - torch.tensor(list(lengths)).unsqueeze(-1)
    return torch.arange(columns) >= padding
