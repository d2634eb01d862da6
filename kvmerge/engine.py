"""One prefill serves every cell of a comparison, and the cells decode together as one batch.

All methods here leave the prefill untouched: hidden states are those of full attention, and a method
only decides, layer by layer, what stays in the cache. So each layer, as it finishes, is handed to the
compressor of every cell and then freed; the cells are the rows of one batch from then on. Running a
single cell is the same code with one row.

Since compression happens after the prompt's attention, the first answer token is the same for every
method and budget; what a method changes shows from the second on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.attention import forward, hooked
from kvmerge.method import Entries, PrefillLayer
from kvmerge.session import Observer, Row, RowStats, check_sliding_window, session_for

_REPLAY_TOKENS = 64
"""Tokens fed at once when an answer is replayed: bounds the logits alive to rows x 64 x vocabulary."""


@dataclass(frozen=True)
class Stop:
    """When an answer ends."""

    max_new_tokens: int
    token_ids: frozenset[int]
    """Tokens that end the answer; the one that does is not part of its text."""
    min_new_tokens: int = 0
    """No stop token is chosen before this many tokens."""


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
    nll: float | None = None
    """Negative log-likelihood in nats of a given continuation, summed over all its tokens."""


@dataclass
class Timing:
    """Seconds spent on a sample, shared by its rows."""

    prefill: float = 0.0
    decode: float = 0.0
    fidelity: float = 0.0


class Comparison:
    """One sample, from prompt to answers."""

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
        self.session = session_for(model, rows, [sample_id], observer)
        self.timing = Timing()
        self._prompt_length = 0

    @property
    def stats(self) -> list[RowStats]:
        """What each row keeps of the prompt."""
        return self.session.stats

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
        self._prompt_length = input_ids.shape[1]
        self.session.begin([self._prompt_length], capacity)
        positions = torch.arange(self._prompt_length, device=input_ids.device).unsqueeze(0)
        logits = forward(self.model, self.session, input_ids, positions, logits_to_keep=1)
        self.timing.prefill += time.perf_counter() - started
        return logits[0, -1].float()

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
            for row, token in zip(list(self.session.order), tokens.tolist(), strict=True):
                answers[row].append(token)
                if token in stop.token_ids:
                    self.session.retire(row)
            if not self.session.order or step + 1 == stop.max_new_tokens:
                break
            fed = torch.tensor([[answers[row][-1]] for row in self.session.order], device=device)
            logits = self._step(fed, step)[:, -1]
        self.timing.decode += time.perf_counter() - started
        return answers

    def _step(self, tokens: Tensor, generated: int) -> Tensor:
        """Feed `(rows, n)` tokens after `generated` answer tokens; logits `(rows, n, vocabulary)`."""
        begin = self._prompt_length + generated  # the true position, not the length of the cache
        positions = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)
        return forward(self.model, self.session, tokens, positions.expand(tokens.shape))

    def replay(self, answer: Sequence[int]) -> Iterator[Tensor]:
        """Feed an answer to every row, from its state after prefill, and yield the logits.

        Args:
            answer: token ids; the logits after each but the last are yielded.

        Yields:
            `(rows, n, vocabulary)` float32 logits of the tokens that follow, `n` at most 64.
        """
        self.session.rewind()
        fed = torch.tensor([answer[:-1]], device=self.model.device).expand(len(self.rows), -1)
        for begin in range(0, fed.shape[1], _REPLAY_TOKENS):
            yield self._step(fed[:, begin : begin + _REPLAY_TOKENS], begin).float()


@torch.inference_mode()
def fidelity(replays: Sequence[Iterator[Tensor]], reference: int, tokens: int) -> list[Fidelity | None]:
    """Compare every row with a reference along the reference's answer, teacher forced.

    The first token is left out, since it is decided before anything is compressed; the stop position
    is in.

    Args:
        replays: logits of one or several comparisons along the same answer (`Comparison.replay`);
            their rows are numbered through.
        reference: the row that stands for the full cache.
        tokens: tokens of the answer, the stop token included.

    Returns:
        A figure for each row; None where the answer has only one token.
    """
    divergence: list[float] = []
    agreement: list[int] = []
    for parts in zip(*replays, strict=True):
        logits = torch.cat(parts)
        best, log_p = logits.argmax(dim=-1), logits.log_softmax(dim=-1)
        full = log_p[reference]
        divergence = divergence or [0.0] * len(logits)
        agreement = agreement or [0] * len(logits)
        for row in range(len(logits)):  # one at a time: a vocabulary is large
            divergence[row] += float((full.exp() * (full - log_p[row])).sum())
            agreement[row] += int((best[row] == best[reference]).sum())
    return [
        Fidelity(max(0.0, kl / (tokens - 1)), same / (tokens - 1), tokens - 1)
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
    order, comparisons = _comparisons(model, rows, sample_id, observer)
    answers: list[list[int]] = []
    figures: list[Fidelity | None] = [None] * len(rows)
    with hooked(model):
        for comparison in comparisons:
            logits = comparison.prefill(input_ids, stop.max_new_tokens)
            answers += comparison.decode(logits, stop)
        if reference is not None:
            answer = answers[order.index(reference)]
            started = time.perf_counter()
            if len(answer) > 1:
                replays = [comparison.replay(answer) for comparison in comparisons]
                figures = fidelity(replays, order.index(reference), len(answer))
            comparisons[0].timing.fidelity += time.perf_counter() - started
    return _in_order(order, comparisons, answers, figures)


@torch.inference_mode()
def score_continuation(
    model: PreTrainedModel,
    input_ids: Tensor,
    continuation: Sequence[int],
    rows: Sequence[Row],
    *,
    sample_id: str = "",
    reference: int | None = None,
    observer: Observer | None = None,
) -> tuple[list[RowResult], Timing]:
    """Measure how likely a given text is after the prompt, fed to every row's compressed cache.

    The first token's probability comes from the prefill, so it is the same for every row. Fidelity
    figures are taken along the continuation. Arguments and errors otherwise as in `run_sample`.

    Args:
        continuation: token ids, at least one.

    Returns:
        a result for each row, its `nll` set and without tokens; the time spent.
    """
    order, comparisons = _comparisons(model, rows, sample_id, observer)
    targets = torch.tensor(continuation, device=model.device)
    figures: list[Fidelity | None] = [None] * len(rows)
    totals: list[list[float]] = []
    with hooked(model):
        for comparison in comparisons:
            first = comparison.prefill(input_ids, len(continuation))
            start = -float(first.log_softmax(dim=-1)[targets[0]])
            totals.append([start] * len(comparison.rows))
        started = time.perf_counter()
        if len(continuation) > 1:
            replays = [
                _weighed(comparison.replay(continuation), targets[1:], nll)
                for comparison, nll in zip(comparisons, totals, strict=True)
            ]
            if reference is not None:
                figures = fidelity(replays, order.index(reference), len(continuation))
            for replay in replays:
                for _ in replay:
                    pass
        comparisons[0].timing.decode += time.perf_counter() - started
    results, timing = _in_order(order, comparisons, [[] for _ in rows], figures)
    for row, nll in zip(order, (nll for of_rows in totals for nll in of_rows), strict=True):
        results[row].nll = nll
    return results, timing


def _weighed(replay: Iterator[Tensor], targets: Tensor, nll: list[float]) -> Iterator[Tensor]:
    """Pass logits on, adding to each row's `nll` what the tokens that follow cost."""
    for logits in replay:
        wanted, targets = targets[: logits.shape[1]], targets[logits.shape[1] :]
        for row, of_row in enumerate(logits):  # one at a time: a vocabulary is large
            nll[row] += float(torch.nn.functional.cross_entropy(of_row, wanted, reduction="sum"))
        yield logits


