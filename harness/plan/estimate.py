"""The time and memory of a run, from its samples and a machine's speed.

Samples are put into batches as the run does it (`harness.answering`), and each part of the work is
counted: prefill and compression of each context, the decode steps that all rows share, and the replay
that gives fidelity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from baselines.full import Full
from benchmarks.task import Task
from harness.batching import most_samples, samples_that_fit, unit_numbers
from harness.plan.answers import Answers, largest_of
from harness.plan.sizes import Sizes
from harness.plan.speed import Batch, Speed
from harness.plan.tokens import Sized
from harness.settings import Settings
from kvmerge.budget import Budget
from kvmerge.cells import Cell
from kvmerge.engine import REPLAY_TOKENS

_FULL = Cell("full", (), Budget(1.0), Full())
"""What a run answers with beside its cells where fidelity needs it."""


@dataclass(frozen=True)
class Frame:
    """What all samples of a run have in common."""

    fidelity: bool
    together: int
    """The most samples that decode together."""
    free: float
    """Bytes of memory that caches and all else may share."""
    observes: bool = False
    """Whether prefills are all there is."""

    @classmethod
    def of(cls, settings: Settings, free: float) -> Frame:
        """Read it from the settings of a run."""
        return cls(
            settings.fidelity,
            most_samples(settings.batch_size, settings.rows) if settings.cells else 1,
            free if settings.batch_size == "auto" else math.inf,
            settings.observe is not None,
        )


def entries(cell: Cell, tokens: int) -> int:
    """Return the entries per KV head and layer that a cell holds of a prompt; all, if it only hides."""
    return tokens if cell.method.simulates else cell.budget.entries(tokens)


def batches(
    samples: Sequence[Sized], task: Task, frame: Frame, sizes: Sizes
) -> Iterator[list[list[Sized]]]:
    """Yield the samples that run together: contexts, each with those that share it."""
    names = [sample.shared or place for place, sample in enumerate(samples)]
    numbers = unit_numbers(names, frame.together)
    for _, of_unit in groupby(zip(numbers, names, samples, strict=True), key=itemgetter(0)):
        contexts = [
            [sample for *_, sample in of_context] for _, of_context in groupby(of_unit, itemgetter(1))
        ]
        needs = [max(_room(each, task, frame) for each in of_context) for of_context in contexts]
        while contexts:
            taken = samples_that_fit(needs, sizes.entry_bytes, frame.free)
            yield contexts[:taken]
            del contexts[:taken], needs[:taken]


def seconds(
    samples: Sequence[Sized], task: Task, frame: Frame, sizes: Sizes, speed: Speed, answers: Answers
) -> float:
    """Return the time that the samples of a task take, without loading the model."""
    if frame.observes:
        return sum(speed.prefill(sample.tokens) for sample in samples)
    return sum(
        sum(_prefill(of_context[0], frame, speed) for of_context in batch)
        + sum(_answer(turn, task, frame, speed, answers) for turn in _turns(batch))
        for batch in batches(samples, task, frame, sizes)
    )


def peak_bytes(
    samples: Sequence[Sized], task: Task, frame: Frame, sizes: Sizes, resident: float
) -> float:
    """Return the most memory that any batch of a task needs.

    The weights, the caches of all its rows, two full layers (or all, where a method divides its budget
    over them), the activations of one layer, and the logits of a replay.

    Args:
        samples: of the task.
        task: the task.
        frame: of the run.
        sizes: of the model.
        resident: bytes of the process with the model, beside its weights.
    """
    found = [0.0]
    for batch in batches(samples, task, frame, sizes):
        every = [sample for of_context in batch for sample in of_context]
        caches = sum(max(_room(each, task, frame) for each in of_context) for of_context in batch)
        longest = max(sample.context for sample in every)
        allocates = any(cell.method.allocates for sample in every for cell in sample.cells)
        layers = sizes.layers if allocates else 2
        wide = sizes.heads + 2 * sizes.kv_heads
        layer = longest * wide * sizes.head_dim * sizes.itemsize
        active = longest * (4 * sizes.hidden + 3 * sizes.intermediate) * sizes.itemsize
        rows = sum(len(_cells(of_context[0], frame)) for of_context in batch)
        fed = max(rows, REPLAY_TOKENS) if frame.fidelity else rows
        # as the model gives them, and once more in float32 with its logarithm
        logits = fed * sizes.vocabulary * (sizes.itemsize + 4)
        found.append(caches * sizes.entry_bytes + layers * layer + max(active, logits))
    return resident + sizes.weight_bytes + max(found)


def _cells(sample: Sized, frame: Frame) -> tuple[Cell, ...]:
    """Return what answers a sample, the reference of its fidelity included."""
    is_there = any(cell.is_full for cell in sample.cells)
    return sample.cells if is_there or not frame.fidelity else (*sample.cells, _FULL)


def _room(sample: Sized, task: Task, frame: Frame) -> int:
    """Return the entries per KV head and layer that all rows of a sample may hold in the end."""
    more = sample.question + task.max_new_tokens
    return sum(entries(cell, sample.context) + more for cell in _cells(sample, frame))


def _prefill(sample: Sized, frame: Frame, speed: Speed) -> float:
    """Return the time of a context's prefills, and of making the caches of all its rows."""
    cells = _cells(sample, frame)
    alone = sum(cell.method.alters_prefill for cell in cells)
    passes = alone + (alone < len(cells))
    return (
        passes * speed.prefill(sample.context)
        + sum(speed.compress(cell, sample.context) for cell in cells)
        + speed.store(sum(entries(cell, sample.context) for cell in cells))
    )


