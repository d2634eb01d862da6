"""What transformers sees as the cache inside a `with compressed(...)` block."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvmerge.errors import UserError
from kvmerge.method import Entries, PrefillLayer
from kvmerge.session import CacheSession, RowStats

if TYPE_CHECKING:
    from kvmerge.compression import Generation

ELSEWHERE = (
    "this cache was made inside a `with compressed(...)` block, and can be used only there and only by "
    "the model of that block, called as a whole. Keep the whole loop inside the block."
)
BEAMS = (
    "beam search is not supported on a compressed cache: each beam would need its own compressed copy. "
    "Use num_beams=1 (greedy or sampling)."
)
_IN_USE = (
    "another thread is using this cache: a cache serves one call at a time. Give each thread its own; "
    "copy.deepcopy(cache) makes one that goes on from the same text."
)


class EntryPositions:
    """Where the entries of each layer and row stand: what a session's buffers do not hold.

    An observer of a session (`kvmerge.session.Observer`).
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, row: int, layer_idx: int, _: PrefillLayer, kept: Entries) -> None:
        """Note positions and sizes of one layer of one row."""
        self._found[layer_idx, row] = kept.positions, kept.sizes

    def of(self, layer_idx: int, row: int) -> tuple[Tensor, Tensor | None]:
        """Return positions and sizes, `(1, kv_heads, n)` each; a layer with a window has none."""
        return self._found[layer_idx, row]


class CompressedCache(Cache):
    """A cache that counts tokens, while the entries live in a session.

    Its length is the number of tokens seen, not of entries stored, so that the next token takes its
    true position in the text. It serves one forward call at a time, and only after the block that made
    it has let the call in: elsewhere it holds nothing that a model could attend to. `copy.deepcopy`
    makes another that goes on from the same text.
    """

    def __init__(self, owner: object) -> None:
        """Make a cache without a text; `begin` gives it one.

        Args:
            owner: the block that the cache may be used in.
        """
        super().__init__(layers=[])
        self.owner = owner
        self.turns = 0
        self.generation: Generation | None = None
        """The last turn, as the block's statistics have it; None before its first pass has ended."""
        self._using = threading.RLock()
        self._unfinished = False

    def begin(self, session: CacheSession, width: int, noted: EntryPositions) -> None:
        """Take a session whose prefill is about to run in place of the text so far.

        Args:
            session: what will hold the entries.
            width: tokens of the prefill's batch, padding among them.
            noted: the session's observer.
        """
        self.session, self.width, self._noted = session, width, noted
        self.layers = [_CountingLayer() for _ in range(session.num_layers)]
        self._ids: list[Tensor] | None = []
        self.generation = None

    @property
    def stats(self) -> list[RowStats]:
        """Entries and bytes that each row of the batch kept of its prompt."""
        return self.session.stats

    def nbytes(self) -> int:
        """Count the bytes of all keys and values stored now, generated tokens included."""
        return sum(layer.nbytes() for layer in self.session.layers)

    def kept(self, layer_idx: int, row: int) -> Entries:
        """Return what one layer kept of a row's prompt, batch 1; keys and values are not copies."""
        positions, sizes = self._noted.of(layer_idx, row)
        keys, values, bias = self.session.layers[layer_idx].prefilled_states(row)
        return Entries(keys, values, positions, sizes, bias)

    def kept_gradients(self) -> bool:
        """Return whether the entries are part of a graph that gradients would flow through."""
        return any(layer.prefilled_states(0)[0].requires_grad for layer in self.session.layers)

    def text_columns(self, columns: int) -> Tensor:
        """Return which of the columns seen and coming hold a row's text: `(batch, columns)` bool."""
        return left_padded(self.session.lengths, self.width, columns)

    def saw(self, input_ids: Tensor | None) -> None:
        """Remember new tokens `(batch, n)`; None: they were given as embeddings, and are unknown."""
        if input_ids is None:
            self._ids = None
        elif self._ids is not None:
            self._ids.append(input_ids.clone())  # a view would hold on to the whole text, each step

    def tokens(self) -> Tensor | None:
        """Return all tokens seen, `(batch, n)`, padding among them; None where some are unknown."""
        if self._ids is None:
            return None
        self._ids = [torch.cat(self._ids, dim=1)]
        return self._ids[0]

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep other threads out inside the block.

        Raises:
            UserError: if one is in.
        """
        if not self._using.acquire(blocking=False):
            raise UserError(_IN_USE)
        try:
            yield
        finally:
            self._using.release()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Check a forward call inside the block, and then let it use every layer once.

        `let_out` ends the call; an exception inside the block keeps it out.

        Raises:
            UserError: if a call of another thread is in, or an earlier one ended in an error.
        """
        with self.reserved():
            if self._unfinished:
                raise UserError("an earlier call on this cache ended in an error; start a new one.")
            yield
            self._unfinished = True
            for layer in self.layers:
                layer.open_to = threading.get_ident()  # type: ignore[union-attr]
            self._using.acquire()

    def let_out(self, *, sound: bool) -> None:
        """End a forward call; one that is not sound has left the cache half changed."""
        for layer in self.layers:
            layer.open_to = None  # type: ignore[union-attr]
        self._unfinished = not sound
        self._using.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """Copy the entries, for another answer to the same text.

        Raises:
            UserError: if a call of another thread is in, or the entries have gradients.
        """
        if self.kept_gradients():
            raise UserError(
                "a cache whose entries have gradients cannot be copied: call the model under "
                "torch.no_grad()."
            )
        copied = CompressedCache(self.owner)
        with self.reserved():
            copied.begin(copy.deepcopy(self.session, memo), self.width, self._noted)
            copied.turns, copied._unfinished = self.turns, self._unfinished
            for layer, own in zip(copied.layers, self.layers, strict=True):
                layer.seen = own.get_seq_length()  # type: ignore[union-attr]
            copied._ids = None if self._ids is None else list(self._ids)
        return copied

    def __reduce_ex__(self, _: Any) -> NoReturn:
        self._refuse("pickled, or copied in part; copy.deepcopy copies all of it, inside its block")

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
        self.open_to: int | None = None
        """The thread that may pass once."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.open_to != threading.get_ident():
            raise UserError(ELSEWHERE)
        self.open_to = None
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
