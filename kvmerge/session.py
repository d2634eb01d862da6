"""The cache of a batch: prompts compressed as their layers finish, then decoded row by row.

A *prompt* is one sequence of the prefill batch; a *row* is one cell that decodes it. The comparison of
many cells on one prompt, one method on a padded batch of prompts, and everything between are the same
code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.budget import Budget, at_least_one
from kvmerge.cache import Hold, LayerCache, SteppedRow
from kvmerge.errors import NotFinite, UserError, unknown
from kvmerge.families import local_windows
from kvmerge.kernels.attention import attention_and_scores, masked_attention, prompt_kernel
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all, tail
from kvmerge.proof import Claim, Proof
from kvmerge.rope import Rope
from kvmerge.scores import column_sums
from kvmerge.softmax import Softmax

DECODE_POLICIES = ("append", "hold")
POSITIONS = ("absolute", "rolled")
SKIP_BUDGETS = ("compensated", "plain")


@dataclass(frozen=True)
class Policy:
    """Switches that hold for all rows of a session alike, so that a table compares like with like."""

    decode_policy: str = "append"
    """`append`: generated tokens are stored beside the compressed prompt. `hold`: after each step the
    method returns the stored length to its allowance, by its own rule; one without a rule appends."""
    pos: str = "absolute"
    """`absolute`: entries keep their true positions. `rolled`: they stand at 0, 1, 2, … as stored."""
    layers_skip: tuple[int, ...] = ()
    """Layers left uncompressed; negative ones count from the end."""
    skip_budget: str = "compensated"
    """`compensated`: the other layers keep less, so that the mean over layers is still the budget.
    `plain`: they keep the budget."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("decode_policy", DECODE_POLICIES), ("pos", POSITIONS), ("skip_budget", SKIP_BUDGETS)
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), allowed)
        layers = self.layers_skip
        if not isinstance(layers, tuple) or not all(type(layer) is int for layer in layers):
            shown = list(layers) if isinstance(layers, tuple) else layers
            raise UserError(f"layers_skip={shown!r} must be a list of layer numbers, e.g. [0,1,-1].")

    @property
    def rolled(self) -> bool:
        """Whether entries are renumbered as they are stored."""
        return self.pos == "rolled"

    def check(self, method: Method) -> None:
        """Refuse a method that cannot run under these switches.

        Raises:
            UserError: if layers are to be skipped by a method that divides its budget over layers.
        """
        if self.layers_skip and method.allocates:
            raise UserError(
                "layers_skip cannot be combined with a method that divides its budget itself."
            )

    def check_layers(self, num_layers: int) -> None:
        """Refuse to skip layers that a model does not have. Raises `UserError`."""
        if not all(-num_layers <= layer < num_layers for layer in self.layers_skip):
            raise UserError(
                f"layers_skip={list(self.layers_skip)}: the model has {num_layers} layers, 0 to "
                f"{num_layers - 1}."
            )

    def check_prompt(
        self, method: Method, budget: Budget, length: int, windows: Sequence[int | None]
    ) -> None:
        """Refuse what compressing a prompt would be refused for, before there is a model.

        Args:
            method: the method.
            budget: what remains of the whole cache.
            length: tokens of the prompt.
            windows: for each layer, the last tokens that it is left to; None: all are kept, or what the
                method keeps.

        Raises:
            UserError: as `allowance` does, and the method for what it would be allowed.
        """
        local = frozenset(i for i, window in enumerate(windows) if window is not None)
        for layer_idx in sorted(set(range(len(windows))) - local):
            n_keep, share = self.allowance(budget, length, layer_idx, len(windows), local)
            # of a method that divides its budget itself only its layers tell
            if not method.allocates and (n_keep < length or method.acts_on_decode):
                method.check(layer_idx, length, Allowance(n_keep, share))

    def decides(self, method: Method) -> bool:
        """Return whether a method decides again after each decode step."""
        return method.acts_on_decode or (self.decode_policy == "hold" and method.holds)

    def allowance(
        self,
        budget: Budget,
        length: int,
        layer_idx: int,
        num_layers: int,
        local: frozenset[int] = frozenset(),
    ) -> tuple[int, float]:
        """Return the entries per KV head of one layer, and the same as a fraction of the prompt.

        Args:
            budget: what remains of the whole cache.
            length: tokens of the prompt.
            layer_idx: the layer.
            num_layers: layers of the model.
            local: layers that are left to a window of their own, which no budget counts.

        Raises:
            UserError: if a skipped layer does not exist, or those skipped alone exceed the budget.
        """
        if not self.layers_skip:
            return budget.entries(length), budget.fraction(length)
        self.check_layers(num_layers)
        skipped = {layer % num_layers for layer in self.layers_skip} - local
        counted = num_layers - len(local)
        if layer_idx in skipped:
            return length, 1.0
        share = budget.fraction(length)
        if self.skip_budget == "compensated":
            share = (counted * share - len(skipped)) / (counted - len(skipped))
        if share <= 0:
            raise UserError(
                f"layers_skip={list(self.layers_skip)} alone keeps more than the budget {budget}; "
                "skip fewer layers, raise the budget, or use skip_budget=plain."
            )
        return at_least_one(share, length), share


