"""The cache of a batch: prompts compressed as their layers finish, then decoded row by row.

A *prompt* is one sequence of the prefill batch; a *row* is one cell that decodes it. The comparison of
many cells on one prompt, one method on a padded batch of prompts, and everything between are the same
code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.attention import prefill_attention
from kvmerge.budget import Budget
from kvmerge.cache import Hold, LayerCache
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all
from kvmerge.scores import column_sums

DECODE_POLICIES = ("append", "hold")


@dataclass(frozen=True)
class Row:
    """One row of the batch: a method at a budget, with a seed."""

    method: Method
    budget: Budget
    seed: int = 0
    decode_policy: str = "append"
    """`append`: generated tokens are stored beside the compressed prompt. `hold`: after each step the
    method returns the stored length to its allowance, by its own rule."""
    prompt: int = 0
    """Which sequence of the prefill batch the row decodes."""

    def __post_init__(self) -> None:
        if self.decode_policy not in DECODE_POLICIES:
            raise unknown("decode_policy", self.decode_policy, DECODE_POLICIES)

    @property
    def acts_on_decode(self) -> bool:
        """Whether the method decides again after each decode step."""
        return self.method.acts_on_decode or (self.decode_policy == "hold" and self.method.holds)


@dataclass
class RowStats:
    """What a row keeps of the prompt, measured on the tensors."""

    entries: list[list[int]] = field(default_factory=list)
    """Entries kept, by layer and KV head."""
    kv_bytes: int = 0
    """Bytes of the keys and values of those entries."""
    size_bytes: int = 0
    """Bytes of what is stored beside them (set sizes, logit biases)."""

    def add_layer(self, kept: Entries) -> None:
        """Count one more layer."""
        _, kv_heads, length, head_dim = kept.keys.shape
        counts = [length] * kv_heads
        if kept.sizes is not None:
            counts = (kept.sizes[0] > 0).sum(-1).tolist()
            self.size_bytes += sum(counts) * kept.sizes.element_size()
        if kept.bias is not None:
            self.size_bytes += sum(counts) * kept.bias.element_size()
        self.entries.append(counts)
        per_entry = head_dim * (kept.keys.element_size() + kept.values.element_size())
        self.kv_bytes += sum(counts) * per_entry


Observer = Callable[[int, int, PrefillLayer, Entries], None]
"""Called with (row, layer index, layer, what the row kept) as each layer is compressed."""


class CacheSession:
    """Holds every row's cache between the forward passes of a hooked model."""

    def __init__(
        self,
        rows: Sequence[Row],
        num_layers: int,
        sample_ids: Sequence[str] = ("",),
        observer: Observer | None = None,
    ) -> None:
        """Prepare rows.

        Args:
            rows: the cells, each naming the prompt it decodes.
            num_layers: layers of the model.
            sample_ids: one a prompt; seeds the methods that draw.
            observer: called with every compressed layer.
        """
        self.rows = list(rows)
        self.num_layers = num_layers
        self.sample_ids = list(sample_ids)
        self.observer = observer
        self.stats = [RowStats() for _ in rows]
        self.layers: list[LayerCache] = []
        self.order = list(range(len(self.rows)))
        """Rows that take part in the next forward pass, in batch order."""
        self.lengths: list[int] = []
        self.capacity = 0

    def begin(self, lengths: Sequence[int], capacity: int) -> None:
        """Announce the prefill.

        Args:
            lengths: real tokens of each prompt; shorter ones are padded on the left.
            capacity: new entries that each row has room for before its buffer must grow.
        """
        self.lengths, self.capacity = list(lengths), capacity

    def attend(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attention of one layer, called by the model (see `kvmerge.attention.Session`)."""
        if layer_idx < len(self.layers):
            return self.layers[layer_idx].attend(self.order, queries, keys, values, scale)
        out = torch.zeros_like(queries)
        compressed: dict[int, Entries] = {}
        for prompt, length in enumerate(self.lengths):
            real = (slice(prompt, prompt + 1), slice(None), slice(queries.shape[2] - length, None))
            q, k, v = queries[real], keys[real], values[real]
            rows = [index for index, row in enumerate(self.rows) if row.prompt == prompt]
            out[real], lse = prefill_attention(q, k, v, scale)
            layer = PrefillLayer(
                queries=q,
                keys=k,
                values=v,
                scores=column_sums(q, k, lse, scale=scale) if self._wants_scores(rows) else None,
                layer_idx=layer_idx,
                num_layers=self.num_layers,
                scale=scale,
            )
            check_finite(layer)
            for index in rows:
                compressed[index] = self._compress(index, layer)
        self.layers.append(
            LayerCache(
                [compressed[index] for index in range(len(self.rows))],
                self.capacity,
                [self._hold_rule(row, layer_idx) for row in self.rows],
                [self.lengths[row.prompt] for row in self.rows],
            )
        )
        return out

    def retire(self, row: int) -> None:
        """Take a finished row out of the next forward passes."""
        self.order.remove(row)
        for layer in self.layers:
            layer.retire(row)

    def rewind(self) -> None:
        """Return every row to its state after prefill."""
        self.order = list(range(len(self.rows)))
        for layer in self.layers:
            layer.rewind()

    def _wants_scores(self, rows: Sequence[int]) -> bool:
        """Whether a method of these rows will look at the scores; the full cache alone needs none."""
        return any(
            row.method.needs_scores and (row.acts_on_decode or row.budget.entries(length) < length)
            for row, length in ((self.rows[i], self.lengths[self.rows[i].prompt]) for i in rows)
        )

    def _compress(self, index: int, layer: PrefillLayer) -> Entries:
        row = self.rows[index]
        allowance = self._allowance(row, layer.layer_idx)
        if allowance.n_keep >= layer.length and not row.method.acts_on_decode:
            kept = keep_all(layer)
        else:
            kept = row.method.compress(layer, allowance)
        self.stats[index].add_layer(kept)
        if self.observer is not None:
            self.observer(index, layer.layer_idx, layer, kept)
        return kept

    def _allowance(self, row: Row, layer_idx: int, step: int | None = None) -> Allowance:
        length, generator = self.lengths[row.prompt], None
        if row.method.stochastic:
            sample_id = self.sample_ids[row.prompt]
            generator = seeded_generator(row.seed, sample_id, layer_idx, step)
        return Allowance(row.budget.entries(length), row.budget.fraction(length), generator)

    def _hold_rule(self, row: Row, layer_idx: int) -> Hold | None:
        if not row.acts_on_decode:
            return None

        def hold(entries: Entries, weights: Tensor, step: int) -> Entries:
            allowance = self._allowance(row, layer_idx, step)
            length = self.lengths[row.prompt]
            return row.method.hold(entries, DecodeStep(weights, length, step, allowance))

        return hold


def seeded_generator(
    seed: int, sample_id: str, layer_idx: int, step: int | None = None
) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments, on any machine.

    `step` is None for the prefill, and counts the decode steps of methods that draw there.
    """
    parts = [seed, sample_id, layer_idx, *([] if step is None else [step])]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_sliding_window(model: PreTrainedModel, prompt: int, answer: int) -> None:
    """Refuse what does not fit a model's sliding window, which this engine does not apply."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return
    if prompt + answer > window:
        raise UserError(
            f"{config.model_type} attends only within a sliding window of {window} tokens; the prompt "
            f"has {prompt} and the answer up to {answer}. Shorten the prompt (model.max_length) or "
            "choose a model without a sliding window."
        )


def check_finite(layer: PrefillLayer) -> None:
    """Refuse keys, values or scores that are not finite, naming the layer and the KV head."""
    for name, tensor in (("keys", layer.keys), ("values", layer.values), ("scores", layer.scores)):
        if tensor is None or bool(tensor.sum().isfinite()):
            continue
        bad = ~tensor.isfinite().flatten(2).all(dim=-1)[0]
        if bool(bad.any()):
            raise UserError(
                f"{name} of layer {layer.layer_idx}, KV head {int(bad.nonzero()[0])} are not finite; "
                "the model overflows in this dtype. Try model.dtype=float32 or bfloat16."
            )
