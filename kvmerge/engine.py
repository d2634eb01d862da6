"""One prefill serves every cell of a comparison, and the cells decode together as one batch.

All methods here leave the prefill untouched: hidden states are those of full attention, and a method
only decides, layer by layer, what stays in the cache. So each layer, as it finishes, is handed to the
compressor of every cell and then freed; the cells are the rows of one batch from then on. Running a
single cell is the same code with one row.

Since compression happens after the prompt's attention, the first answer token is the same for every
method and budget; what a method changes shows from the second on.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.attention import forward, hooked, prefill_attention
from kvmerge.budget import Budget
from kvmerge.cache import Hold, LayerCache
from kvmerge.errors import UserError, unknown
from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer, keep_all
from kvmerge.scores import column_sums

_REPLAY_TOKENS = 64
"""Tokens fed at once when an answer is replayed: bounds the logits alive to rows x 64 x vocabulary."""


DECODE_POLICIES = ("append", "hold")


@dataclass(frozen=True)
class Row:
    """One row of the batch: a method at a budget, with a seed."""

    method: Method
    budget: Budget
    seed: int = 0
    decode_policy: str = "append"
    """`append`: generated tokens are stored beside the compressed prompt. `hold`: after each step the
    method returns the stored length to its allowance, by its own rule."""

    def __post_init__(self) -> None:
        if self.decode_policy not in DECODE_POLICIES:
            raise unknown("decode_policy", self.decode_policy, DECODE_POLICIES)

    @property
    def acts_on_decode(self) -> bool:
        """Whether the method decides again after each decode step."""
        return self.method.acts_on_decode or (self.decode_policy == "hold" and self.method.holds)


@dataclass(frozen=True)
class Stop:
    """When an answer ends."""

    max_new_tokens: int
    token_ids: frozenset[int]
    """Tokens that end the answer; the one that does is not part of its text."""
    min_new_tokens: int = 0
    """No stop token is chosen before this many tokens."""


@dataclass
class RowStats:
    """What a row keeps of the prompt, measured on the tensors."""

    entries: list[list[int]] = field(default_factory=list)
    """Entries kept, by layer and KV head."""
    kv_bytes: int = 0
    """Bytes of the keys and values of those entries."""
    size_bytes: int = 0
    """Bytes of what is stored beside them (set sizes, logit biases)."""

    def add_layer(self, kept: Entries) -> None:
        """Count one more layer."""
        _, kv_heads, length, head_dim = kept.keys.shape
        counts = [length] * kv_heads
        if kept.sizes is not None:
            counts = (kept.sizes[0] > 0).sum(-1).tolist()
            self.size_bytes += sum(counts) * kept.sizes.element_size()
        if kept.bias is not None:
            self.size_bytes += sum(counts) * kept.bias.element_size()
        self.entries.append(counts)
        per_entry = head_dim * (kept.keys.element_size() + kept.values.element_size())
        self.kv_bytes += sum(counts) * per_entry


@dataclass(frozen=True)
class Fidelity:
    """How far a row's next-token distributions are from the full cache's, along the same answer."""

    kl: float
    """Mean KL(full || row) in nats over the positions."""
    top1: float
    """Share of positions where both would choose the same token."""
    tokens: int
    """Positions compared: the second token of the full cache's answer to its last, stop included."""


@dataclass
class RowResult:
    """One answer."""

    token_ids: list[int]
    """Generated tokens, the stop token included where one ended the answer."""
    stats: RowStats
    fidelity: Fidelity | None = None


@dataclass
class Timing:
    """Seconds spent on a sample, shared by its rows."""

    prefill: float = 0.0
    decode: float = 0.0
    fidelity: float = 0.0


Observer = Callable[[int, int, PrefillLayer, Entries], None]
"""Called with (row, layer index, layer, what the row kept) as each layer is compressed."""


