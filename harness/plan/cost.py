"""What is left of a run, for every task and in all: its time as a range, its memory, its money.

The low end is a fast machine with short answers, the high end a slow one with answers that go on for as
long as they may; between them the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from benchmarks.task import Task
from harness.batching import free_bytes
from harness.plan.answers import finished, guessed, least, most
from harness.plan.calibration import Calibration, kept
from harness.plan.cards import CARDS
from harness.plan.estimate import Frame, peak_bytes, seconds
from harness.plan.published import FAIR, GOOD, POOR, PublishedSpeed, share
from harness.plan.sizes import Sizes
from harness.plan.speed import Speed
from harness.plan.tokens import Tokens
from harness.results import Results
from harness.settings import Settings

_AT_LEAST = 0.15
"""Share that times are taken to be off at least: no calibration saw this run's own texts."""
_CUDA_CONTEXT = 0.7e9
"""Bytes that a process takes of a card before any tensor, about."""


@dataclass(frozen=True)
class Range:
    """A number that is known within bounds."""

    low: float
    likely: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def __mul__(self, by: float) -> Range:
        return Range(self.low * by, self.likely * by, self.high * by)

    @classmethod
    def sum(cls, ranges: Sequence[Range]) -> Range:
        """Return the sum; its bounds are met only where all are."""
        return cls(
            sum(each.low for each in ranges),
            sum(each.likely for each in ranges),
            sum(each.high for each in ranges),
        )


@dataclass(frozen=True)
class Machine:
    """What a run would be carried out on."""

    name: str
    """What its figures are, as a sentence goes on."""
    fast: Speed
    likely: Speed
    slow: Speed
    free: float
    """Bytes that caches, and all else beside the weights, may share."""
    memory: float
    """Bytes in all."""
    resident: float
    """Bytes of a process with the model, beside its weights."""
    unknown: Sequence[str] = ()
    """Cells of whose methods nothing is known."""
    instead: str = ""
    """What is taken for them, as a sentence goes on."""

    @property
    def loading(self) -> Range:
        """Seconds from the start of a run to its first prefill."""
        return Range(self.fast.loading, self.likely.loading, self.slow.loading)


@dataclass(frozen=True)
class Cost:
    """What is left of a task, or of a run."""

    time: Range
    """Seconds of one worker."""
    memory: float
    """Bytes at the most."""


def machine_of(settings: Settings, sizes: Sizes) -> Machine | None:
    """Return the card that `plan.device` names, else this machine; None where it was not calibrated."""
    if settings.plan.device is not None:
        return published(settings, sizes, settings.plan.device)
    found = kept(settings.model)
    return None if found is None else _calibrated(settings, sizes, found)


def published(settings: Settings, sizes: Sizes, device: str) -> Machine:
    """Return a card by its published figures."""
    card = CARDS[device]
    fast, likely, slow = (
        PublishedSpeed(card, sizes, settings.model.dtype, assumed) for assumed in (GOOD, FAIR, POOR)
    )
    return Machine(
        f"{card.name}, by its published figures ({card.source}), of which "
        f"{POOR.products:.0%} to {GOOD.products:.0%} are assumed to be reached in products and "
        f"{POOR.bandwidth:.0%} to {GOOD.bandwidth:.0%} in reading memory",
        fast,
        likely,
        slow,
        free=max(0.0, card.memory - sizes.weight_bytes - _CUDA_CONTEXT),
        memory=card.memory,
        resident=_CUDA_CONTEXT,
        unknown=[cell.name for cell in settings.cells if share(cell.method) is None],
        instead=f"{GOOD.compression:.0%} to {POOR.compression:.0%} of a prefill.",
    )


def _calibrated(settings: Settings, sizes: Sizes, found: Calibration) -> Machine:
    off = max(_AT_LEAST, found.error)
    device = settings.model.torch_device()
    is_cuda = device.type == "cuda"
    total = torch.cuda.mem_get_info(device)[1] if is_cuda else psutil.virtual_memory().total
    return Machine(
        f"this machine, as it was calibrated, within {off:.0%}",
        found.slower(-off),
        found,
        found.slower(off),
        free=max(0.0, free_bytes(device) - sizes.weight_bytes),
        memory=total,
        resident=_CUDA_CONTEXT if is_cuda else found.resident,
        unknown=[cell.name for cell in settings.cells if not found.knows(cell)],
        instead="the mean of other methods. `make calibrate-speed ARGS=\"'cells=[...]'\"` measures "
        "them.",
    )


def costs(
    settings: Settings, tokens: Mapping[Task, Tokens], sizes: Sizes, machine: Machine
) -> dict[Task, Cost]:
    """Return what is left of each task, without loading the model."""
    frame = Frame.of(settings, machine.free)
    results = Results(settings.results_dir)
    found = {}
    for task, of_task in tokens.items():
        known = finished(results, task, settings.cells)
        ends = (
            (machine.fast, known or least(task)),
            (machine.likely, known or guessed(task)),
            (machine.slow, most(task)),
        )
        time = Range(
            *(seconds(of_task.samples, task, frame, sizes, speed, answers) for speed, answers in ends)
        )
        memory = peak_bytes(of_task.samples, task, frame, sizes, machine.resident)
        found[task] = Cost(time * of_task.scale, memory)
    return found
