"""What a `with compressed(...) as c` block says of itself: a line a generation, and what was kept.

Statistics are numbers: a block that serves for days grows by a few kilobytes a generation, and
`c.generations.clear()` forgets them. What was kept is read from the generation's own cache, while that
lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmerge.compressed_cache import CompressedCache
from kvmerge.errors import UserError
from kvmerge.method import Entries
from kvmerge.session import CacheSession

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "generation",
    "turn",
    "row",
    "compressed",
    "prompt_tokens",
    "appended_tokens",
    "decode_steps",
    "kept_entries",
    "budget_achieved",
    "kv_bytes",
    "size_bytes",
    "kv_bytes_full",
)
"""Of `Compression.summary`; a record (`harness.records.Record`) calls the figures the same."""
LAYER_COLUMNS = (
    "generation",
    "row",
    "layer",
    "kept_entries",
    "kept_entries_min",
    "kept_entries_max",
    "kv_bytes",
    "size_bytes",
)
"""Of `Compression.summary(by_layer=True)`."""


@dataclass(frozen=True)
class KeptRow:
    """What one row of a batch kept of its prompt."""

    prompt_tokens: int
    """Tokens that were compressed: of the prompt, padding left out."""
    layers: Sequence[int]
    """The model's numbers of the layers that the budget counts: not those with a window."""
    entries: Sequence[Sequence[int]]
    """Entries kept, by these layers and KV head."""
    kept_entries: float
    """The same, the mean over layers and KV heads."""
    kv_bytes: int
    """Bytes of the keys and values of those entries, and of what windows keep."""
    size_bytes: int
    """Bytes of what is stored beside them (set sizes, logit biases)."""
    kv_bytes_full: int
    """Bytes of keys and values that the full cache of this prompt has."""
    layer_kv_bytes: Sequence[int]
    """Bytes of keys and values by these layers."""
    layer_size_bytes: Sequence[int]
    """Bytes of what is stored beside them, by these layers."""

    @property
    def budget_achieved(self) -> float:
        """Entries kept as a fraction of the prompt's tokens."""
        return self.kept_entries / self.prompt_tokens


def kept_rows(session: CacheSession) -> tuple[KeptRow, ...]:
    """Return what each row of a session has kept, its prefill being over."""
    layers = [index for index, window in enumerate(session.windows) if window is None]
    return tuple(
        KeptRow(
            length,
            layers,
            stats.entries,
            stats.kept_entries,
            stats.kv_bytes + stats.local_bytes,
            stats.size_bytes,
            stats.full_bytes(length),
            stats.layer_kv_bytes,
            stats.layer_size_bytes,
        )
        for stats, length in zip(session.stats, session.lengths, strict=True)
    )


@dataclass
class Generation:
    """A prompt, or a batch of them, and what followed; or a further turn on the same cache."""

    turn: int
    """1 for a new prompt; each `generate` call with its cache is one more, and the first call of any
    kind with a copy of it."""
    compressed: bool
    """Whether this turn compressed a text. False: its tokens were appended to what an earlier turn
    compressed."""
    rows: tuple[KeptRow, ...]
    """By row of the batch, what was kept when its cache was compressed last."""
    cache: weakref.ref[CompressedCache] = field(repr=False)
    """The cache, or None when it is gone."""
    appended_tokens: int = 0
    """Tokens fed since the cache was compressed, in this turn and those before: not compressed. Under
    `decode_policy=hold` the method may have dropped some."""
    decode_steps: int = 0
    """Forward passes after the turn's first."""

    def kept(self, layer: int, row: int = 0) -> Entries:
        """Return what one layer kept of a row's prompt.

        Keys and values are the cache's own, not copies: clone them to change them, or to keep them
        without the rest of the cache.

        Args:
            layer: the model's number of the layer; negative ones count from the end.
            row: of the batch.

        Returns:
            entries of batch 1: keys and values `(1, kv_heads, n, head_dim)` after RoPE, positions
            `(1, kv_heads, n)`, sizes and biases of that shape, or None where the method has none. Where
            KV heads keep different numbers, entries of size 0 are padding.

        Raises:
            UserError: if the cache is gone, or holds another text by now; and for a layer or a row that
                is none.
        """
        cache = self.cache()
        if cache is None or cache.generation is None or cache.generation.rows is not self.rows:
            raise UserError(
                "what this generation kept is gone with its cache. Hold on to the cache that generate "
                "returns (return_dict_in_generate=True), or use compressed(..., keep=True), which "
                "holds the last one."
            )
        if not 0 <= row < len(self.rows):
            raise UserError(f"row {row} is none: the batch has {len(self.rows)} rows, counted from 0.")
        layers, count = self.rows[row].layers, cache.session.num_layers
        layer_idx = layer % count if -count <= layer < count else layer
        if layer_idx not in layers:
            shown = ", ".join(map(str, layers))
            raise UserError(f"layer {layer} is none that is compressed; these are: {shown}.")
        return cache.kept(layer_idx, row)


