"""No silent no-op: what attention read is held against what was asked of the cache.

An answer counts for a method at a budget only if it came from the cache that these make. That is proven
step by step, each where it could break; what fails is an `UnprovenError` that names the row, the sample
and the layer:

1. every layer of every forward pass comes to the session (`Proof.passed`);
2. new tokens stand where their text goes on, whatever the cache holds (`Proof.place`);
3. attention reads of every row, in every layer and at every step, as many entries as are stored, and
   what it reads first is what the method returned, logit biases too, bit for bit (`LayerProof.read`);
4. it reads as many entries of the prompt as the budget allows, whatever the method returned
   (`Proof.passed`, `_check_budget`);
5. the logits are the full cache's where all of it is read, and are not where less is
   (`kvmerge.engine.check_logits`).

Entries are counted by attention itself (`kvmerge.kernels.attention.Read`), from the shapes that it is
handed: counting waits for no device. What has to be compared there is fetched after the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvmerge.errors import UserError
from kvmerge.method import HIDDEN, Entries, Method

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class UnprovenError(UserError):
    """An answer would not have come from the cache that its row stands for."""

    def __init__(self, row: str, what: str, layer: int | None = None) -> None:
        """Say of which row, and in which layer, something is not as it must be."""
        where = "" if layer is None else f" layer {layer}:"
        super().__init__(
            f"{row}:{where} {what}. The answer would not come from the cache that was asked for, and "
            "is not kept. It is a fault of the method or of kvmerge: leave the cell out, or mend it "
            "(docs/reliability.md, No silent no-op)."
        )


@dataclass(frozen=True)
class Claim:
    """What one row claims of one layer."""

    row: str
    """The row and its sample, as errors name them."""
    method: Method
    asked: int
    """Entries per KV head by budget and policy alone."""
    keys: Tensor
    """`(kv_heads, n)` first coordinate of each stored key, as attention must read it."""
    values: Tensor
    """`(kv_heads, n)` first coordinate of each stored value."""
    bias: Tensor | None
    """`(kv_heads, n)` logit biases."""
    counts: Sequence[int] = ()
    """Entries stored for each KV head, padding left out."""
    decides: bool = False
    """Whether the method decides again after each decode step."""
    most: int | None = None
    """The most entries that attention may read then; None: as many as there are."""

    @classmethod
    def of(cls, kept: Entries, row: str, method: Method, asked: int, **more: Any) -> Claim:
        """Note what attention must read of `kept`, batch 1; `more` are the fields beside."""
        bias = None if kept.bias is None else kept.bias[0]
        # copies: a view would hold on to the whole layer
        keys, values = (states[0, :, :, 0].clone() for states in (kept.keys, kept.values))
        return cls(row, method, asked, keys, values, bias, **more)

    @property
    def stored(self) -> int:
        """Entries per KV head after the prefill, padding among them."""
        return self.keys.shape[-1]


@dataclass
class LayerProof:
    """One layer of a session: what each row claims, and what attention has read since its prefill."""

    layer_idx: int
    claims: Sequence[Claim]
    window: int | None = None
    """The last entries that a token sees in this layer; None: all."""
    fed: list[int] = field(init=False)
    """New tokens of each row that attention has been given."""
    prompt_read: dict[int, list[int]] = field(default_factory=dict)
    """By row: entries of the prompt that the first of them saw, of each KV head."""
    _compared: list[tuple[str, Sequence[int], Tensor]] = field(default_factory=list)
    _hidden: list[tuple[Sequence[int], int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rewind()

    def rewind(self, fed: int = 0) -> None:
        """Begin again, `fed` tokens after the prefill."""
        self.fed = [fed] * len(self.claims)

    def read(
        self, rows: Sequence[int], new: int, keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> None:
        """Count what attention reads; it calls this itself.

        Args:
            rows: whose entries these should be.
            new: tokens that attend, whose own entries are the last.
            keys: `(rows, kv_heads, n, head_dim)` as they are multiplied.
            values: `(rows, kv_heads, n, head_dim)`.
            bias: `(rows, kv_heads, n)` added to the logits, or None.
        """
        first = not self.fed[rows[0]]
        for row in rows:
            self.fed[row] += new
            self._count(row, keys.shape[2], new)
        if first:
            self._compare(rows, keys.shape[2] - new, keys, values, bias)

    def _count(self, row: int, found: int, new: int) -> None:
        claim = self.claims[row]
        wanted = claim.stored + self.fed[row]
        if claim.decides and self.fed[row] > new:  # it may have dropped some since
            wanted = min(wanted, wanted if claim.most is None else claim.most)
            if found > wanted:
                what = f"attention reads {found} entries per KV head, where at most {wanted} are due"
                raise self._error(row, f"{what} after {self.fed[row]} tokens")
            return
        if self.window is not None:
            wanted = min(wanted, self.window + new - 1)
        if found != wanted:
            what = (
                f"attention reads {found} entries per KV head, where {claim.stored} are stored and "
                f"{self.fed[row]} tokens followed"
            )
            raise self._error(row, what)

    def _compare(
        self, rows: Sequence[int], count: int, keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> None:
        """Compare the `count` entries of the prompt with what is claimed, without waiting for it."""
        claims = [self.claims[row] for row in rows]
        for what, found, claimed in (
            ("keys", keys, [claim.keys for claim in claims]),
            ("values", values, [claim.values for claim in claims]),
        ):
            wanted = torch.stack([each[:, each.shape[-1] - count :] for each in claimed])
            self._compared.append((what, rows, _same(found[:, :, :count, 0], wanted)))
        for row, claim in zip(rows, claims, strict=True):
            if bias is None and claim.bias is not None:
                raise self._error(row, "its entries carry a logit bias, and attention is given none")
            self.prompt_read[row] = [count] * keys.shape[1]
        if bias is not None:
            found = bias[:, :, :count]
            none = torch.zeros_like(found[0])
            wanted = torch.stack([none if each.bias is None else each.bias for each in claims])
            self._compared.append(("logit biases", rows, _same(found, wanted)))
            self._hidden.append((rows, count, (found <= HIDDEN).sum(-1)))

    def settle(self) -> list[int]:
        """Fetch what was compared since the last call; return the rows that it was of."""
        for what, rows, same in self._compared:
            for row, is_same in zip(rows, same.tolist(), strict=True):
                if not is_same:
                    what = f"the {what} that attention reads are not those that its method returned"
                    raise self._error(row, what)
        for rows, count, hidden in self._hidden:
            for row, of_heads in zip(rows, hidden.tolist(), strict=True):
                self.prompt_read[row] = [count - each for each in of_heads]
        settled = sorted({row for _, rows, _ in self._compared for row in rows})
        self._compared, self._hidden = [], []
        return settled

    def _error(self, row: int, what: str) -> UnprovenError:
        return UnprovenError(self.claims[row].row, what, self.layer_idx)


class Proof:
    """All layers of a session."""

    def __init__(self, num_layers: int, names: Sequence[str]) -> None:
        """Begin before the prefill.

        Args:
            num_layers: layers of the model.
            names: what errors call each row, its sample among it.
        """
        self.num_layers, self.names = num_layers, list(names)
        self.layers: list[LayerProof] = []
        self.fed = 0
        """New tokens since the prefill, by the positions that the model was given."""
        self._placed = False

    @property
    def counted(self) -> list[LayerProof]:
        """The layers that a budget counts: not those with a window of their own."""
        return [layer for layer in self.layers if layer.window is None]

    def add(self, claims: Sequence[Claim], window: int | None = None) -> LayerProof:
        """Take the claims of the next layer, a row each."""
        self.layers.append(LayerProof(len(self.layers), claims, window))
        return self.layers[-1]

    def rewind(self, fed: int = 0) -> None:
        """Begin again, `fed` tokens after the prefill."""
        self.fed = fed
        for layer in self.layers:
            layer.rewind(fed)

    def place(self, positions: Tensor | None, rows: Sequence[int], begins: Sequence[int]) -> None:
        """Hold the positions that the model gives new tokens against those that its text has.

        Args:
            positions: `(batch, n)`, or `(1, n)` for all; None: the model counts them itself.
            rows: a row of each sequence of the batch.
            begins: the position of the first of the `n` tokens of each; negative for padding.
        """
        self._placed = True
        if positions is None:
            what = "the model is given no positions, so that it counts those of the cache"
            raise UnprovenError(self.names[rows[0]], what)
        given = positions.cpu().expand(len(begins), -1)
        wanted = torch.tensor(begins).unsqueeze(-1) + torch.arange(given.shape[1])
        wrong = (given != wanted) & (wanted >= 0)  # padding may stand anywhere
        if bool(wrong.any()):
            sequence, token = wrong.nonzero()[0].tolist()
            what = (
                f"the model places a token at position {int(given[sequence, token])} that stands at "
                f"{int(wanted[sequence, token])} of its text"
            )
            raise UnprovenError(self.names[rows[sequence]], what)
        if self.layers:
            self.fed += given.shape[1]

    def passed(self, rows: Sequence[int]) -> dict[int, list[list[int]]]:
        """Hold a forward pass that has ended against the claims of the rows that took part.

        Returns:
            by row, where it was the first pass after the prefill: the entries of the prompt that
            attention read, by layer that a budget counts and KV head.
        """
        if len(self.layers) < self.num_layers:
            missing = self.num_layers - len(self.layers)
            what = (
                f"attention of {missing} of {self.num_layers} layers never came to kvmerge: the model "
                "attends by itself, with a cache of its own or with none"
            )
            raise UnprovenError(self.names[rows[0]], what)
        if not self._placed:
            what = "nobody saw at which positions the model places its tokens"
            raise UnprovenError(self.names[rows[0]], what)
        self._placed = False
        settled: set[int] = set()
        for layer in self.layers:
            for row in rows:
                if layer.fed[row] != self.fed:
                    what = f"attention reads its cache for {layer.fed[row]} of {self.fed} new tokens"
                    raise UnprovenError(self.names[row], what, layer.layer_idx)
            settled |= set(layer.settle())
        for row in settled:
            _check_budget(row, self.counted)
        return {row: [layer.prompt_read[row] for layer in self.counted] for row in sorted(settled)}


def _check_budget(row: int, layers: Sequence[LayerProof]) -> None:
    """Hold what attention read of the prompt against what was stored, and against the budget alone."""
    claim = layers[0].claims[row]
    divides = claim.method.allocates or claim.method.allocates_heads
    for layer in layers:
        claim, found = layer.claims[row], layer.prompt_read[row]
        for head, (read, stored) in enumerate(zip(found, claim.counts, strict=True)):
            where = f"attention reads {read} entries of the prompt in KV head {head}"
            if read != stored and not claim.method.simulates:
                raise UnprovenError(claim.row, f"{where}, where {stored} are stored", layer.layer_idx)
            exceeds = read > claim.asked if claim.method.simulates else read != claim.asked
            if exceeds and claim.method.meets_budget and not divides:
                what = f"{where}, where {claim.asked} were asked for"
                raise UnprovenError(claim.row, what, layer.layer_idx)
        if claim.method.allocates_heads and not claim.method.allocates:
            _check_mean(claim, [found], "KV heads", tolerance=0, layer=layer.layer_idx)
    if claim.method.allocates:
        _check_mean(claim, [layer.prompt_read[row] for layer in layers], "layers", tolerance=1)


def _check_mean(
    claim: Claim,
    found: Sequence[Sequence[int]],
    over: str,
    *,
    tolerance: float,
    layer: int | None = None,
) -> None:
    """Hold the mean of what was read, by layer and KV head, against the budget.

    An error below `tolerance` is none.
    """
    mean = sum(sum(each) / len(each) for each in found) / len(found)
    error = abs(mean - claim.asked)
    if claim.method.meets_budget and error >= max(tolerance, 1e-6):
        what = (
            f"attention reads {mean:.1f} entries of the prompt a KV head on the mean over {over}, "
            f"where {claim.asked} were asked for"
        )
        raise UnprovenError(claim.row, what, layer)


def _same(found: Tensor, wanted: Tensor) -> Tensor:
    """Return for each row whether two tensors hold the same bits: `(rows,)` bool."""
    bits = _BITS[found.element_size()]
    return (found.view(bits) == wanted.view(bits)).flatten(1).all(dim=1)
