"""The least-squares problems of attention matching, for one KV head (arXiv 2602.16284)."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-6
"""Added to the normal equations where a solution is not finite (the authors' value)."""
_DEPENDENT = 1e-6
"""A column of which no more than this part is left beside those chosen before adds nothing."""


def least_squares(matrix: Tensor, wanted: Tensor) -> Tensor:
    """Return the `x` that minimises `|matrix x - wanted|`, solved in float64.

    Args:
        matrix: `(n, t)`, at least as many rows as columns.
        wanted: `(n, d)`.

    Returns:
        `(t, d)`; where the columns depend on each other, of a problem with a little ridge.
    """
    exact, right = matrix.double(), wanted.double()
    found = torch.linalg.lstsq(exact, right, driver="gels").solution
    if not bool(found.isfinite().all()):
        gram = exact.T @ exact
        gram.diagonal().add_(_RIDGE)
        found = torch.cholesky_solve(exact.T @ right, torch.linalg.cholesky(gram))
    return found.to(matrix.dtype)


def bounded_fit(matrix: Tensor, wanted: Tensor, steps: int, low: float, high: float) -> Tensor:
    """Return factors between `low` and `high` on the columns of a matrix, whose sum is near `wanted`.

    The least-squares solution, clamped, then projected gradient steps whose length is one over the
    squared norm of the matrix, as three power iterations find it.

    Args:
        matrix: `(n, t)`, not negative.
        wanted: `(n,)`.
        steps: gradient steps, 0 or more.
        low: least factor, above 0.
        high: largest factor.

    Returns:
        `(t,)`.
    """
    factors = least_squares(matrix, wanted.unsqueeze(-1)).squeeze(-1).clamp(low, high)
    if steps == 0:
        return factors
    direction = torch.ones_like(factors)
    for _ in range(3):
        direction = matrix.T @ (matrix @ (direction / direction.norm()))
    length = 1 / (matrix @ (direction / direction.norm())).square().sum()
    for _ in range(steps):
        factors = (factors - length * (matrix.T @ (matrix @ factors - wanted))).clamp(low, high)
    return factors


def pursuit(
    matrix: Tensor, wanted: Tensor, count: int, at_once: int, low: float, high: float
) -> Tensor:
    """Choose columns by orthogonal matching pursuit: each explains most of what is still missing.

    What is missing is `wanted` less the chosen columns times their clamped least-squares factors. These
    come from an orthogonal basis that grows with each column, so that a fit costs one multiplication.

    Args:
        matrix: `(n, T)`, not negative.
        wanted: `(n,)`.
        count: columns to choose, at most `n`.
        at_once: columns taken before the factors are fitted anew.
        low: least factor, above 0.
        high: largest factor.

    Returns:
        `(count,)` int64, in the order of choice; of equal columns the lower.
    """
    columns = matrix.new_zeros(len(matrix), count)
    basis = torch.zeros_like(columns, dtype=torch.float64)
    upper = torch.zeros(count, count, dtype=torch.float64, device=matrix.device)
    chosen = torch.zeros(count, dtype=torch.int64, device=matrix.device)
    free = torch.ones(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    missing = wanted
    for size in range(0, count, at_once):
        merit = (missing @ matrix).masked_fill(~free, -torch.inf)
        best = merit.sort(descending=True, stable=True).indices[: min(at_once, count - size)]
        free[best] = False
        for place, column in enumerate(best, start=size):
            chosen[place] = column
            columns[:, place] = matrix[:, column]
            _extend(basis, upper, columns[:, place].double(), place)
        end = size + len(best)
        right = basis[:, :end].T @ wanted.double()
        factors = torch.linalg.solve_triangular(upper[:end, :end], right[:, None], upper=True)
        missing = wanted - columns[:, :end] @ factors[:, 0].to(matrix.dtype).clamp(low, high)
    return chosen


def _extend(basis: Tensor, upper: Tensor, column: Tensor, place: int) -> None:
    """Add a column to a QR decomposition in place; one that depends on the others gets factor 0."""
    rest = column
    for _ in range(2):  # the second time removes what rounding left
        shares = basis[:, :place].T @ rest
        upper[:place, place] += shares
        rest = rest - basis[:, :place] @ shares
    norm = rest.norm()
    if bool(norm <= _DEPENDENT * column.norm()):
        upper[place, place] = 1.0
    else:
        upper[place, place] = norm
        basis[:, place] = rest / norm
