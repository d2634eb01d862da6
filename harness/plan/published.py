"""A card's speed from its published figures, and what share of them is assumed to be reached."""

from __future__ import annotations

from dataclasses import dataclass

from baselines.fold import Fold
from harness.plan.cards import Card
from harness.plan.sizes import Sizes
from harness.plan.speed import Batch
from kvmerge.cells import Cell
from kvmerge.method import Method

_SHARES = {
    "Full": 0.0,
    "KVMerger": 0.046,
    "HeavyHitters": 0.009,
    "SinkCaM": 0.016,
    "SnapKV": 0.025,
    "AdaSnapKV": 0.016,
    "ChunkKV": 0.034,
    "KeyNorm": 0.010,
    "KeyDiff": 0.012,
    "LagKV": 0.044,
    "ExpectedAttention": 0.051,
    "AdjacentMerge": 0.036,
    "D2O": 0.064,
    "LookM": 0.064,
    "ZSMerge": 0.15,
    "KeepKV": 0.20,
    "Replay": 0.50,
    "AttentionMatching": 0.96,
    "Fold, route=position": 0.021,  # computed of a measured 3.2%, before it was made faster
    "Fold, route=cosine": 0.075,
    "Fold, route=attention": 0.32,
    "Fold, refit=values": 0.29,
    "Fold, refit=bias": 0.21,
    "Fold, refit=both": 0.40,  # computed: the time of either, one after the other
    # not measured: what it does before it merges
    "PivotOnly": 0.046,
    # not measured: no more work than that of key norms
    **dict.fromkeys(("MeanpoolChunks", "Random", "StreamingLLM", "TOVA"), 0.010),
}
"""Compression as a share of the prefill of 4,096 tokens that it is part of, on a CPU
(docs/performance.md), by the class of a method or one that it derives from. It does not stand in these
classes: records are held to the code of their method, which a new figure here must not change."""


def share(method: Method) -> float | None:
    """Return the share of a prefill that a method's compression is; None where nothing is known."""
    names = [kind.__name__ for kind in type(method).__mro__]
    if isinstance(method, Fold):
        fitted = method.refit != "none"
        names = [f"Fold, refit={method.refit}" if fitted else f"Fold, route={method.route}"]
    return next((_SHARES[name] for name in names if name in _SHARES), None)


@dataclass(frozen=True)
class Assumed:
    """How well a run uses a card. None of it was measured on one."""

    products: float
    """Share of the peak operations in matrix products of a prompt, attention included."""
    bandwidth: float
    """Share of the memory bandwidth in decoding."""
    launch: float
    """Seconds between two kernels of a decode step, which Python starts one by one."""
    compression: float
    """Share of a prefill that a method takes of which nothing is known."""
    starting: float
    """Seconds of a run before it reads weights."""
    disk: float
    """Bytes of weights a second that are read from it."""


GOOD = Assumed(0.6, 0.8, launch=4e-6, compression=0.01, starting=10, disk=2e9)
FAIR = Assumed(0.45, 0.6, launch=7e-6, compression=0.05, starting=20, disk=1e9)
POOR = Assumed(0.3, 0.4, launch=10e-6, compression=0.2, starting=40, disk=0.5e9)

_KERNELS_A_LAYER, _KERNELS_A_GROUP = 35, 10
"""Kernels of a decode step in one layer, and for each group of rows that attends by itself: counted in
the code of transformers' Llama and of the engine, roughly."""


@dataclass(frozen=True)
class PublishedSpeed:
    """A card with a model (see `harness.plan.speed.Speed`)."""

    card: Card
    sizes: Sizes
    dtype: str
    assumed: Assumed

    @property
    def loading(self) -> float:
        """Seconds until the first prefill."""
        return self.assumed.starting + self.sizes.weight_bytes / self.assumed.disk

    def prefill(self, tokens: int) -> float:
        """Count 2 operations a weight and token, and those of causal attention.

        Queries times keys, the weighted sum of values, and queries times keys once more for the column
        sums, each of half the `tokens x tokens` map.
        """
        sizes = self.sizes
        attention = 3 * tokens**2 * sizes.heads * sizes.head_dim * sizes.layers
        return self._products(2 * sizes.parameters * tokens + attention)

    def compress(self, cell: Cell, tokens: int) -> float:
        """Take a share of a prefill that is nothing but the model's and this."""
        known = share(cell.method)
        part = self.assumed.compression if known is None else known
        return part / (1 - part) * self.prefill(tokens)

    def store(self, entries: float) -> float:
        """Read and write every entry once."""
        return 2 * entries * self.sizes.entry_bytes / self._bandwidth

    def step(self, batch: Batch) -> float:
        """Take the longest of reading weights and caches, computing, and starting kernels."""
        return self.replay(batch, 1)

    def replay(self, batch: Batch, width: float) -> float:
        """Do as in a step, which feeds one token."""
        sizes = self.sizes
        bytes_read = sizes.weight_bytes + batch.entries * sizes.entry_bytes
        attention = 4 * batch.entries * sizes.heads * sizes.head_dim * sizes.layers
        operations = width * (2 * sizes.parameters * batch.rows + attention)
        kernels = sizes.layers * (_KERNELS_A_LAYER + _KERNELS_A_GROUP * batch.groups)
        return max(
            bytes_read / self._bandwidth, self._products(operations), kernels * self.assumed.launch
        )

    @property
    def _bandwidth(self) -> float:
        return self.card.bandwidth_gb_s * 1e9 * self.assumed.bandwidth

    def _products(self, operations: float) -> float:
        return operations / (self.card.tflops[self.dtype] * 1e12 * self.assumed.products)
