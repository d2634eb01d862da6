"""What KVMerger's paper observes of keys and values, measured on a model's prefill (arXiv 2407.08454).

The paper motivates merging by what it sees in the cache: neighbouring keys are alike, their likeness is
local, a threshold compresses every text by the same share, and attention is flat in a few layers. Each
is measured here on finished layers, as every method is handed them, without ever holding a map of all
tokens by all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from kvmerge import merging
from kvmerge.budget import Budget
from kvmerge.errors import UserError, unknown
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance, Entries, Method, PrefillLayer, tail
from kvmerge.rope import Rope
from kvmerge.schema import Within
from kvmerge.scores import column_sums
from kvmerge.softmax import Softmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("keys", "keys_before_rope", "values")
"""States whose cosines are measured."""
RULES = tuple(rule for rule in merging.SIGMA_RULES if rule != "inf")
"""Rules that give a set a sigma of its own."""
SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Largest sizes of the classes that sets are counted in; one more class is of all larger ones."""
QUARTILES = (0.25, 0.5, 0.75)
MAP_SIDE = 256
"""Most squares along a side of a map: a longer text is averaged in blocks of tokens."""
_ROWS = 64
"""Rows of the attention map that are alive at once."""
_FLOOR = 1e-8
"""Least norm that a state is divided by, as in `merging.cosine`."""


