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
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

SCANS = ("anchor", "complete")
BAND = 64
"""Tokens before each one in the table; a budget has a band of its own (`_width`). Longer sets are
followed on their own."""
FOLLOWED = 4
"""Of a head's sets that are longer than the band, how many are followed at once."""
MOST = 128
"""Tokens in the band of a small budget, whatever its mean entry."""
GRID = 4096
"""A budget's threshold is looked for between multiples of 1 / GRID, where cosines like .5 are not."""
CLOSE = 8
"""How near, on the grid, a threshold that leaves enough links must be to one that does not."""
HEAD_START = 0.0801
"""Below the threshold that chained neighbours would need: where the search begins. A scan asks for more
than a chain: by .02 to .2 for nine heads of ten, at 20% to 50% of SmolLM2's cache on real prompts."""
PATIENCE = 12
"""Steps by regula falsi, six or seven of which are the rule; after them the search halves."""


def scan(
    keys: Tensor,
    protected: Tensor,
    linkage: str,
    *,
    n_links: int | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the links of the sets that a backward scan finds, and how strong each is.

    A budget without a threshold takes one at which enough links are left and, 1/512 above it at most,
    are not. The number of sets is not monotone in the threshold (a set that ends sooner may let the
    next one reach further), so there may be a larger one that is enough too. In the search, sets end
    with the band; at the threshold that is found they are as long as they are, unless that leaves too
    few links.

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
    width = BAND if n_links is None or threshold is not None else _width(keys.shape[2], n_links)
    scanned = _Scan(keys.flatten(0, 1), protected.flatten(0, 1), linkage, width)
    if threshold is None:
        assert n_links is not None
        passing, opens = scanned.at_budget(n_links)
    else:
        passing = torch.full_like(keys[..., 0, 0].flatten(), threshold)
        opens, _ = scanned.openers(passing)
    strength = scanned.strength(opens, passing)
    return (~opens[:, :-1]).unflatten(0, shape), strength[:, :-1].unflatten(0, shape)


def counts(keys: Tensor, protected: Tensor, linkage: str, thresholds: Sequence[float]) -> Tensor:
    """Return how many sets there are at each threshold: `(batch, kv_heads, thresholds)`; see `scan`.

    Sets end with the band, as they do in the search of a budget's threshold.
    """
    scanned = _Scan(keys.flatten(0, 1), protected.flatten(0, 1), linkage, MOST)
    like = scanned.unit[:, 0, 0]
    found = [_n_sets(scanned.taken(torch.full_like(like, threshold))) for threshold in thresholds]
    return torch.stack(found, dim=-1).unflatten(0, keys.shape[:2])


class _Scan:
    """All heads of a layer, as rows `(heads, T, …)`."""

    def __init__(self, keys: Tensor, closed: Tensor, linkage: str, width: int) -> None:
        self.unit = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        self.linkage = linkage
        self.length = keys.shape[1]
        self.band = min(width, self.length)
        self.places = torch.arange(self.length, device=keys.device)
        wall = torch.where(closed, self.places, -1).cummax(dim=1).values
        self.free = (self.places - wall - 1).clamp_min(0)
        """`(heads, T)` tokens before each one back to the next closed one; 0 of a closed one itself."""
        similar = _band(self.unit, self.band)
        weakest = _weakest if linkage == "anchor" else _weakest_of_pairs
        self.passes_at = weakest(similar).mT.flatten(1, 2)[:, : self.length].contiguous()
        """`(heads, T, band)` the largest threshold at which a set opened here takes band, …, 2, 1 more
        tokens: rising along a row."""

    def at_budget(self, n_links: int) -> tuple[Tensor, Tensor]:
        """Return a threshold for each head that leaves enough links, and the tokens that open a set.

        Regula falsi (Illinois) on the grid between a threshold that leaves enough and one that does
        not, in whole numbers, for all heads at once; a head that is done waits for the others.
        """
        most = self.free.clamp_max(1).sum(dim=-1)
        low, high = torch.full_like(most, -GRID - 32), torch.full_like(most, GRID + 32)
        above, below = (most - n_links).clamp_min(0), torch.full_like(most, n_links)
        last, steps = torch.zeros_like(most), 0
        middle = self._head_start(n_links)
        while bool((searching := high - low > CLOSE).any()):
            middle = torch.where(searching, middle.clamp(low + 1, high - 1), low)
            spare = self.length - _n_sets(self.taken(self._threshold(middle))) - n_links
            enough = spare >= 0
            # An end that stays for a second time counts half, or it would stay for good.
            above = torch.where(enough, spare, torch.where(last < 0, above // 2, above))
            below = torch.where(enough, torch.where(last > 0, below // 2, below), -spare)
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
            last, steps = torch.where(enough, 1, -1), steps + 1
            if steps > PATIENCE:
                above = below = torch.zeros_like(most)
            middle = low + (high - low) * (2 * above + 1) // (2 * (above + below + 1))
        threshold = self._threshold(low)
        opens, short = self.openers(threshold)
        links = self.length - torch.stack([opens, short]).sum(dim=-1)
        too_few = (links[0] < n_links) & (links[1] >= n_links)
        return threshold, torch.where(too_few[:, None], short, opens)

    def _head_start(self, n_links: int) -> Tensor:
        """Return where on the grid the search begins, a head: `(heads,)`."""
        chained = torch.where(self.free > 0, self.passes_at[..., -1], -1.0)
        needed = chained.kthvalue(max(1, self.length - max(1, n_links) + 1)).values
        return ((needed.double() - HEAD_START) * GRID).floor().long()

    def _threshold(self, on_grid: Tensor) -> Tensor:
        """Return the cosine half a step above a multiple of 1 / GRID, which is exact."""
        return (on_grid.to(self.unit.dtype) + 0.5) / GRID

    def openers(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens open a set at a threshold `(heads,)`: `(heads, T)` bool.

        Twice: with sets as long as they are, and with sets that end with the band.
        """
        taken = self.taken(threshold)
        longer = (taken == self.band) & (self.free > self.band)
        opens = short = _chain(taken)
        while bool((unsure := opens & longer).any()):
            # What follows the first of them may change. Token 0, which fills up, takes none anyhow.
            last = torch.where(unsure, self.places, 0).topk(min(FOLLOWED, self.length)).values
            longer.scatter_(1, last, False)
            taken.scatter_(1, last, self._follow(last, threshold))
            opens = _chain(taken)
        return opens, short

    def taken(self, threshold: Tensor) -> Tensor:
        """Return how many tokens within the band a set opened at each one takes: `(heads, T)`."""
        wanted = threshold[:, None, None].expand(-1, self.length, 1).contiguous()
        beyond = torch.searchsorted(self.passes_at, wanted)[..., 0]
        return torch.minimum(self.band - beyond, self.free)

    def _follow(self, opener: Tensor, threshold: Tensor) -> Tensor:
        """Return how many tokens some sets take, however many; both `(heads, sets)`."""
        unit, most = self.unit, self.free.gather(1, opener)
        passing = threshold[:, None, None]
        if self.linkage == "anchor":
            similar = torch.matmul(unit.gather(1, _wide(opener, unit)), unit.mT)
            refused = (similar < passing) & (self.places < opener[..., None])
            return torch.minimum(opener - 1 - torch.where(refused, self.places, -1).amax(dim=-1), most)
        taken = torch.zeros_like(opener)
        going = most > 0
        nearest = torch.arange(self.band, device=opener.device)
        while bool(going.any()):
            place = (opener - taken)[..., None] - 1 - nearest
            rows = unit.gather(1, _wide(place.clamp_min(0).flatten(1), unit))
            similar = torch.matmul(rows, unit.mT).unflatten(1, place.shape[1:])
            members = (self.places <= opener[..., None, None]) & (self.places > place[..., None])
            weakest = similar.masked_fill(~members, math.inf).amin(dim=-1)
            refused = torch.where(weakest < passing, nearest, self.band).amin(dim=-1)
            taken += torch.where(going, refused, 0)
            going &= (refused == self.band) & (taken < most)
        return torch.minimum(taken, most)

    def strength(self, opens: Tensor, threshold: Tensor) -> Tensor:
        """Return how strongly each token is held to its set's opener: `(heads, T)`; its own: any."""
        opener = torch.where(opens, self.places, self.length - 1).flip(1).cummin(dim=-1).values.flip(1)
        distance = opener - self.places
        slot = opener * self.band + (self.band - distance).clamp(0, self.band - 1)
        found = self.passes_at.flatten(1).gather(1, slot)
        return torch.where(distance <= self.band, found, threshold[:, None])


def _width(length: int, n_links: int) -> int:
    """Return the band of a budget: the power of two above ten times the tokens of a mean entry."""
    mean = length / max(1, length - n_links)
    return min(MOST, 1 << math.ceil(math.log2(10 * mean)))


def _wide(index: Tensor, states: Tensor) -> Tensor:
    """Return an index `(heads, n)` as `gather` needs it to take whole rows of states."""
    return index[..., None].expand(-1, -1, states.shape[-1])


def _leads(taken: Tensor) -> Tensor:
    """Return where the scan goes on after each set: a row of T + 1 a head, end to end.

    A head's row begins with the end of its scan, which leads to itself; then come its tokens.
    """
    steps = pad(taken + 1, (1, 0)).flatten()
    return (torch.arange(len(steps), device=taken.device) - steps).int()


def _n_sets(taken: Tensor) -> Tensor:
    """Return how many sets the scan finds where each opener takes so many tokens: `(heads,)`.

    Steps of 1, 2, 4, … sets are doubled, as they are in `_chain`.
    """
    row = taken.shape[1] + 1
    leads = _leads(taken)
    passed = torch.ones_like(leads)
    passed[::row] = 0
    for _ in range(row.bit_length()):
        passed = passed + passed.index_select(0, leads)
        leads = leads.index_select(0, leads)
    return passed[row - 1 :: row].long()


def _chain(taken: Tensor) -> Tensor:
    """Return which tokens open a set: `(heads, T)` bool. Arguments as in `_n_sets`."""
    row = taken.shape[1] + 1
    leads = _leads(taken)
    opens = torch.zeros_like(leads)
    opens[row - 1 :: row] = 1
    for _ in range(row.bit_length()):
        opens = opens.index_add(0, leads, opens).clamp_max_(1)
        leads = leads.index_select(0, leads)
    return opens.unflatten(0, (-1, row))[:, 1:].bool()


def _band(unit: Tensor, width: int) -> Tensor:
    """Return the cosine of each token with the `width` tokens before it, in blocks of `width` tokens.

    Each block is multiplied with itself and the block before; the band is a diagonal view of that. A
    block of nothing before each head lets all of them be one sequence, of which no copy is made.

    Returns:
        `(heads, blocks, width, width)`: the furthest first, then the tokens of the block; 0 where there
        is no token.
    """
    heads, length, dim = unit.shape
    blocks = -(-length // width)
    one = pad(unit, (0, 0, width, blocks * width - length)).reshape(-1, dim)
    pairs = one.as_strided((heads * (blocks + 1) - 1, 2 * width, dim), (width * dim, dim, 1))
    cosines = torch.bmm(pairs, one.unflatten(0, (-1, width))[1:].mT)
    size = 2 * width * width
    # Token r of a block has the one that is furthest from it in row r of the two blocks.
    return cosines.as_strided(
        (heads, blocks, width, width), ((blocks + 1) * size, size, width, width + 1)
    ).contiguous()


def _weakest(similar: Tensor) -> Tensor:
    """Return the minimum of each token's cosines up to each distance; arguments as `_band` returns."""
    furthest_first = similar.unbind(2)
    for nearer, further in pairwise(reversed(furthest_first)):
        torch.minimum(further, nearer, out=further)
    return similar


def _weakest_of_pairs(similar: Tensor) -> Tensor:
    """Return the minimum over all pairs among a token and the 1, 2, … before it, like `_weakest`.

    All pairs of a run are those of the run without its last token, those without its first, and the
    pair of the two.
    """
    furthest_first = similar.unbind(2)
    for nearer, further in pairwise(reversed(furthest_first)):
        of_previous = pad(nearer.flatten(1)[:, :-1], (1, 0), value=math.inf).view_as(nearer)
        torch.minimum(further, nearer, out=further)
        torch.minimum(further, of_previous, out=further)
    return similar
