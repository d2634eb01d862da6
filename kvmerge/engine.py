"""One prefill serves every cell of a comparison, and the cells decode together as one batch.

All methods here leave the prefill untouched: hidden states are those of full attention, and a method
only decides, layer by layer, what stays in the cache. So each layer, as it finishes, is handed to the
compressor of every cell and then freed; the cells are the rows of one batch from then on. Running a
single cell is the same code with one row, and so are several samples: each has a prefill of its own,
and the rows of all decode together.

Since compression happens after the prompt's attention, the first answer token is the same for every
method and budget; what a method changes shows from the second on. Where a question comes after the
compression (`Request.question`), it shows from the first: the prompt is then a context, whose
compressed caches serve every question about it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.errors import NotFinite, UserError
from kvmerge.hook import forward, hooked
from kvmerge.limits import check_fits, is_past_the_switch
from kvmerge.method import Entries, PrefillLayer
from kvmerge.proof import UnprovenError
from kvmerge.session import (
    DEFAULT_POLICY,
    CacheSession,
    Observer,
    Policy,
    Row,
    RowStats,
    Stages,
    session_for,
)
from kvmerge.softmax import Softmax

REPLAY_TOKENS = 512
"""Tokens fed at once when a text is replayed, over all rows: bounds the logits that are alive."""


@dataclass(frozen=True)
class Stop:
    """When an answer ends."""

    max_new_tokens: int
    token_ids: frozenset[int]
    """Tokens that end the answer; the one that does is not part of its text."""
    min_new_tokens: int = 0
    """No stop token is chosen before this many tokens."""

    def reason(self, answer: Sequence[int]) -> Literal["stop", "length"]:
        """Return what ended an answer: a stop token, be it the last that was allowed, or the limit."""
        return "stop" if answer and answer[-1] in self.token_ids else "length"


@dataclass(frozen=True)
class Request:
    """One prompt and what is to be run on it."""

    input_ids: Tensor
    """`(1, T)`: the prompt, or the context where there is a question."""
    rows: Sequence[Row]
    sample_id: str = ""
    """Seeds the methods that draw, together with each row's seed and the layer."""
    reference: int | None = None
    """Row to compute fidelity figures against, normally the full cache; None: none."""
    observer: Observer | None = None
    """Called with every compressed layer."""
    policy: Policy = DEFAULT_POLICY
    """The switches of all rows."""
    stages: Stages = nullcontext
    """Watches where the time goes."""
    context: int | None = None
    """Positions that prompt and answer may take; None: the model's own."""
    may_overrun: bool = False
    """Whether they may take more: only protocols that are known to."""
    question: Tensor | None = None
    """`(1, n)`: the end of the prompt, fed to every row after its compression; None: the prompt is
    whole. Requests of one context with equal rows and `sample_id` share its prefill and its caches."""


@dataclass(frozen=True)
class Fidelity:
    """How far a row's next-token distributions are from the full cache's, along the same text."""

    kl: float
    """Mean KL(full || row) in nats over the positions."""
    top1: float
    """Share of positions where both would choose the same token."""
    tokens: int
    """Positions compared: the second token of the text, or after a question the first, to its last, a
    stop token included."""


@dataclass
class RowResult:
    """What became of one row."""

    token_ids: list[int]
    """Generated tokens, the stop token included where one ended the answer."""
    stats: RowStats
    fidelity: Fidelity | None = None
    nll: float | None = None
    """Negative log-likelihood in nats of a given continuation, summed over all its tokens."""
    finish_reason: Literal["stop", "length"] | None = None
    """What ended a generated answer: a stop token, or the most tokens that it may have."""


@dataclass
class Timing:
    """Seconds spent on a sample, shared by its rows; on a batch of samples, an equal part each."""

    prefill: float = 0.0
    decode: float = 0.0
    fidelity: float = 0.0


Result = tuple[list[RowResult], Timing]
"""A result for each row of a request, in its order; the time spent."""