DEFAULT_POLICY = Policy()


@dataclass(frozen=True)
class Row:
    """One row of the batch: a method at a budget, with a seed."""

    method: Method
    budget: Budget
    seed: int = 0
    prompt: int = 0
    """Which sequence of the prefill batch the row decodes."""
    cell: str = ""
    """What errors call it; empty: by its method's class and the budget."""

    def generator(
        self, sample_id: str, layer_idx: int, step: int | None = None
    ) -> torch.Generator | None:
        """Return what the row's method draws from (`seeded_generator`); None where it draws nothing."""
        if not self.method.stochastic:
            return None
        return seeded_generator(self.seed, sample_id, layer_idx, step)


@dataclass(frozen=True)
class HoldRule:
    """What a row's method does in one layer after each decode step (`kvmerge.cache.Hold`).

    It holds no session, which would keep itself alive by it.
    """

    row: Row
    sample_id: str
    length: int
    """Tokens of the row's prompt."""
    layer_idx: int
    allowance: Allowance
    """The prefill's, without its generator: each step has its own."""
    rope: Rope | None

    def __call__(self, entries: Entries, weights: Tensor, step: int) -> Entries:
        """Decide again what stays of the entries, `weights` `(1, heads, n)` being the new token's."""
        drawn = self.row.generator(self.sample_id, self.layer_idx, step)
        allowance = replace(self.allowance, generator=drawn)
        now = DecodeStep(weights, self.length, self.layer_idx, step, allowance, self.rope)
        return self.row.method.hold(entries, now)


