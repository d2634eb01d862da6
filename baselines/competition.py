"""How competitors, the heads of a layer or the layers of a model, divide entries among themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def won(scores: Tensor, mean: int) -> Tensor:
    """Count each competitor's tokens among the best of all.

    Ties go to the better rank within a competitor, then to the lower competitor.

    Args:
        scores: `(batch, competitors, n)`.
        mean: entries of a competitor on the mean, at most `n`.

    Returns:
        `(batch, competitors)` float32, which add up to `competitors mean`.
    """
    batch, competitors, _ = scores.shape
    by_rank = scores.sort(dim=-1, descending=True).values.transpose(1, 2).flatten(1)
    best = by_rank.sort(dim=-1, descending=True, stable=True).indices[:, : competitors * mean]
    counts = torch.zeros(batch, competitors, device=scores.device)
    return counts.scatter_add_(-1, best % competitors, torch.ones_like(best, dtype=counts.dtype))


def whole(shares: Tensor, total: int) -> Tensor:
    """Round shares to whole numbers that add up to a total.

    The largest remainders are rounded up; of equal ones the lower competitor's.

    Args:
        shares: `(batch, competitors)` float64, not negative, which add up to `total`.
        total: a whole number.

    Returns:
        `(batch, competitors)` int64.
    """
    rounded = (shares + 1e-9).floor()
    missing = total - rounded.sum(dim=-1, keepdim=True)
    order = (shares - rounded).sort(dim=-1, descending=True, stable=True).indices
    return (rounded + (order.argsort(dim=-1) < missing)).long()