class Comparison:
    """One prompt's rows, from the prefill that they share."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        sample_id: str = "",
        observer: Observer | None = None,
        policy: Policy = DEFAULT_POLICY,
        stages: Stages = nullcontext,
    ) -> None:
        """Prepare rows for a model that is hooked (see `run_samples`)."""
        self.model = model
        self.rows = list(rows)
        self.session = session_for(model, rows, [sample_id], observer, policy, stages)
        self.prompt_length = 0
        self.question = torch.empty(1, 0, dtype=torch.long)
        """`(1, n)` tokens between the prompt and the answers."""
        self.first_logits = torch.empty(0)
        """`(rows, vocabulary)` float32 logits of the first answer token; without a question the same
        for every row."""

    @property
    def stats(self) -> list[RowStats]:
        """What each row keeps of the prompt."""
        return self.session.stats

    @torch.inference_mode()
    def alone(self, row: int, text: Sequence[int]) -> Iterator[Tensor]:
        """Yield the logits `(n, vocabulary)` that one row, without the others, gives a text.

        Those of the question come first.
        """
        self.session.rewind()
        for other in range(len(self.rows)):
            if other != row:
                self.session.retire(other)
        decoder = Decoder([self])
        begin = -self.question.shape[1]
        fed = torch.tensor([[*self.question[0].tolist(), *text[:-1]]], device=self.model.device)
        for piece in fed.split(REPLAY_TOKENS, dim=1):
            yield decoder.feed(piece, begin)[0].cpu()
            begin += piece.shape[1]

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, capacity: int) -> Tensor:
        """Run the prompt once, compressing each layer for every row as it finishes.

        Args:
            input_ids: `(1, T)`.
            capacity: new entries that each row must have room for.

        Returns:
            `(vocabulary,)` float32 logits of the token after the prompt.
        """
        self.prompt_length = input_ids.shape[1]
        self.session.begin([self.prompt_length], capacity)
        positions = torch.arange(self.prompt_length, device=input_ids.device).unsqueeze(0)
        logits = forward(self.model, self.session, input_ids, positions, logits_to_keep=1)
        last = logits[0, -1].float()
        self.first_logits = last.expand(len(self.rows), -1)
        return last

    @torch.inference_mode()
    def ask(self, question: Tensor) -> None:
        """Feed every row a question `(1, n)`, from its state after prefill; answers follow it."""
        self.session.rewind()
        self.question = question
        decoder = Decoder([self])
        begin = -question.shape[1]
        for piece in question.split(max(1, REPLAY_TOKENS // len(self.rows)), dim=1):
            logits = decoder.feed(piece.expand(len(self.rows), -1), begin, logits_to_keep=1)
            begin += piece.shape[1]
        self.first_logits = logits[:, -1].float()


class Decoder:
    """Comparisons after their prefill, decoded as one batch.

    The batch holds the rows of the first comparison, then those of the second, and so on; each
    comparison's session attends for its own.
    """

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        """Take over comparisons of one model, at least one."""
        self.comparisons = list(comparisons)
        self.model = self.comparisons[0].model

    def attend(
        self, layer_idx: int, queries: Tensor, keys: Tensor, values: Tensor, softmax: Softmax
    ) -> Tensor:
        """Attend in one layer; the model calls it (see `kvmerge.hook.Session`)."""
        parts = []
        begin = 0
        for comparison in self.comparisons:
            rows = slice(begin, begin + len(comparison.session.order))
            begin = rows.stop
            if rows.stop > rows.start:
                states = queries[rows], keys[rows], values[rows]
                parts.append(comparison.session.attend(layer_idx, *states, softmax))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def place(self, positions: Tensor | None) -> None:
        """Hold the positions of new tokens against the texts (see `kvmerge.hook.Session`)."""
        begin = 0
        for session in self._sessions():
            rows = slice(begin, begin + len(session.order))
            begin = rows.stop
            session.place(None if positions is None else positions[rows])

    def passed(self) -> None:
        """End a forward pass (see `kvmerge.hook.Session`)."""
        for session in self._sessions():
            session.passed()

    @torch.inference_mode()
    def decode(self, stop: Stop) -> list[list[list[int]]]:
        """Decode all rows together, greedily; a finished row leaves the batch.

        Returns:
            Generated token ids by comparison and row, the stop token included where one ended the
            answer.
        """
        device = self.model.device
        stop_ids = torch.tensor(sorted(stop.token_ids), dtype=torch.long, device=device)
        answers: list[list[list[int]]] = [[[] for _ in each.rows] for each in self.comparisons]
        logits = torch.cat([each.first_logits for each in self.comparisons])
        for step in range(stop.max_new_tokens):
            if step < stop.min_new_tokens:
                logits = logits.index_fill(-1, stop_ids, -math.inf)
            tokens = logits.argmax(dim=-1)
            self._check_finite(logits, tokens)
            for (index, row), token in zip(self._active(), tokens.tolist(), strict=True):
                answers[index][row].append(token)
                if token in stop.token_ids:
                    self.comparisons[index].session.retire(row)
            active = self._active()
            if not active or step + 1 == stop.max_new_tokens:
                break
            fed = torch.tensor([[answers[index][row][-1]] for index, row in active], device=device)
            logits = self.feed(fed, step)[:, -1]
        return answers

    def _check_finite(self, logits: Tensor, tokens: Tensor) -> None:
        """Refuse logits `(slots, vocabulary)` that are not finite, by those of the chosen tokens.

        Nothing exceeds NaN or infinity, so they are chosen wherever they are.

        Raises:
            NotFinite: naming the first row.
        """
        chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        if not bool(chosen.isfinite().all()):
            index, row = self._active()[int(chosen.isfinite().logical_not().nonzero()[0])]
            raise _not_finite(self.comparisons[index], row)

    @torch.inference_mode()
    def replay(self, texts: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
        """Feed each comparison's rows a text of its own, from where its answers begin.

        Args:
            texts: token ids, one text a comparison; the logits after each but the last are yielded.

        Yields:
            for each comparison, `(rows, n, vocabulary)` logits of the tokens that follow. `n` may
            differ between comparisons, and is 0 where a text has ended.
        """
        for comparison in self.comparisons:
            comparison.session.rewind(comparison.question.shape[1])
        lengths = [len(text) - 1 for text in texts]
        rows = [index for index, each in enumerate(self.comparisons) for _ in each.rows]
        chunk = max(1, REPLAY_TOKENS // len(rows))
        for begin in range(0, max(lengths), chunk):
            width = min(chunk, max(lengths) - begin)
            fed = torch.zeros(len(rows), width, dtype=torch.long)  # what follows a text is not read
            for slot, index in enumerate(rows):
                piece = texts[index][begin : begin + width]
                fed[slot, : len(piece)] = torch.tensor(piece)
            logits = self.feed(fed.to(self.model.device), begin)
            by_comparison = logits.split([len(each.rows) for each in self.comparisons])
            yield [
                of_rows[:, : max(0, length - begin)]
                for of_rows, length in zip(by_comparison, lengths, strict=True)
            ]

    def _sessions(self) -> list[CacheSession]:
        """Return the sessions that have a row in the batch, in its order."""
        return [each.session for each in self.comparisons if each.session.order]

    def _active(self) -> list[tuple[int, int]]:
        """Return the comparison and row of each slot of the batch."""
        return [(i, row) for i, each in enumerate(self.comparisons) for row in each.session.order]

    def feed(self, tokens: Tensor, generated: int, logits_to_keep: int = 0) -> Tensor:
        """Feed `(slots, n)` tokens that follow `generated` others after each prompt and question.

        Args:
            tokens: a slot is an active row, in batch order.
            generated: negative for the question's own tokens.
            logits_to_keep: logits of only the last tokens; 0 means all.

        Returns:
            `(slots, n or logits_to_keep, vocabulary)` logits.
        """
        # the true positions, not the lengths of the caches
        begins = [each.prompt_length + each.question.shape[1] for each in self.comparisons]
        begin = torch.tensor([begins[i] + generated for i, _ in self._active()], device=tokens.device)
        positions = begin.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
        return forward(self.model, self, tokens, positions, logits_to_keep=logits_to_keep)


class Tally:
    """What the rows of one sample make of a text, added up piece by piece."""

    def __init__(
        self,
        text: Sequence[int],
        first_logits: Sequence[Tensor],
        reference: int | None,
        asked: bool = False,
    ):
        """Count the first token of the text.

        Args:
            text: token ids, at least one.
            first_logits: `(vocabulary,)` of each row.
            reference: the row that stands for the full cache; None: no fidelity.
            asked: whether a question came after the compression; else the first token is decided before
                anything is compressed, and not compared.
        """
        self.text = text
        self.reference = reference
        self.nll = [0.0] * len(first_logits)
        self.divergence = [0.0] * len(self.nll)
        self.agreement = [0] * len(self.nll)
        self.moved = [0] * len(self.nll)
        """By row, tokens whose logits are not the reference's, bit for bit."""
        self.compared = 0
        """Tokens whose logits were compared with the reference's."""
        self._next = 0
        self._count([logits.unsqueeze(0) for logits in first_logits], compared=asked)

    def add(self, rows: Sequence[Tensor]) -> None:
        """Count the next tokens by the logits `(n, vocabulary)` that each row gives them."""
        self._count(rows, compared=True)

    def _count(self, rows: Sequence[Tensor], *, compared: bool) -> None:
        begin, count = self._next, len(rows[0])
        wanted = torch.tensor(self.text[begin : begin + count], device=rows[0].device)
        self._next += count
        self.compared += count if compared else 0
        reference = self.reference or 0
        is_compared = compared and self.reference is not None
        full = rows[reference].float().log_softmax(dim=-1) if is_compared else None
        for row, logits in enumerate(rows):  # one at a time: a vocabulary is large
            log_p = logits.float().log_softmax(dim=-1)
            self.nll[row] -= float(log_p.gather(-1, wanted.unsqueeze(-1)).sum())
            if full is not None:
                self.divergence[row] += float((full.exp() * (full - log_p)).sum())
                self.agreement[row] += int((log_p.argmax(-1) == full.argmax(-1)).sum())
                self.moved[row] += int((logits != rows[reference]).any(-1).sum())

    def fidelity(self) -> list[Fidelity | None]:
        """Return a figure for each row: None without a reference, or where nothing was compared."""
        if self.reference is None or not self.compared:
            return [None] * len(self.nll)
        return [
            Fidelity(max(0.0, kl / self.compared), same / self.compared, self.compared)
            for kl, same in zip(self.divergence, self.agreement, strict=True)
        ]


