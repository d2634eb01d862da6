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
from kvmerge.session import CacheSession, Observer, Row, RowStats, check_sliding_window

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
        self.session = CacheSession(rows, model.config.num_hidden_layers, [sample_id], observer)
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
