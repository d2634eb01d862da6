"""PyramidKV: SnapKV with more entries in the lower layers (arXiv 2406.02069).

Follows `PyramidKVCluster` of the authors' repository (Zefan-Cai/KVCache-Factory at c97f9d7) with the
settings of its LongBench script. The authors' counts fall by a whole number from layer to layer, which
rounds the total up; `exact` takes the surplus away, so that the mean over layers is the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from baselines.snapkv import SnapKV
from kvmerge.errors import UserError
from kvmerge.method import Allowance, PrefillLayer


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Settings of PyramidKV; the defaults are those of the authors' LongBench script."""

    window: int = 8
    """Last tokens, which observe the others and are always kept."""
    beta: int = 20
    """How steep: without a limit the last layer keeps a `beta`-th of the mean beside its window."""
    exact: bool = True
    """Whether the mean over layers is the budget; False keeps the authors' rounding, which exceeds
    it."""

    allocates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.beta) is not int or self.beta < 1:
            raise UserError(f"beta={self.beta} must be a whole number, 1 or more.")

    @property
    def meets_budget(self) -> bool:  # type: ignore[override]
        """The authors' rounding exceeds it."""
        return self.exact

    def allocate(self, layers: Sequence[PrefillLayer], allowance: Allowance) -> list[int]:
        """Return the entries per KV head for each layer."""
        return layer_counts(
            allowance.n_keep,
            layers[0].length,
            len(layers),
            window=self.window,
            beta=self.beta,
            exact=self.exact,
        )

    def window_for(self, n_keep: int) -> int:
        """Return the window of a layer: the whole layer may be no more than that."""
        return self.window if self.window <= n_keep else super().window_for(n_keep)


def layer_counts(
    n_keep: int, length: int, layers: int, *, window: int, beta: int, exact: bool
) -> list[int]:
    """Return the entries of each layer, falling linearly from the first to the last.

    Args:
        n_keep: mean entries of a layer, window included.
        length: prompt tokens.
        layers: layers of the model.
        window: entries that every layer keeps. Without room beside it all layers keep the same.
        beta: the last layer keeps `(n_keep - window) // beta` beside its window, unless the first
            would then exceed the prompt.
        exact: take the surplus of the authors' rounding away, one entry at a time from the layer that
            has most (of equal ones the last, so that the counts never rise).
    """
    past = n_keep - window
    if layers == 1 or past <= 0 or length < 2 * past:
        return [n_keep] * layers
    least = past // beta
    most = min(2 * past - least, length - window)
    step = (2 * (most - past)) // (layers - 1)
    counts = [most - layer * step + window for layer in range(layers)]
    if exact:
        for _ in range(sum(counts) - n_keep * layers):
            largest = max(counts)
            counts[layers - 1 - counts[::-1].index(largest)] -= 1
    return counts