def run_samples(model: PreTrainedModel, requests: Sequence[Request], stop: Stop) -> list[Result]:
    """Answer several prompts with every row of each: a prefill a prompt, one batch for decoding.

    Args:
        model: any supported decoder; its attention implementation is replaced for the call.
        requests: the prompts.
        stop: when answers end.

    Raises:
        UserError: if the model cannot hold a prompt and its answer, or a method the budget.
    """
    parts = _parts(model, requests, [stop.max_new_tokens] * len(requests))
    return _in_order(parts, lambda part: _generate(model, [requests[i] for i in part], stop))


def _generate(model: PreTrainedModel, requests: Sequence[Request], stop: Stop) -> list[Result]:
    results: dict[int, Result] = {}
    with hooked(model):
        for part in _rounds(model, requests, [stop.max_new_tokens] * len(requests)):
            samples = [_Sample(context, requests[index]) for index, context in part]
            answered = _generate_together(samples, stop)
            results |= zip([index for index, _ in part], answered, strict=True)
    return [results[index] for index in range(len(requests))]


def _generate_together(samples: Sequence[_Sample], stop: Stop) -> list[Result]:
    started = time.perf_counter()
    of_comparisons = iter(Decoder(_comparisons(samples)).decode(stop))
    answers = [
        [answer for _ in sample.comparisons for answer in next(of_comparisons)] for sample in samples
    ]
    decoded = time.perf_counter()
    compared = [index for index, sample in enumerate(samples) if sample.reference is not None]
    texts = [answers[index][samples[index].reference or 0] for index in compared]
    tallies = dict(zip(compared, _tally([samples[index] for index in compared], texts), strict=True))
    replayed = time.perf_counter()
    shares = (decoded - started) / len(samples), (replayed - decoded) / len(samples)
    results = []
    for index, (sample, of_rows) in enumerate(zip(samples, answers, strict=True)):
        figures = tallies[index].fidelity() if index in tallies else [None] * len(of_rows)
        rows = [
            RowResult(answer, stats, figure, finish_reason=stop.reason(answer))
            for answer, stats, figure in zip(of_rows, sample.stats, figures, strict=True)
        ]
        results.append((sample.in_order(rows), Timing(sample.seconds, *shares)))
    return results