def _turns(batch: Sequence[Sequence[Sized]]) -> Iterator[list[Sized]]:
    """Yield what decodes together: of every context one sample at a time."""
    for turn in range(max(map(len, batch))):
        yield [of_context[turn] for of_context in batch if turn < len(of_context)]


def _answer(
    samples: Sequence[Sized], task: Task, frame: Frame, speed: Speed, answers: Answers
) -> float:
    """Return the time of what follows the prefills of samples that decode together."""
    whole = _batch(samples, frame)
    asked = sum(_feed(_batch([each], frame), each.question, speed) for each in samples)
    if samples[0].continuation:
        longest = max(sample.continuation for sample in samples)
        return asked + _feed(whole, longest - 1, speed)
    spent = asked + _decode(whole, len(samples), speed, answers)
    if frame.fidelity:
        text = min(largest_of(answers.replayed, len(samples)), task.max_new_tokens)
        spent += _feed(whole, text - 1, speed)
    return spent


def _batch(samples: Sequence[Sized], frame: Frame) -> Batch:
    """Return all rows of some samples, as they stand after the prefill."""
    lengths = [
        [entries(cell, sample.context) + sample.question for cell in _cells(sample, frame)]
        for sample in samples
    ]
    return Batch(
        rows=sum(map(len, lengths)),
        groups=sum(len(set(of_sample)) for of_sample in lengths),
        entries=sum(map(sum, lengths)),
    )


def _decode(whole: Batch, samples: int, speed: Speed, answers: Answers) -> float:
    """Return the time of the steps until the last row has ended.

    The first token comes from the prefill, so an answer of `n` tokens takes `n - 1` steps. A row that
    takes part in some of the steps counts as that part of a row in all of them.
    """
    steps = largest_of(answers.longest, samples) - 1
    if steps <= 0:
        return 0.0
    of_row = max(0.0, answers.mean - 1)
    of_sample = max(of_row, largest_of(answers.longest, 1) - 1)
    share = of_row / steps
    halfway = whole.grown(of_row)
    groups = whole.groups * of_sample / steps
    return steps * speed.step(Batch(halfway.rows * share, groups, halfway.entries * share))


def _feed(whole: Batch, tokens: float, speed: Speed) -> float:
    """Return the time of feeding given tokens to every row, as many at once as the engine does."""
    if tokens <= 0:
        return 0.0
    width = min(tokens, max(1, REPLAY_TOKENS // int(whole.rows)))
    return math.ceil(tokens / width) * speed.replay(whole.grown(tokens), width)
