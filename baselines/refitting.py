"""Fit what is stored to the attention of some queries: logit biases, then values.

The queries are the prompt's own last ones, whose output on the full layer is known. Both fits are drawn
towards what they begin with, so that what the queries say nothing of stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmerge.method import PrefillLayer
from kvmerge.scores import logit_blocks, products
from kvmerge.softmax import normalised

STEPS = 100
"""Accelerated gradient steps of the non-negative fit."""
LEAST = 1e-4
"""Smallest factor on an entry's attention that a bias may stand for."""
_BLOCK = 128
"""Rows of a Gram matrix that are multiplied at once."""


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
        total, output = layer.once(("last rows", begin), lambda: _last_rows(layer, begin))
        return cls(layer, begin, total, output)

    def logits(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of keys `(batch, kv_heads, n, head_dim)`: `(batch, kv_heads, G, rows, n)`.

        Those at positions `(batch, kv_heads, n)` after a query are hidden from it.
        """
        layer, begin = self.layer, self.begin
        rows = torch.arange(begin, layer.length, device=keys.device)
        # every row sees what is before the first; positions ascend
        first = int((positions < begin).sum(dim=-1).min())
        hidden = positions[..., None, first:] > rows[:, None]
        logits = products(layer.queries[:, :, begin:], keys, layer.softmax)
        logits[..., first:].masked_fill_(hidden.unsqueeze(2), float("-inf"))
        return logits

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
        shares = self.logits(keys, positions).sub_(self.total).exp_().flatten(2, 3)
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
            logits += bias[:, :, None, None]
        # a query that sees no entry would give NaN; it says nothing
        weights = self.layer.softmax.weights(logits).nan_to_num_().flatten(2, 3)
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
    turned = shares.transpose(-1, -2)
    factors = ahead = start
    momentum = 1.0
    for _ in range(STEPS):
        # rows times matrices: torch multiplies a batch of matrices by columns many times more slowly
        missing = (ahead.unsqueeze(-2) @ turned) - 1
        slope = (missing @ shares).squeeze(-2) + strength * (ahead - start)
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
    gram = _lower_gram(exact if rows <= n else turned)
    norms = gram.diagonal(dim1=-2, dim2=-1)
    strength = ridge * norms.sum(dim=-1, keepdim=True) / rows
    norms.add_(strength.clamp_min(torch.finfo().tiny))
    factor = torch.linalg.cholesky(gram)
    if rows <= n:
        found = turned @ torch.cholesky_solve(wanted, factor)
    else:
        found = torch.cholesky_solve(turned @ wanted, factor)
    return found.to(weights.dtype)


def _lower_gram(states: Tensor) -> Tensor:
    """Return the products of rows `(…, n, d)` with each other, `(…, n, n)`; above the diagonal, some.

    A Cholesky decomposition reads nothing there, and half of the products is half of the time.
    """
    n = states.shape[-2]
    gram = states.new_zeros(*states.shape[:-2], n, n)
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        before = states[..., :end, :].transpose(-1, -2)
        gram[..., begin:end, :end] = states[..., begin:end, :] @ before
    return gram


def _last_rows(layer: PrefillLayer, begin: int) -> tuple[Tensor, Tensor]:
    """Return `total` and `output` of a `Reference`."""
    values, seen = layer.values.float(), []
    for _, logits in logit_blocks(layer.queries, layer.keys, begin, layer.softmax):
        weights, total = normalised(logits)
        weights = layer.softmax.beside_sinks(weights, total)
        output = weights.flatten(2, 3) @ values[:, :, : logits.shape[-1]]
        seen.append((total, output.unflatten(2, weights.shape[2:4])))
    total, output = (torch.cat(parts, dim=3) for parts in zip(*seen, strict=True))
    return total, output