def run_sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    rows: Sequence[Row],
    stop: Stop,
    *,
    sample_id: str = "",
    reference: int | None = None,
    observer: Observer | None = None,
    policy: Policy = DEFAULT_POLICY,
    stages: Stages = nullcontext,
) -> Result:
    """Answer one prompt `(1, T)` with every row: `run_samples` of one `Request`."""
    request = Request(input_ids, rows, sample_id, reference, observer, policy, stages)
    return run_samples(model, [request], stop)[0]


def score_continuations(
    model: PreTrainedModel, requests: Sequence[Request], texts: Sequence[Sequence[int]]
) -> list[Result]:
    """Measure how likely a given text is after each prompt, fed to every row's compressed cache.

    The first token's probability comes from the prefill, so it is the same for every row. Fidelity
    figures are taken along the text. Errors as in `run_samples`.

    Args:
        model: any supported decoder.
        requests: the prompts.
        texts: for each, token ids, at least one.

    Returns:
        results with `nll` set and without tokens.
    """
    parts = _parts(model, requests, [len(text) for text in texts])
    return _in_order(
        parts, lambda part: _score(model, [requests[i] for i in part], [texts[i] for i in part])
    )


def _score(
    model: PreTrainedModel, requests: Sequence[Request], texts: Sequence[Sequence[int]]
) -> list[Result]:
    results: dict[int, Result] = {}
    with hooked(model):
        for part in _rounds(model, requests, [len(text) for text in texts]):
            samples = [_Sample(context, requests[index]) for index, context in part]
            scored = _score_together(samples, [texts[index] for index, _ in part])
            results |= zip([index for index, _ in part], scored, strict=True)
    return [results[index] for index in range(len(requests))]