class Comparison:
    """The session of one sample: holds every row's cache between the forward passes."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        sample_id: str = "",
        observer: Observer | None = None,
    ) -> None:
        """Prepare rows for a model that is hooked (see `run_sample`)."""
        self.model = model
        self.rows = list(rows)
        self.sample_id = sample_id
        self.observer = observer
        self.stats = [RowStats() for _ in rows]
        self.layers: list[LayerCache] = []
        self.order: list[int] = []
        self.timing = Timing()
        self._capacity = 0
        self._prompt_length = 0

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, capacity: int) -> Tensor:
        """Run the prompt once, compressing each layer for every row as it finishes.

        Args:
            input_ids: `(1, T)`.
            capacity: new entries that each row must have room for.

        Returns:
            `(vocabulary,)` float32 logits of the first answer token, the same for every row.
        """
        check_sliding_window(self.model, input_ids.shape[1], capacity)
        started = time.perf_counter()
        self._capacity, self._prompt_length = capacity, input_ids.shape[1]
        positions = torch.arange(self._prompt_length, device=input_ids.device).unsqueeze(0)
        logits = forward(self.model, self, input_ids, positions, logits_to_keep=1)[0, -1].float()
        self.order = list(range(len(self.rows)))
        self.timing.prefill += time.perf_counter() - started
        return logits

    def attend(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attention of one layer, called by the model (see `kvmerge.attention.Session`)."""
        if layer_idx < len(self.layers):
            return self.layers[layer_idx].attend(self.order, queries, keys, values, scale)
        out, lse = prefill_attention(queries, keys, values, scale)
        length = keys.shape[2]
        wants_scores = any(
            row.method.needs_scores and (row.budget.entries(length) < length or row.acts_on_decode)
            for row in self.rows
        )
        layer = PrefillLayer(
            queries=queries,
            keys=keys,
            values=values,
            scores=column_sums(queries, keys, lse, scale=scale) if wants_scores else None,
            layer_idx=layer_idx,
            num_layers=self.model.config.num_hidden_layers,
            scale=scale,
        )
        check_finite(layer)
        compressed = [self._compress(row, layer) for row in range(len(self.rows))]
        holds = [self._hold_rule(row, layer_idx) for row in self.rows]
        self.layers.append(LayerCache(compressed, self._capacity, holds, length))
        return out

    def _compress(self, index: int, layer: PrefillLayer) -> Entries:
        row = self.rows[index]
        allowance = self._allowance(row, layer.layer_idx)
        if allowance.n_keep >= layer.length and not row.method.acts_on_decode:
            kept = keep_all(layer)
        else:
            kept = row.method.compress(layer, allowance)
        self.stats[index].add_layer(kept)
        if self.observer is not None:
            self.observer(index, layer.layer_idx, layer, kept)
        return kept

    def _allowance(self, row: Row, layer_idx: int, step: int | None = None) -> Allowance:
        length, generator = self._prompt_length, None
        if row.method.stochastic:
            generator = seeded_generator(row.seed, self.sample_id, layer_idx, step)
        return Allowance(row.budget.entries(length), row.budget.fraction(length), generator)

    def _hold_rule(self, row: Row, layer_idx: int) -> Hold | None:
        if not row.acts_on_decode:
            return None

        def hold(entries: Entries, weights: Tensor, step: int) -> Entries:
            allowance = self._allowance(row, layer_idx, step)
            return row.method.hold(entries, DecodeStep(weights, self._prompt_length, step, allowance))

        return hold

    @torch.inference_mode()
    def decode(self, first_logits: Tensor, stop: Stop) -> list[list[int]]:
        """Greedy decoding of all rows together; a finished row leaves the batch.

        Args:
            first_logits: `(vocabulary,)` as `prefill` returns them.

        Returns:
            Generated token ids of each row, the stop token included where one ended the answer.
        """
        started = time.perf_counter()
        device = first_logits.device
        stop_ids = torch.tensor(sorted(stop.token_ids), dtype=torch.long, device=device)
        answers: list[list[int]] = [[] for _ in self.rows]
        logits = first_logits.expand(len(self.rows), -1)
        for step in range(stop.max_new_tokens):
            if step < stop.min_new_tokens:
                logits = logits.index_fill(-1, stop_ids, -math.inf)
            tokens = logits.argmax(dim=-1)
            for row, token in zip(list(self.order), tokens.tolist(), strict=True):
                answers[row].append(token)
                if token in stop.token_ids:
                    self._retire(row)
            if not self.order or step + 1 == stop.max_new_tokens:
                break
            fed = torch.tensor([[answers[row][-1]] for row in self.order], device=device)
            logits = self._step(fed, step)[:, -1]
        self.timing.decode += time.perf_counter() - started
        return answers

    def _retire(self, row: int) -> None:
        self.order.remove(row)
        for layer in self.layers:
            layer.retire(row)

    def _step(self, tokens: Tensor, generated: int) -> Tensor:
        """Feed `(rows, n)` tokens after `generated` answer tokens; logits `(rows, n, vocabulary)`."""
        begin = self._prompt_length + generated  # the true position, not the length of the cache
        positions = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)
        return forward(self.model, self, tokens, positions.expand(tokens.shape))

    def replay(self, answer: Sequence[int]) -> Iterator[Tensor]:
        """Feed an answer to every row, from its state after prefill, and yield the logits.

        Args:
            answer: token ids; the logits after each but the last are yielded.

        Yields:
            `(rows, n, vocabulary)` float32 logits of the tokens that follow, `n` at most 64.
        """
        self.order = list(range(len(self.rows)))
        for layer in self.layers:
            layer.rewind()
        fed = torch.tensor([answer[:-1]], device=self.model.device).expand(len(self.rows), -1)
        for begin in range(0, fed.shape[1], _REPLAY_TOKENS):
            yield self._step(fed[:, begin : begin + _REPLAY_TOKENS], begin).float()

    @torch.inference_mode()
    def fidelity(self, reference: int, answer: Sequence[int]) -> list[Fidelity | None]:
        """Compare every row with a reference along the reference's answer, teacher forced.

        The first token is left out, since no method can change it; the stop position is in.

        Args:
            reference: index of the row that stands for the full cache.
            answer: its answer, the stop token included.

        Returns:
            A figure for each row; None where the answer has only one token.
        """
        tokens = len(answer) - 1
        if tokens < 1:
            return [None] * len(self.rows)
        started = time.perf_counter()
        divergence = torch.zeros(len(self.rows), dtype=torch.float64)
        agreement = torch.zeros(len(self.rows), dtype=torch.float64)
        for logits in self.replay(answer):
            best = logits.argmax(dim=-1)
            log_p = logits.log_softmax(dim=-1)
            full = log_p[reference]
            for row in range(len(self.rows)):  # one at a time: a vocabulary is large
                kl = (full.exp() * (full - log_p[row])).sum()
                divergence[row] += float(kl)
                agreement[row] += int((best[row] == best[reference]).sum())
        self.timing.fidelity += time.perf_counter() - started
        return [
            Fidelity(max(0.0, float(kl) / tokens), float(same) / tokens, tokens)
            for kl, same in zip(divergence, agreement, strict=True)
        ]