def _in_order(
    order: Sequence[int],
    comparisons: Sequence[Comparison],
    answers: Sequence[list[int]],
    figures: Sequence[Fidelity | None],
) -> tuple[list[RowResult], Timing]:
    """Results in the order that the rows were given in, and the time of all comparisons."""
    stats = [row_stats for comparison in comparisons for row_stats in comparison.stats]
    results = {
        row: RowResult(answer, row_stats, figure)
        for row, answer, row_stats, figure in zip(order, answers, stats, figures, strict=True)
    }
    timing = Timing(
        prefill=sum(comparison.timing.prefill for comparison in comparisons),
        decode=sum(comparison.timing.decode for comparison in comparisons),
        fidelity=sum(comparison.timing.fidelity for comparison in comparisons),
    )
    return [results[row] for row in range(len(order))], timing


def _comparisons(
    model: PreTrainedModel, rows: Sequence[Row], sample_id: str, observer: Observer | None
) -> tuple[list[int], list[Comparison]]:
    """One comparison for the rows that share a prefill, and one for each that alters it.

    Returns:
        the rows' indices in the order of the comparisons' rows; the comparisons.
    """
    shared = [index for index, row in enumerate(rows) if not row.method.alters_prefill]
    alone = [[index] for index, row in enumerate(rows) if row.method.alters_prefill]
    groups = [group for group in (shared, *alone) if group]
    comparisons = []
    for group in groups:
        watch = None if observer is None else _renumbered(observer, group)
        comparisons.append(Comparison(model, [rows[i] for i in group], sample_id, watch))
    return [index for group in groups for index in group], comparisons


def _renumbered(observer: Observer, indices: Sequence[int]) -> Observer:
    """An observer that is told the rows' indices in the whole list."""

    def watch(row: int, layer_idx: int, layer: PrefillLayer, kept: Entries) -> None:
        observer(indices[row], layer_idx, layer, kept)

    return watch