def _score_together(samples: Sequence[_Sample], texts: Sequence[Sequence[int]]) -> list[Result]:
    started = time.perf_counter()
    tallies = _tally(samples, texts)
    seconds = (time.perf_counter() - started) / len(samples)
    results = []
    for sample, tally in zip(samples, tallies, strict=True):
        rows = [
            RowResult([], stats, figure, nll)
            for stats, figure, nll in zip(sample.stats, tally.fidelity(), tally.nll, strict=True)
        ]
        results.append((sample.in_order(rows), Timing(sample.seconds, decode=seconds)))
    return results


def _parts(
    model: PreTrainedModel, requests: Sequence[Request], answers: Sequence[int]
) -> list[list[int]]:
    """Refuse what the model cannot hold; return which requests its rotation can serve together.

    Args:
        answers: the most tokens that each request's answer may have.
    """
    sides: dict[bool, list[int]] = {}
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        length = request.input_ids.shape[1]
        check_fits(
            model.config,
            length,
            _asked(request) + answer,
            context=request.context,
            may_overrun=request.may_overrun,
        )
        sides.setdefault(is_past_the_switch(model.config, length), []).append(index)
    return list(sides.values())


def _in_order(
    parts: Sequence[Sequence[int]], run: Callable[[Sequence[int]], Sequence[Result]]
) -> list[Result]:
    """Run parts of a list of requests one after the other; return the results in the list's order."""
    results: dict[int, Result] = {}
    for part in parts:
        results |= zip(part, run(part), strict=True)
    return [results[index] for index in sorted(results)]