@dataclass
class RowStats:
    """What a row keeps of the prompt, measured on the tensors."""

    entries: list[list[int]] = field(default_factory=list)
    """Entries kept, by layer and KV head, of the layers that a budget counts: not of those with a
    window of their own."""
    layer_kv_bytes: list[int] = field(default_factory=list)
    """Bytes of the keys and values of those entries, by layer."""
    layer_size_bytes: list[int] = field(default_factory=list)
    """Bytes of what is stored beside them (set sizes, logit biases), by layer."""
    local_bytes: int = 0
    """Bytes of the keys and values of layers with a window of their own."""
    represented: list[list[int]] | None = None
    """Prompt tokens that the entries stand for, by layer and KV head; None unless sizes are kept."""
    read: list[list[int]] | None = None
    """Entries of the prompt that attention read for the first token fed after it, those that are hidden
    left out, by layer and KV head as `entries` are; None where no token was fed."""
    kernels: set[str] = field(default_factory=set)
    """What attended to the prompt (`prompt_kernel`, or `masked`), of all layers."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of the entries kept."""
        return sum(self.layer_kv_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes of what is stored beside them (set sizes, logit biases)."""
        return sum(self.layer_size_bytes)

    @property
    def kept_entries(self) -> float:
        """Entries kept, the mean over layers and KV heads."""
        return mean_of(self.entries)

    def full_bytes(self, length: int) -> int:
        """Return the bytes of keys and values that the full cache of `length` tokens has.

        Layers with a window of their own hold the same in both.
        """
        counts = [count for layer in self.entries for count in layer]
        return self.kv_bytes // sum(counts) * length * len(counts) + self.local_bytes

    def add_layer(self, kept: Entries) -> None:
        """Count one more layer."""
        _, kv_heads, length, head_dim = kept.keys.shape
        counts = [length] * kv_heads
        beside = 0
        if kept.sizes is not None:
            counts = (kept.sizes[0] > 0).sum(-1).tolist()
            self.represented = [*(self.represented or []), kept.sizes[0].sum(-1).tolist()]
            beside += sum(counts) * kept.sizes.element_size()
        if kept.bias is not None:
            beside += sum(counts) * kept.bias.element_size()
        self.entries.append(counts)
        per_entry = head_dim * (kept.keys.element_size() + kept.values.element_size())
        self.layer_kv_bytes.append(sum(counts) * per_entry)
        self.layer_size_bytes.append(beside)


def mean_of(counts: Sequence[Sequence[int]]) -> float:
    """Return the mean over layers and KV heads of counts by both."""
    each = [count for layer in counts for count in layer]
    return sum(each) / len(each)


Observer = Callable[[int, int, PrefillLayer, Entries], None]
"""Called with (row, layer index, layer, what the row kept) as each layer is compressed."""

ATTENTION, COMPRESSION, CACHE = "attention", "compression", "cache"
Stages = Callable[[str], AbstractContextManager[object]]
"""Called with a stage's name as the stage begins; what it returns is entered and left around the work.

`attention`: a prompt's attention in one layer, with scores where they are wanted; `compression`: one
row compressing one layer; `cache`: attention of new tokens over the rows' caches in one layer. By
default nobody watches.
"""


class CacheSession:
    """Holds every row's cache between the forward passes of a hooked model."""

    def __init__(
        self,
        rows: Sequence[Row],
        num_layers: int,
        sample_ids: Sequence[str] = ("",),
        observer: Observer | None = None,
        rope: Rope | None = None,
        policy: Policy = DEFAULT_POLICY,
        stages: Stages = nullcontext,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        """Prepare rows.

        Args:
            rows: the cells, each naming the prompt it decodes.
            num_layers: layers of the model.
            sample_ids: one a prompt; seeds the methods that draw.
            observer: called with every compressed layer.
            rope: the model's rotation, for rows that need it.
            policy: the switches of all rows.
            stages: watches where the time goes.
            windows: for each layer, the last tokens that it is left to; None: all are kept, or what a
                method keeps. None for all: no layer has a window.

        Raises:
            UserError: if a row cannot be combined with the others, or with the policy.
        """
        for row in rows:
            policy.check(row.method)
        if any(row.method.alters_prefill for row in rows) and len(rows) > 1:
            raise UserError("a method that alters the prefill cannot share it; run it on its own.")
        self.rope, self.policy, self.stages = rope, policy, stages
        self._held: list[list[PrefillLayer]] = []
        self._allocated: dict[int, dict[int, int]] = {}
        self.rows = list(rows)
        self.num_layers = num_layers
        self.windows = list(windows or [None] * num_layers)
        self._local = frozenset(i for i, window in enumerate(self.windows) if window is not None)
        self.sample_ids = list(sample_ids)
        self.observer = observer
        self.stats = [RowStats() for _ in rows]
        self.proof = Proof(num_layers, [self._name(row) for row in rows])
        self.layers: list[LayerCache] = []
        self.order = list(range(len(self.rows)))
        """Rows that take part in the next forward pass, in batch order."""
        self.lengths: list[int] = []
        self.capacity = 0

    def begin(self, lengths: Sequence[int], capacity: int) -> None:
        """Announce the prefill.

        Args:
            lengths: real tokens of each prompt; shorter ones are padded on the left.
            capacity: new entries that each row has room for before its buffer must grow.
        """
        self.lengths, self.capacity = list(lengths), capacity

    def place(self, positions: Tensor | None) -> None:
        """Hold the positions of the next forward pass against those of the texts."""
        if self.layers:
            rows = self.order
            begins = [self.lengths[self.rows[row].prompt] + self.proof.fed for row in rows]
        else:
            rows = [self._rows_of(prompt)[0] for prompt in range(len(self.lengths))]
            width = 0 if positions is None else positions.shape[1]
            begins = [length - width for length in self.lengths]
        self.proof.place(positions, rows, begins)

    def passed(self) -> None:
        """Hold a forward pass that has ended against what was asked (see `kvmerge.proof`)."""
        for row, found in self.proof.passed(self.order).items():
            self.stats[row].read = found

    def attend(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax
    ) -> Tensor:
        """Attend in one layer; the model calls it (see `kvmerge.hook.Session`)."""
        if layer_idx < len(self.layers):
            with self.stages(CACHE):
                return self.layers[layer_idx].attend(self.order, queries, keys, values, softmax)
        out = torch.zeros_like(queries)
        layers = []
        for prompt, length in enumerate(self.lengths):
            real = (slice(prompt, prompt + 1), slice(None), slice(queries.shape[2] - length, None))
            layer, out[real] = self._prefill_layer(
                prompt, layer_idx, queries[real], keys[real], values[real], softmax
            )
            layers.append(layer)
        self._take(layers)
        return out

    def _prefill_layer(
        self,
        prompt: int,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        softmax: Softmax,
    ) -> tuple[PrefillLayer, Tensor]:
        """Attend to one prompt in one layer; return what the compressors are handed, and the output."""
        indices = self._rows_of(prompt)
        first = indices[0]
        window = self.windows[layer_idx]
        # such a row has its prefill to itself
        alters = self.rows[first].method.alters_prefill and window is None
        allowance = self._allowance(first, layer_idx) if alters else None
        states = queries, keys, values
        layer = PrefillLayer(*states, None, layer_idx, self.num_layers, softmax, self.rope)
        scored = window is None and any(self._wants_scores(i, layer.length) for i in indices)
        with self.stages(ATTENTION):
            if allowance is not None and allowance.n_keep < layer.length:
                scores = column_sums(queries, keys, softmax=softmax) if scored else None
                layer = replace(layer, scores=scores)
                visible = self.rows[first].method.visible(layer, allowance)
                out = masked_attention(*states, softmax, visible)
                kernel = "masked"
            else:
                kernel = prompt_kernel(*states, softmax, scored=scored, window=window)
                out, scores = attention_and_scores(*states, softmax, scored=scored, window=window)
                layer = replace(layer, scores=scores)
        for index in indices:
            self.stats[index].kernels.add(kernel)
        check_finite(layer)
        return layer, out

    def _take(self, layers: Sequence[PrefillLayer]) -> None:
        """Compress a finished layer, or hold it until a method can divide its budget over all."""
        self._held.append(list(layers))
        allocating = [index for index, row in enumerate(self.rows) if row.method.allocates]
        if allocating and len(self._held) < self.num_layers:
            return
        counted = [held for layer_idx, held in enumerate(self._held) if layer_idx not in self._local]
        for index in allocating:
            prompt = self.rows[index].prompt
            of_prompt = [held[prompt] for held in counted]
            allowance = self._allowance(index, of_prompt[0].layer_idx)
            if allowance.n_keep < self.lengths[prompt]:
                shares = self.rows[index].method.allocate(of_prompt, allowance)
                self._allocated[index] = {
                    layer.layer_idx: share for layer, share in zip(of_prompt, shares, strict=True)
                }
        for held in self._held:
            self._store(held)
        self._held = []

    def _store(self, layers: Sequence[PrefillLayer]) -> None:
        layer_idx = layers[0].layer_idx
        if layer_idx in self._local:
            self._store_window(layers)
            return
        entries = [self._compress(i, layers[row.prompt]) for i, row in enumerate(self.rows)]
        stepped = {
            index: SteppedRow(
                index,
                entries[index],
                self.lengths[row.prompt],
                self._hold_rule(index, layer_idx),
                self.rope if self.policy.rolled else None,
            )
            for index, row in enumerate(self.rows)
            if self.policy.rolled or self.policy.decides(row.method)
        }
        claims = [self._claim(i, layers[row.prompt], entries[i]) for i, row in enumerate(self.rows)]
        proof = self.proof.add(claims)
        self.layers.append(LayerCache(entries, self.capacity, stepped, proof=proof))

    def _store_window(self, layers: Sequence[PrefillLayer]) -> None:
        """Keep what the window of a local layer still holds at the next token, for every row alike."""
        window = self.windows[layers[0].layer_idx]
        assert window is not None
        entries = [tail(layers[row.prompt], window - 1) for row in self.rows]
        for stats, kept in zip(self.stats, entries, strict=True):
            stats.local_bytes += kept.keys.nbytes + kept.values.nbytes
        claims = [
            Claim.of(kept, self.proof.names[i], row.method, kept.keys.shape[2])
            for i, (row, kept) in enumerate(zip(self.rows, entries, strict=True))
        ]
        proof = self.proof.add(claims, window)
        self.layers.append(LayerCache(entries, self.capacity, window=window, proof=proof))

    def retire(self, row: int) -> None:
        """Take a finished row out of the next forward passes."""
        self.order.remove(row)
        for layer in self.layers:
            layer.retire(row)

    def rewind(self, fed: int = 0) -> None:
        """Return every row to its state `fed` tokens after the prefill."""
        self.order = list(range(len(self.rows)))
        self.proof.rewind(fed)
        for layer in self.layers:
            layer.rewind(fed)

    def _rows_of(self, prompt: int) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.prompt == prompt]

    def _wants_scores(self, index: int, length: int) -> bool:
        """Return whether a row's method will look at the scores; the full cache alone needs none."""
        row = self.rows[index]
        return row.method.needs_scores and (
            self.policy.decides(row.method) or row.budget.entries(length) < length
        )

    def _compress(self, index: int, layer: PrefillLayer) -> Entries:
        row = self.rows[index]
        allowance = self._allowance(index, layer.layer_idx)
        with self.stages(COMPRESSION):
            if allowance.n_keep >= layer.length and not row.method.acts_on_decode:
                kept = keep_all(layer)
            else:
                kept = row.method.compress(layer, allowance)
        if self.policy.rolled and kept.is_ragged:
            raise UserError("pos=rolled is undefined where KV heads keep different numbers of entries.")
        self.stats[index].add_layer(kept)
        if self.observer is not None:
            self.observer(index, layer.layer_idx, layer, kept)
        return kept

    def _claim(self, index: int, layer: PrefillLayer, kept: Entries) -> Claim:
        """Return what attention must read of what a row keeps of a layer."""
        row = self.rows[index]
        length = self.lengths[row.prompt]
        asked, _ = self.policy.allowance(
            row.budget, length, layer.layer_idx, self.num_layers, self._local
        )
        if asked >= length:  # then it is the prefill's own keys and values, whoever handed them on
            kept = replace(keep_all(layer), bias=kept.bias)
        if self.policy.rolled:
            assert self.rope is not None
            places = torch.arange(kept.positions.shape[-1], device=kept.positions.device)
            kept = replace(kept, keys=self.rope.rotate(kept.keys, places - kept.positions))
        most = None
        if self.policy.decides(row.method) and row.method.meets_budget and not row.method.simulates:
            most = self._allowance(index, layer.layer_idx).n_keep + row.method.hold_every
        return Claim.of(
            kept,
            self.proof.names[index],
            row.method,
            asked,
            counts=self.stats[index].entries[-1],
            decides=self.policy.decides(row.method),
            most=most,
        )

    def _name(self, row: Row) -> str:
        """Return what errors call a row and its sample."""
        cell = row.cell or f"{type(row.method).__name__}@{row.budget}"
        sample = self.sample_ids[row.prompt]
        return f"{cell} on {sample}" if sample else cell

    def reads_less(self, index: int) -> bool:
        """Return whether attention read less of a row's prompt than there is, in any layer."""
        length = self.lengths[self.rows[index].prompt]
        return any(count < length for layer in self.stats[index].read or [] for count in layer)

    def is_full(self, index: int) -> bool:
        """Return whether a row must equal the full cache: its budget holds the whole prompt.

        A method that decides again after each step attends in another way, and drops or hides something
        as soon as the answer outgrows the budget.
        """
        if self.policy.decides(self.rows[index].method):
            return False
        length = self.lengths[self.rows[index].prompt]
        return all(layer.claims[index].asked >= length for layer in self.proof.counted)

    def _allowance(self, index: int, layer_idx: int) -> Allowance:
        row = self.rows[index]
        generator = row.generator(self.sample_ids[row.prompt], layer_idx)
        length = self.lengths[row.prompt]
        if index in self._allocated:
            n_keep = min(self._allocated[index][layer_idx], length)
            return Allowance(n_keep, n_keep / length, generator)
        n_keep, share = self.policy.allowance(
            row.budget, length, layer_idx, self.num_layers, self._local
        )
        return Allowance(n_keep, share, generator)

    def _hold_rule(self, index: int, layer_idx: int) -> Hold | None:
        row = self.rows[index]
        if not self.policy.decides(row.method):
            return None
        allowance = replace(self._allowance(index, layer_idx), generator=None)
        sample_id, length = self.sample_ids[row.prompt], self.lengths[row.prompt]
        return HoldRule(row, sample_id, length, layer_idx, allowance, self.rope)


def session_for(
    model: PreTrainedModel,
    rows: Sequence[Row],
    sample_ids: Sequence[str],
    observer: Observer | None = None,
    policy: Policy = DEFAULT_POLICY,
    stages: Stages = nullcontext,
) -> CacheSession:
    """Return a session for a model, with its rotation where a row needs it."""
    turns = policy.rolled or any(row.method.needs_rope for row in rows)
    rope = Rope.of(model) if turns else None
    windows = local_windows(model.config)
    return CacheSession(rows, len(windows), sample_ids, observer, rope, policy, stages, windows)


def seeded_generator(
    seed: int, sample_id: str, layer_idx: int, step: int | None = None
) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments, on any machine.

    `step` is None for the prefill, and counts the decode steps of methods that draw there.
    """
    parts = [seed, sample_id, layer_idx, *([] if step is None else [step])]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_finite(layer: PrefillLayer) -> None:
    """Raise `NotFinite` for keys, values or scores that are not finite, naming layer and KV head."""
    for name, tensor in (("keys", layer.keys), ("values", layer.values), ("scores", layer.scores)):
        if tensor is None or bool(tensor.sum().isfinite()):
            continue
        bad = ~tensor.isfinite().flatten(2).all(dim=-1)[0]
        if bool(bad.any()):
            raise NotFinite(
                f"{name} of layer {layer.layer_idx}, KV head {int(bad.nonzero()[0])} are not finite",
                "the model overflows in this dtype. Try model.dtype=float32 or bfloat16.",
            )
