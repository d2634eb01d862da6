"""Fit what is stored to the attention of some queries: logit biases, then values.

The queries are the prompt's own last ones, whose output on the full layer is known. Both fits are drawn
towards what they begin with, so that what the queries say nothing of stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmerge.method import PrefillLayer
from kvmerge.scores import products

STEPS = 100
"""Accelerated gradient steps of the non-negative fit."""
LEAST = 1e-4
"""Smallest factor on an entry's attention that a bias may stand for."""


@dataclass(frozen=True)
class Reference:
    """The last queries of a finished layer, and what they saw."""

    layer: PrefillLayer
    begin: int
    """First row."""
    total: Tensor
    """`(batch, kv_heads, G, rows, 1)` float32 log of the sum of exp(logits) of each row."""
    output: Tensor
    """`(batch, kv_heads, G, rows, head_dim)` float32 output of attention over the full layer."""

    @classmethod
    def of(cls, layer: PrefillLayer, rows: int) -> Reference:
        """Take the last `rows` queries of a layer, or all where there are fewer."""
        begin = max(0, layer.length - rows)
        tokens = torch.arange(layer.length, device=layer.keys.device)
        logits = _logits(layer, layer.keys, tokens.expand(*layer.keys.shape[:3]), begin)
        weights = layer.softmax.weights(logits)
        output = weights @ layer.values.float().unsqueeze(2)
        return cls(layer, begin, logits.logsumexp(dim=-1, keepdim=True), output)

    def logits(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of keys `(batch, kv_heads, n, head_dim)`: `(batch, kv_heads, G, rows, n)`.

        Those at positions `(batch, kv_heads, n)` after a query are hidden from it.
        """
        return _logits(self.layer, keys, positions, self.begin)

    def fitted_bias(self, keys: Tensor, positions: Tensor, bias: Tensor, ridge: float) -> Tensor:
        """Return biases with which the entries receive the attention mass of the full layer.

        Args:
            keys: `(batch, kv_heads, n, head_dim)`.
            positions: `(batch, kv_heads, n)`.
            bias: `(batch, kv_heads, n)`, what the fit begins with and is drawn to.
            ridge: how strongly, as a fraction of an entry's mean squared share.

        Returns:
            `(batch, kv_heads, n)` float32, the log of non-negative factors.
        """
        shares = (self.logits(keys, positions) - self.total).exp().flatten(2, 3)
        return nonnegative_fit(shares, bias.exp(), ridge).clamp_min(LEAST).log()

    def fitted_values(
        self, keys: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None, ridge: float
    ) -> Tensor:
        """Return values whose attention output is near the full layer's.

        Args:
            keys: `(batch, kv_heads, n, head_dim)`.
            values: like keys, what the fit begins with and is drawn to.
            positions: `(batch, kv_heads, n)`.
            bias: `(batch, kv_heads, n)` of the entries, or None.
            ridge: how strongly, as a fraction of the queries' mean squared weights.

        Returns:
            `(batch, kv_heads, n, head_dim)` float32.
        """
        logits = self.logits(keys, positions)
        if bias is not None:
            logits = logits + bias[:, :, None, None]
        # a query that sees no entry would give NaN; it says nothing
        weights = self.layer.softmax.weights(logits).nan_to_num().flatten(2, 3)
        missing = self.output.flatten(2, 3) - weights @ values.float()
        return values.float() + ridge_fit(weights, missing, ridge)


def nonnegative_fit(shares: Tensor, start: Tensor, ridge: float) -> Tensor:
    """Return factors `w >= 0` on the columns of `shares` with which each row sums to about 1.

    Minimises `|shares w - 1|^2 + lambda |w - start|^2` by `STEPS` accelerated projected gradient steps,
    with `lambda = ridge` times the mean squared norm of a column.

    Args:
        shares: `(…, rows, n)`, not negative.
        start: `(…, n)`.
        ridge: a positive number.

    Returns:
        `(…, n)`.
    """
    strength = ridge * shares.square().sum(dim=-2).mean(dim=-1, keepdim=True)
    # the squared norm of a matrix is at most its largest row sum times its largest column sum
    curvature = shares.sum(-1).amax(-1, keepdim=True) * shares.sum(-2).amax(-1, keepdim=True) + strength
    step = 1 / curvature.clamp_min(torch.finfo(shares.dtype).tiny)
    factors = ahead = start
    momentum = 1.0
    for _ in range(STEPS):
        missing = (shares @ ahead.unsqueeze(-1)).squeeze(-1) - 1
        slope = (missing.unsqueeze(-2) @ shares).squeeze(-2) + strength * (ahead - start)
        previous, factors = factors, (ahead - step * slope).clamp_min(0)
        last, momentum = momentum, (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = factors + (last - 1) / momentum * (factors - previous)
    return factors


def ridge_fit(weights: Tensor, missing: Tensor, ridge: float) -> Tensor:
    """Return the `x` that minimises `|weights x - missing|^2 + lambda |x|^2`.

    `lambda` is `ridge` times the mean squared norm of a row. Solved by Cholesky, in the smaller of the
    two dimensions, in float64.

    Args:
        weights: `(…, rows, n)`.
        missing: `(…, rows, d)`.
        ridge: a positive number.

    Returns:
        `(…, n, d)` in the dtype of `weights`.
    """
    exact, wanted = weights.double(), missing.double()
    rows, n = weights.shape[-2:]
    turned = exact.transpose(-1, -2)
    gram = exact @ turned if rows <= n else turned @ exact
    strength = ridge * exact.square().sum(-1).mean(-1)[..., None].clamp_min(torch.finfo().tiny)
    gram.diagonal(dim1=-2, dim2=-1).add_(strength)
    factor = torch.linalg.cholesky(gram)
    if rows <= n:
        found = turned @ torch.cholesky_solve(wanted, factor)
    else:
        found = torch.cholesky_solve(turned @ wanted, factor)
    return found.to(weights.dtype)


def _logits(layer: PrefillLayer, keys: Tensor, positions: Tensor, begin: int) -> Tensor:
    rows = torch.arange(begin, layer.length, device=keys.device)
    hidden = positions.unsqueeze(-2) > rows.unsqueeze(-1)
    logits = products(layer.queries[:, :, begin:], keys, layer.softmax)
    return logits.masked_fill_(hidden.unsqueeze(2), float("-inf"))