def _asked(request: Request) -> int:
    """Return the tokens of a request's question."""
    return 0 if request.question is None else request.question.shape[1]


def _rounds(
    model: PreTrainedModel, requests: Sequence[Request], answers: Sequence[int]
) -> Iterator[list[tuple[int, _Context]]]:
    """Prefill every context once; yield one request of each at a time, until all had their turn.

    Args:
        answers: the most tokens that each request's answer may have.

    Yields:
        indices of requests, each with its context.
    """
    capacity = max(_asked(each) + most for each, most in zip(requests, answers, strict=True))
    contexts: list[_Context] = []
    waiting: list[list[int]] = []
    for index, request in enumerate(requests):
        known = next((i for i, each in enumerate(contexts) if each.serves(request)), None)
        if known is None:
            contexts.append(_Context(model, request, capacity))
            waiting.append([index])
        else:
            waiting[known].append(index)
    for context, of_context in zip(contexts, waiting, strict=True):
        context.seconds /= len(of_context)
    for turn in range(max(map(len, waiting))):
        yield [
            (of_context[turn], context)
            for context, of_context in zip(contexts, waiting, strict=True)
            if turn < len(of_context)
        ]


class _Context:
    """A prompt after its prefills: one that most rows share, and one for each row that alters its own.

    Rows are numbered in the order of the comparisons here.
    """

    def __init__(self, model: PreTrainedModel, request: Request, capacity: int) -> None:
        self.request = request
        rows = request.rows
        shared = [index for index, row in enumerate(rows) if not row.method.alters_prefill]
        alone = [[index] for index, row in enumerate(rows) if row.method.alters_prefill]
        groups = [group for group in (shared, *alone) if group]
        self.order = [index for group in groups for index in group]
        self.comparisons = []
        started = time.perf_counter()
        for group in groups:
            observer = request.observer and _renumbered(request.observer, group)
            comparison = Comparison(
                model,
                [rows[i] for i in group],
                request.sample_id,
                observer,
                request.policy,
                request.stages,
            )
            comparison.prefill(request.input_ids, capacity)
            self.comparisons.append(comparison)
        self.seconds = time.perf_counter() - started
        """Seconds of the prefills; of each request that they serve, an equal part."""

    def serves(self, request: Request) -> bool:
        """Return whether the caches are those that another request would make, to ask them again."""
        own = self.request
        return (
            own.question is not None
            and request.question is not None
            and own.sample_id == request.sample_id
            and torch.equal(own.input_ids, request.input_ids)
            and (own.rows, own.policy) == (request.rows, request.policy)
        )


class _Sample:
    """A request whose answers begin: after its prefill and, where there is one, its question.

    Rows are numbered as its context has them; `in_order` gives the request's order.
    """

    def __init__(self, context: _Context, request: Request) -> None:
        self.order, self.comparisons = context.order, context.comparisons
        self.is_asked = request.question is not None
        self.reference = None if request.reference is None else self.order.index(request.reference)
        started = time.perf_counter()
        if request.question is not None:
            check_asks(request.rows, request.policy)
            for comparison in self.comparisons:
                comparison.ask(request.question)
        self.seconds = context.seconds + time.perf_counter() - started

    @property
    def stats(self) -> list[RowStats]:
        """What each row keeps."""
        return [stats for comparison in self.comparisons for stats in comparison.stats]

    @property
    def places(self) -> list[tuple[Comparison, int]]:
        """Where each row is: its comparison, and its index there."""
        return [(each, row) for each in self.comparisons for row in range(len(each.rows))]

    def tally(self, text: Sequence[int]) -> Tally:
        """Begin a tally of a text for all rows."""
        first = [logits for each in self.comparisons for logits in each.first_logits]
        return Tally(text, first, self.reference, self.is_asked)

    def in_order(self, results: Sequence[RowResult]) -> list[RowResult]:
        """Sort the rows' results into the request's order."""
        by_index = dict(zip(self.order, results, strict=True))
        return [by_index[index] for index in range(len(results))]