@dataclass(frozen=True)
class Measures:
    """What is measured of each layer."""

    distances: Sequence[Annotated[int, Within(1)]] = (
        *(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    )
    """Tokens between the two states of a pair; every pair of the prompt at that distance counts."""
    thresholds: Sequence[float] = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    """Cosines at which keys are merged for the compression ratio."""
    epsilon: float = KVMerger.epsilon
    """Threshold of the sets whose sizes, distances and sigmas are measured."""
    linkage: str | None = None
    """How sets are found; None: KVMerger's own default."""
    protect: float | None = None
    """None: every token may be merged. A budget: KVMerger's recent and top tokens at it stay alone."""
    entropy_rows: Annotated[int, Within(1)] = 128
    """Most rows of the attention map whose entropy is taken, evenly spread over the prompt."""

    def __post_init__(self) -> None:
        for name in ("distances", "thresholds"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise UserError(
                    f"{name}={list(values)} must be a list of rising numbers, at least one."
                )
        for name, values in (("thresholds", self.thresholds), ("epsilon", [self.epsilon])):
            if not all(-1 <= value <= 1 for value in values):
                raise UserError(f"{name}={list(values)}: a cosine lies between -1 and 1.")
        if self.linkage is not None and self.linkage not in merging.LINKAGES:
            raise unknown("linkage", self.linkage, merging.LINKAGES)
        if self.protect is not None:
            try:
                Budget.parse(self.protect)
            except UserError as error:
                raise UserError(f"protect={self.protect} is no budget: {error}") from error

    @property
    def merger(self) -> KVMerger:
        """The method whose rules of protection and linkage hold."""
        return KVMerger() if self.linkage is None else KVMerger(linkage=self.linkage)

    def protected(self, scores: Tensor) -> Tensor:
        """Return which tokens stay alone: `(batch, kv_heads, T)` bool, for scores of that shape.

        Raises:
            UserError: if the prompt is too short for what KVMerger protects.
        """
        if self.protect is None:
            return torch.zeros_like(scores, dtype=torch.bool)
        length, budget = scores.shape[-1], Budget.parse(self.protect)
        allowance = Allowance(budget.entries(length), budget.fraction(length))
        return self.merger.protected(scores, length, allowance)


@dataclass(frozen=True)
class LayerObservation:
    """What was measured of one layer."""

    layer_idx: int
    cosine: Mapping[str, Tensor]
    """By kind (`KINDS`), `(kv_heads, distances)`: the mean over all pairs; NaN where there is none.
    Without `keys_before_rope` where the model's rotation cannot be undone."""
    ratio: Tensor
    """`(kv_heads, thresholds)` sets that a threshold leaves, as a share of the prompt's tokens."""
    sizes: list[int]
    """Sets of each class of `SIZES`, over all KV heads."""
    distance: list[float] | None
    """Quartiles of the distance of a merged key to its set's pivot; None where nothing is merged."""
    sigma: Mapping[str, list[float] | None]
    """By rule, quartiles over the sets of two or more tokens."""
    entropy: Tensor
    """`(heads,)` nats, the mean over rows; NaN for a prompt of one token."""
    flatness: Tensor
    """`(heads,)` mean of each row's entropy over its largest, the log of the tokens it sees: 0 to 1."""


@dataclass(frozen=True)
class Maps:
    """Which maps of cosines between all keys after RoPE are made, and those that were."""

    layers: Sequence[int]
    heads: Sequence[int]
    drawn: dict[int, Tensor] = field(default_factory=dict)
    """By layer, `(heads, n, n)`."""

    def add(self, layer: PrefillLayer) -> None:
        """Draw the maps of a layer, if it is one of those chosen."""
        if layer.layer_idx in self.layers:
            chosen = [cosine_map(layer.keys[0, head]) for head in self.heads]
            self.drawn[layer.layer_idx] = torch.stack(chosen)


@dataclass(frozen=True)
class _Watched(Method):
    """Asks the engine for what is measured, and keeps the last token, so that a layer is freed."""

    needs_rope: bool = False  # type: ignore[misc]
    needs_scores = True

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        return tail(layer, 1)


def has_fixed_rotation(model: PreTrainedModel) -> bool:
    """Return whether a model's keys can be turned back to before RoPE."""
    try:
        Rope.of(model)
    except UserError:
        return False
    return True


def observe(
    model: PreTrainedModel,
    input_ids: Tensor,
    measures: Measures,
    *,
    context: int | None = None,
    may_overrun: bool = False,
    maps: Maps | None = None,
) -> list[LayerObservation]:
    """Measure a prompt's layers, one after the other, as its prefill finishes them.

    Args:
        model: any supported decoder; its attention implementation is replaced for the call.
        input_ids: `(1, T)`.
        measures: what is measured.
        context: positions that the prompt may take; None: the model's own.
        may_overrun: whether it may take more.
        maps: gets the maps that it names.

    Returns:
        an observation for each layer but those that are left to a window of their own.

    Raises:
        UserError: if the model cannot hold the prompt.
    """
    found: list[LayerObservation] = []

    def watch(row: int, layer_idx: int, layer: PrefillLayer, kept: Entries) -> None:
        found.append(observe_layer(layer, measures))
        if maps is not None:
            maps.add(layer)

    # As little as there is: all layers but local ones go through the method.
    # Late: who reads observations runs no model, and transformers takes seconds and 100 MiB.
    from kvmerge.engine import Request, Stop, run_samples
    from kvmerge.session import Row

    row = Row(_Watched(has_fixed_rotation(model)), Budget.parse(1e-9))
    request = Request(input_ids, [row], observer=watch, context=context, may_overrun=may_overrun)
    run_samples(model, [request], Stop(1, frozenset()))  # its one token comes of the prefill
    return found


def observe_layer(layer: PrefillLayer, measures: Measures) -> LayerObservation:
    """Measure one finished layer, batch 1."""
    states = {"keys": layer.keys, "values": layer.values}
    if layer.rope is not None:
        back = -torch.arange(layer.length, device=layer.keys.device)
        states["keys_before_rope"] = layer.rope.rotate(layer.keys, back)
    scores = layer.scores
    if scores is None:  # a method is not asked about a single token
        scores = column_sums(layer.queries, layer.keys, softmax=layer.softmax)
    protected = measures.protected(scores)

    def sets(threshold: float) -> Tensor:
        return merging.merging_sets(
            layer.keys, protected, threshold=threshold, linkage=measures.merger.linkage
        )

    counts = [sets(threshold)[0, :, -1] + 1 for threshold in measures.thresholds]
    merged = merged_sets(layer.keys, sets(measures.epsilon), scores)
    entropy, flatness = attention_entropy(
        layer.queries[0],
        layer.keys[0],
        spread_rows(layer.length, measures.entropy_rows).to(layer.keys.device),
        layer.softmax,
    )
    return LayerObservation(
        layer.layer_idx,
        {
            kind: cosine_by_distance(states[kind][0], measures.distances)
            for kind in KINDS
            if kind in states
        },
        torch.stack(counts, dim=-1) / layer.length,
        size_classes(merged.sizes),
        quartiles(merged.distances),
        {rule: quartiles(of_sets) for rule, of_sets in merged.sigma.items()},
        entropy.mean(dim=-1),
        flatness.mean(dim=-1),
    )


def units(states: Tensor) -> Tensor:
    """Return states at length 1 along the last axis, float32 or better."""
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    return exact / exact.norm(dim=-1, keepdim=True).clamp_min(_FLOOR)


def cosine_by_distance(states: Tensor, distances: Sequence[int]) -> Tensor:
    """Return the mean cosine of all pairs of tokens that are some distance apart.

    Args:
        states: `(heads, T, head_dim)`.
        distances: tokens from the first of a pair to the second, 1 or more.

    Returns:
        `(heads, distances)`; NaN where the text has no such pair.
    """
    unit = units(states)
    length = unit.shape[1]
    means = [
        (unit[:, : length - distance] * unit[:, distance:]).sum(dim=-1).mean(dim=-1)
        if distance < length
        else unit.new_full(unit.shape[:1], math.nan)
        for distance in distances
    ]
    return torch.stack(means, dim=-1)


def cosine_map(states: Tensor, side: int = MAP_SIDE) -> Tensor:
    """Return the cosines between all tokens of one head, averaged in square blocks of tokens.

    A block's mean cosine is the product of the means of its unit states, so that the whole map need
    not be made.

    Args:
        states: `(T, head_dim)`.
        side: most squares along a side.

    Returns:
        `(n, n)`, a square for each pair of blocks of `ceil(T / side)` tokens.
    """
    block = map_block(states.shape[0], side)
    means = torch.stack([part.mean(dim=0) for part in units(states).split(block)])
    return means @ means.T


def map_block(length: int, side: int = MAP_SIDE) -> int:
    """Return the tokens along a square of a map."""
    return -(-length // side)


def spread_rows(length: int, most: int) -> Tensor:
    """Return up to `most` rows of a map, evenly from the second on: the first has no choice."""
    if length < 2:
        return torch.empty(0, dtype=torch.long)
    return torch.linspace(1, length - 1, min(most, length - 1)).round().long()


def attention_entropy(
    queries: Tensor, keys: Tensor, rows: Tensor, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """Return the entropy of some rows of the causal attention map, and its share of the largest.

    A sink, where a layer has one, takes no part: the distribution is over the tokens.

    Args:
        queries: `(heads, T, head_dim)`, after RoPE.
        keys: `(kv_heads, T, head_dim)`, after RoPE; query head `h` uses KV head `h // G`.
        rows: int64 row indices, 1 or more each.
        softmax: the layer's.

    Returns:
        entropy in nats; entropy over the log of the tokens that the row sees; `(heads, rows)` each.
    """
    columns = torch.arange(keys.shape[1], device=keys.device)
    transposed = keys.float().transpose(1, 2)
    parts = [queries.new_empty(queries.shape[0], 0, dtype=torch.float32)]
    for block in rows.split(_ROWS):
        grouped = queries[:, block].float().unflatten(0, (keys.shape[0], -1))
        products = torch.matmul(grouped, transposed[:, None])
        logits = softmax.logits(products).masked_fill_(columns > block[:, None], -math.inf)
        parts.append(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).flatten(0, 1))
    entropy = torch.cat(parts, dim=-1)
    return entropy, entropy / (rows + 1).to(entropy.dtype).log()


@dataclass(frozen=True)
class MergedSets:
    """The merging sets of a layer, as flat lists over its KV heads."""

    sizes: Tensor
    """`(sets,)` int64 tokens of each, singletons included."""
    distances: Tensor
    """`(members,)` distance of each merged key to its set's pivot, the pivots themselves left out."""
    sigma: Mapping[str, Tensor]
    """By rule (`RULES`), the width that it gives each set of two or more tokens."""


def merged_sets(keys: Tensor, set_ids: Tensor, scores: Tensor) -> MergedSets:
    """Measure merging sets around their pivots, the members with the largest scores.

    Args:
        keys: `(batch, kv_heads, T, head_dim)`.
        set_ids: `(batch, kv_heads, T)` as `merging.merging_sets` returns them, nothing evicted.
        scores: `(batch, kv_heads, T)`.
    """
    sizes, pivots, _ = merging.set_summary(set_ids, scores)
    distance = merging.pivot_distances(keys.double(), set_ids, pivots)
    member = torch.arange(set_ids.shape[-1], device=keys.device) != pivots.gather(-1, set_ids)
    widths = {rule: merging.set_widths(distance, set_ids, rule) for rule in RULES}
    return MergedSets(
        sizes[sizes > 0],  # heads have fewer sets than the longest
        distance[member],
        {rule: of.gather(-1, pivots.clamp_min(0))[sizes > 1] for rule, of in widths.items()},
    )


def size_classes(sizes: Tensor) -> list[int]:
    """Count sets by the classes of `SIZES`."""
    bounds = torch.tensor(SIZES, device=sizes.device)
    classes = torch.bucketize(sizes, bounds)
    return [int(count) for count in torch.bincount(classes, minlength=len(SIZES) + 1)]


def quartiles(values: Tensor) -> list[float] | None:
    """Return the quartiles of some values; None if there are none."""
    if not values.numel():
        return None
    at = torch.tensor(QUARTILES, dtype=values.dtype, device=values.device)
    ranks = at * (values.numel() - 1)
    ordered = values.sort().values  # torch.quantile refuses more than 16 million
    low, high = ordered[ranks.floor().long()], ordered[ranks.ceil().long()]
    return [float(value) for value in low + (high - low) * (ranks - ranks.floor())]