class Compression:
    """What a `with compressed(...) as c` block has compressed; read it inside or afterwards."""

    def __init__(self, *, keep: bool = False) -> None:
        """Begin without a generation.

        Args:
            keep: hold the cache of the last generation, so that `kept` works without it.
        """
        self.generations: list[Generation] = []
        """In the order in which their first forward passes ended, of all threads."""
        self._keep = keep
        self._held: CompressedCache | None = None

    @property
    def last(self) -> Generation:
        """The generation that began last.

        Raises:
            UserError: if there is none.
        """
        if not self.generations:
            raise UserError("nothing has been compressed: no prompt has gone through the model yet.")
        return self.generations[-1]

    def add(self, generation: Generation) -> None:
        """Take a generation that has begun; the block calls it."""
        self.generations.append(generation)
        if self._keep:
            self._held = generation.cache()

    def summary(self, *, by_layer: bool = False) -> pd.DataFrame:
        """Return the statistics as a table.

        Args:
            by_layer: of each layer that the budget counts, rather than of the whole cache.

        Returns:
            a line a generation and row, with `COLUMNS`; or a line a generation, row and layer, with
            `LAYER_COLUMNS`. `generation` counts from 0.
        """
        import pandas as pd  # late: a block that nobody asks for a table needs none of it

        lines = [
            {"generation": number, "row": index, **line}
            for number, generation in enumerate(self.generations)
            for index, row in enumerate(generation.rows)
            for line in (_by_layer(row) if by_layer else [_overall(generation, row)])
        ]
        return pd.DataFrame(lines, columns=list(LAYER_COLUMNS if by_layer else COLUMNS))

    def __str__(self) -> str:
        """Return the table as text."""
        if not self.generations:
            return "nothing was compressed"
        return self.summary().to_string(index=False, float_format="{:.4g}".format)


def _overall(generation: Generation, row: KeptRow) -> dict[str, object]:
    of_turn = ("turn", "compressed", "appended_tokens", "decode_steps")
    of_row = (
        "prompt_tokens", "kept_entries", "budget_achieved", "kv_bytes", "size_bytes", "kv_bytes_full"
    )  # fmt: skip
    return {name: getattr(generation, name) for name in of_turn} | {
        name: getattr(row, name) for name in of_row
    }


def _by_layer(row: KeptRow) -> list[dict[str, object]]:
    by_layer = zip(row.layers, row.entries, row.layer_kv_bytes, row.layer_size_bytes, strict=True)
    return [
        {
            "layer": layer,
            "kept_entries": sum(counts) / len(counts),
            "kept_entries_min": min(counts),
            "kept_entries_max": max(counts),
            "kv_bytes": kv_bytes,
            "size_bytes": size_bytes,
        }
        for layer, counts, kv_bytes, size_bytes in by_layer
    ]