def check_asks(rows: Sequence[Row], policy: Policy) -> None:
    """Refuse to ask a question after the compression of rows that would drop parts of it.

    Raises:
        UserError: naming a row that decides again after each token.
    """
    for row in rows:
        if policy.decides(row.method):
            name = row.cell or type(row.method).__name__
            raise UserError(
                f"a question after the compression is stored whole, and {name} decides again after "
                "each token: use decode_policy=append, and leave out methods that act while decoding."
            )


def _comparisons(samples: Sequence[_Sample]) -> list[Comparison]:
    return [comparison for sample in samples for comparison in sample.comparisons]


def _tally(samples: Sequence[_Sample], texts: Sequence[Sequence[int]]) -> list[Tally]:
    """Replay a text for each sample, all in one batch."""
    if not samples:
        return []
    tallies = [sample.tally(text) for sample, text in zip(samples, texts, strict=True)]
    of_each = [text for sample, text in zip(samples, texts, strict=True) for _ in sample.comparisons]
    for parts in Decoder(_comparisons(samples)).replay(of_each):
        pieces = iter(parts)
        for sample, tally in zip(samples, tallies, strict=True):
            rows = [row for _ in sample.comparisons for row in next(pieces)]
            if len(rows[0]):
                tally.add(rows)
    for sample, tally in zip(samples, tallies, strict=True):
        for place, nll in zip(sample.places, tally.nll, strict=True):
            if not math.isfinite(nll):  # as a finite row of logits gives every token a probability
                raise _not_finite(*place)
        if sample.reference is not None and tally.compared:
            check_logits(sample, tally)
    return tallies


def _not_finite(comparison: Comparison, row: int) -> NotFinite:
    return NotFinite(
        f"{comparison.session.proof.names[row]}: its logits are not finite, so they choose no token",
        "the model overflows in this dtype, or its weights are damaged. Try model.dtype=float32 or "
        "bfloat16.",
    )


def check_logits(sample: _Sample, tally: Tally) -> None:
    """Hold the logits of a sample's rows along a text against the full cache's (see `kvmerge.proof`).

    Args:
        sample: with a reference.
        tally: of the whole text, with a token compared.

    Raises:
        UnprovenError: if a row that read less than the prompt has the logits of the full cache at every
            token, or one whose budget holds the prompt has others at any.
    """
    places = sample.places
    reference = places[sample.reference or 0]
    if not reference[0].session.is_full(reference[1]):
        return  # figures are taken against something else
    followed = f"{tally.compared} tokens" + ("" if sample.is_asked else " after the first")
    for (comparison, row), tokens in zip(places, tally.moved, strict=True):
        session = comparison.session
        if not tokens and session.reads_less(row):
            what = f"it reads less than the prompt, and has the full cache's logits at all {followed}"
            raise UnprovenError(session.proof.names[row], what)
        if (
            tokens
            and session.is_full(row)
            and not _equal_alone(reference, (comparison, row), tally.text)
        ):
            what = (
                "its budget holds the whole prompt, and its logits are not the full cache's, bit for "
                f"bit, at {tokens} of {followed}"
            )
            raise UnprovenError(session.proof.names[row], what)


def _equal_alone(
    one: tuple[Comparison, int], other: tuple[Comparison, int], text: Sequence[int]
) -> bool:
    """Return whether two rows give a text the same logits, bit for bit, each in a batch of its own.

    In one batch a product may round by the place of a row in it.
    """
    # one after the other: the rows of a comparison share its session
    left, right = (list(comparison.alone(row, text)) for comparison, row in (one, other))
    return all(map(torch.equal, left, right))


def _renumbered(observer: Observer, indices: Sequence[int]) -> Observer:
    """Return an observer that is told the rows' indices in the whole list."""

    def watch(row: int, layer_idx: int, layer: PrefillLayer, kept: Entries) -> None:
        observer(indices[row], layer_idx, layer, kept)

    return watch
