"""Which neighbours a backward scan joins: KVMerger's merging sets as Figure 4 of its paper finds them.

The scan opens a set at the last token and takes the tokens before it, one by one, until one is not
similar enough; that one opens the next set. Under `anchor` a token is compared with the one that opened
the set, under `complete` with every member. Both come down to one table: for each token, the running
minimum of what the tokens before it are compared by. At any threshold that row says how far the
token's own set would reach, so the sets are the chain of jumps from the last token on. There is no loop
over tokens or heads: the table is a band of cosines, the chain is followed by pointer doubling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCANS = ("anchor", "complete")
BAND = 64
"""Tokens before each one in the table. A longer set is followed on its own, but for the search of a
budget's threshold, which ends it there."""
HALVINGS = 12
"""Of the interval in which a budget's threshold is looked for: it is found to 2 / 2^12."""


def scan(
    keys: Tensor,
    protected: Tensor,
    linkage: str,
    *,
    n_links: int | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the links of the sets that a backward scan finds, and how strong each is.

    A budget without a threshold takes one at which enough links are left and, by a step of the last
    halving above it, are not. The number of sets is not monotone in the threshold (a set that ends
    sooner may let the next one reach further), so there may be a larger one that is enough too. In the
    search, sets end with the band; at the threshold that is found they are as long as they are, unless
    that leaves too few links.

    Args:
        keys: `(batch, kv_heads, T, head_dim)`.
        protected: `(batch, kv_heads, T)` bool; such a token stays alone and ends a set.
        linkage: one of `SCANS`.
        n_links: links that must be left a head, if there are as many; looked at without a threshold.
        threshold: cosine from which on a token joins.

    Returns:
        linked, strength: `(batch, kv_heads, T - 1)`; link `i` joins tokens `i` and `i + 1`. Its
        strength is the largest threshold at which the set's opener would have reached token `i`, or
        the threshold itself beyond the band.
    """
    shape = keys.shape[:2]
    scanned = _Scan(keys.flatten(0, 1).flip(1), protected.flatten(0, 1).flip(1), linkage)
    if threshold is None:
        assert n_links is not None
        passing, opens = scanned.at_budget(n_links)
    else:
        passing = torch.full_like(keys[..., 0, 0].flatten(), threshold)
        opens = scanned.openers(passing)
    strength = scanned.strength(opens, passing)
    return (~opens[:, 1:]).flip(1).unflatten(0, shape), strength[:, 1:].flip(1).unflatten(0, shape)


class _Scan:
    """All heads of a layer, as rows `(heads, T, …)` in the order of the scan: the last token first."""

    def __init__(self, keys: Tensor, closed: Tensor, linkage: str) -> None:
        self.unit = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        self.linkage = linkage
        self.length = keys.shape[1]
        self.places = torch.arange(self.length, device=keys.device)
        wall = torch.where(closed, self.places, self.length).flip(1).cummin(dim=1).values.flip(1)
        self.free = (wall - self.places - 1).clamp_min(0)
        """`(heads, T)` places after each up to the next closed one; 0 of a closed one itself."""
        unlike = _band(self.unit, min(BAND, self.length))
        furthest = _furthest if linkage == "anchor" else _furthest_of_pairs
        self.refuses_at = furthest(unlike)
        """`(heads, T, band)` minus the largest threshold at which a set opened here takes 1, 2, … more
        tokens: rising along a row."""

    def at_budget(self, n_links: int) -> tuple[Tensor, Tensor]:
        """Return a threshold for each head that leaves enough links, and the places that open a set."""
        # Below any cosine, rounding included; exact in any dtype, and so are all middles.
        low = torch.full_like(self.unit[:, 0, 0], -1 - 2**-7)
        high = -low
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            links = self.length - _chain(self._taken(middle)).sum(dim=-1)
            enough = links >= n_links
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        opens, short = self.openers(low), _chain(self._taken(low))
        links = self.length - torch.stack([opens, short]).sum(dim=-1)
        too_few = (links[0] < n_links) & (links[1] >= n_links)
        return low, torch.where(too_few[:, None], short, opens)

    def openers(self, threshold: Tensor) -> Tensor:
        """Return which places open a set at a threshold `(heads,)`: `(heads, T)` bool."""
        band = self.refuses_at.shape[-1]
        taken = self._taken(threshold)
        longer = (taken == band) & (self.free > band)
        while True:
            opens = _chain(taken)
            unsure = opens & longer
            if not bool(unsure.any()):
                return opens
            # of each head the first one that the chain comes to; what follows it may change
            first = torch.where(unsure, self.places, self.length).amin(dim=-1)
            heads = (first < self.length).nonzero()[:, 0]
            at = heads, first[heads]
            longer[at] = False
            taken[at] = self._follow(heads, first[heads], threshold[heads])

    def _taken(self, threshold: Tensor) -> Tensor:
        """Return how many places within the band a set opened at each place takes: `(heads, T)`."""
        wanted = -threshold[:, None, None].expand(-1, self.length, 1).contiguous()
        within = torch.searchsorted(self.refuses_at, wanted, right=True)[..., 0]
        return torch.minimum(within, self.free)

    def _follow(self, heads: Tensor, opener: Tensor, threshold: Tensor) -> Tensor:
        """Return how many places a set takes, however many: for one opener a head, `(heads,)`."""
        unit, most = self.unit[heads], self.free[heads, opener]
        if self.linkage == "anchor":
            similar = torch.matmul(unit, unit.gather(1, _wide(opener[:, None], unit)).mT)[..., 0]
            refused = (similar < threshold[:, None]) & (self.places > opener[:, None])
            return torch.minimum(_first(refused) - opener - 1, most)
        taken = torch.zeros_like(opener)
        going = torch.ones_like(opener, dtype=torch.bool)
        while bool(going.any()):
            place = (opener + taken)[:, None] + 1 + self.places[:BAND]
            rows = unit.gather(1, _wide(place.clamp_max(self.length - 1), unit))
            members = (self.places >= opener[:, None, None]) & (self.places < place[..., None])
            weakest = torch.matmul(rows, unit.mT).masked_fill(~members, math.inf).amin(dim=-1)
            joined = _first(weakest < threshold[:, None])
            taken += torch.where(going, joined, 0)
            going &= (joined == rows.shape[1]) & (taken < most)
        return torch.minimum(taken, most)

    def strength(self, opens: Tensor, threshold: Tensor) -> Tensor:
        """Return how strongly each place is held to its set's opener: `(heads, T)`; its own: any."""
        opener = torch.where(opens, self.places, 0).cummax(dim=-1).values
        distance = self.places - opener
        band = self.refuses_at.shape[-1]
        slot = opener * band + (distance - 1).clamp(0, band - 1)
        found = -self.refuses_at.flatten(1).gather(1, slot)
        return torch.where(distance <= band, found, threshold[:, None])


def _wide(index: Tensor, states: Tensor) -> Tensor:
    """Return an index `(heads, n)` as `gather` needs it to take whole rows of states."""
    return index[..., None].expand(-1, -1, states.shape[-1])


def _first(found: Tensor) -> Tensor:
    """Return the first column of each row that is true; their number where none is."""
    columns = torch.arange(found.shape[-1], device=found.device)
    return torch.where(found, columns, found.shape[-1]).amin(dim=-1)


def _chain(taken: Tensor) -> Tensor:
    """Follow the sets from the first place on, each `taken` `(heads, T)` places beside its opener.

    Returns:
        `(heads, T)` bool, which places open a set. Steps of 1, 2, 4, … sets are doubled.
    """
    heads, length = taken.shape
    places = torch.arange(length, device=taken.device)
    # A place after the last one is where the last set leads, and it leads to itself.
    leads = torch.nn.functional.pad(places + 1 + taken, (0, 1), value=length)
    opens = torch.zeros(heads, length + 1, dtype=torch.int32, device=taken.device)
    opens[:, 0] = 1
    for _ in range(length.bit_length()):
        opens = opens.scatter_add(1, leads, opens).clamp_max_(1)
        leads = leads.gather(1, leads)
    return opens[:, :-1].bool()


def _band(unit: Tensor, width: int) -> Tensor:
    """Return minus the cosines of each row with the `width` rows after it, nearest first.

    A block of rows times the columns that they need, of which the diagonal band is a view.

    Returns:
        `(heads, T, width)`; 0 where there is no such row.
    """
    heads, length, _ = unit.shape
    blocks = -(-length // width)
    padded = torch.nn.functional.pad(unit, (0, 0, 0, (blocks + 1) * width + 1 - length))
    rows = -padded[:, : blocks * width].unflatten(1, (blocks, width))
    columns = padded[:, 1:].unfold(1, 2 * width, width)  # (heads, blocks, head_dim, 2 width)
    unlike = torch.matmul(rows, columns)
    # Row i of a block has its band at columns i to i + width - 1.
    skewed = unlike.as_strided((heads, blocks, width, width), (*unlike.stride()[:2], 2 * width + 1, 1))
    return skewed.reshape(heads, -1, width)[:, :length]


def _furthest(unlike: Tensor) -> Tensor:
    """Return the maximum of each row up to each column."""
    return unlike.cummax(dim=-1).values


def _furthest_of_pairs(unlike: Tensor) -> Tensor:
    """Return the maximum over all pairs among a row and the 1, 2, … after it.

    All pairs of a run are those of the run without its last row, those without its first, and the pair
    of the two.
    """
    columns = unlike.permute(2, 0, 1).contiguous()
    for column in range(1, len(columns)):
        of_next = torch.nn.functional.pad(columns[column - 1][:, 1:], (0, 1), value=-math.inf)
        torch.maximum(columns[column], columns[column - 1], out=columns[column])
        torch.maximum(columns[column], of_next, out=columns[column])
    return columns.permute(1, 2, 0).contiguous()