def run_sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    rows: Sequence[Row],
    stop: Stop,
    *,
    sample_id: str = "",
    reference: int | None = None,
    observer: Observer | None = None,
) -> tuple[list[RowResult], Timing]:
    """Answer one prompt with every row.

    Args:
        model: any supported decoder; its attention implementation is replaced for the call.
        input_ids: `(1, T)` prompt.
        rows: the cells to run.
        stop: when answers end.
        sample_id: seeds the methods that draw, together with each row's seed and the layer.
        reference: row to compute fidelity figures against, normally the full cache; None: none.
        observer: called with every compressed layer.

    Raises:
        UserError: if the model cannot hold prompt and answer, or a method the budget.
    """
    comparison = Comparison(model, rows, sample_id, observer)
    with hooked(model):
        logits = comparison.prefill(input_ids, stop.max_new_tokens)
        answers = comparison.decode(logits, stop)
        fidelity: list[Fidelity | None] = [None] * len(rows)
        if reference is not None:
            fidelity = comparison.fidelity(reference, answers[reference])
    results = [
        RowResult(answer, stats, figures)
        for answer, stats, figures in zip(answers, comparison.stats, fidelity, strict=True)
    ]
    return results, comparison.timing


def seeded_generator(
    seed: int, sample_id: str, layer_idx: int, step: int | None = None
) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments, on any machine.

    `step` is None for the prefill, and counts the decode steps of methods that draw there.
    """
    parts = [seed, sample_id, layer_idx, *([] if step is None else [step])]
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_sliding_window(model: PreTrainedModel, prompt: int, answer: int) -> None:
    """Refuse what does not fit a model's sliding window, which this engine does not apply."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return
    if prompt + answer > window:
        raise UserError(
            f"{config.model_type} attends only within a sliding window of {window} tokens; the prompt "
            f"has {prompt} and the answer up to {answer}. Shorten the prompt (model.max_length) or "
            "choose a model without a sliding window."
        )


def check_finite(layer: PrefillLayer) -> None:
    """Refuse keys, values or scores that are not finite, naming the layer and the KV head."""
    for name, tensor in (("keys", layer.keys), ("values", layer.values), ("scores", layer.scores)):
        if tensor is None or bool(tensor.sum().isfinite()):
            continue
        bad = ~tensor.isfinite().flatten(2).all(dim=-1)[0]
        if bool(bad.any()):
            raise UserError(
                f"{name} of layer {layer.layer_idx}, KV head {int(bad.nonzero()[0])} are not finite; "
                "the model overflows in this dtype. Try model.dtype=float32 or bfloat16."
            )
