from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from benchmarks.task import Task
from harness.plan.answers import Answers, most
from harness.plan.estimate import Frame, batches, entries, peak_bytes, seconds
from harness.plan.sizes import sizes_of
from harness.plan.speed import Batch
from harness.plan.tokens import Sized, count_tokens
from harness.runner import left, run
from harness.settings import Settings
from kvmerge.cells import Cell, parse_cell
from tests.harness.plan.test_published import SMALL
from tests.tiny_run import TASKS, compose

Tiny = Callable[..., Settings]
FULL, HALF, QUARTER = (parse_cell(name) for name in ("full@1", "h2o@0.5", "h2o@0.25"))


def task(name: str = "passkey", **changes: object) -> Task:
    (found,) = compose("benchmark=mini", f"benchmark.tasks=[{name}]").benchmark.tasks
    return replace(found, **changes)  # type: ignore[arg-type]


@dataclass
class Counting:
    """A machine that takes a second for each thing of one kind, and notes what it was asked."""

    prefills: list[int] = field(default_factory=list)
    compressed: list[tuple[str, int]] = field(default_factory=list)
    stored: float = 0.0
    fed: list[tuple[Batch, float]] = field(default_factory=list)
    loading: float = 0.0

    def prefill(self, tokens: int) -> float:
        self.prefills.append(tokens)
        return 1000.0 * tokens

    def compress(self, cell: Cell, tokens: int) -> float:
        self.compressed.append((cell.name, tokens))
        return 10.0

    def store(self, entries: float) -> float:
        self.stored += entries
        return 0.5 * entries

    def step(self, batch: Batch) -> float:
        return 3 + 5 * batch.rows + 7 * batch.groups + 11 * batch.entries

    def replay(self, batch: Batch, width: float) -> float:
        self.fed.append((batch, width))
        return 13 * width * batch.rows


def alone(fidelity: bool = False, together: int = 1, free: float = math.inf) -> Frame:
    return Frame(fidelity, together, free)


def test_a_sample_takes_what_its_steps_take_one_by_one() -> None:
    speed, sample = Counting(), Sized(100, (FULL, HALF, QUARTER, QUARTER))
    spent = seconds(
        [sample], task(max_new_tokens=6), alone(), SMALL, speed, most(task(max_new_tokens=6))
    )
    wanted, held = 1000.0 * 100 + 40 + 0.5 * 200, [100, 50, 25, 25]
    for _ in range(5):  # the first of six tokens is the prefill's
        held = [each + 1 for each in held]
        wanted += 3 + 5 * 4 + 7 * len(set(held)) + 11 * sum(held)
    assert spent == pytest.approx(wanted)
    assert speed.prefills == [100]


def test_rows_that_end_before_are_not_in_the_later_steps() -> None:
    """Two groups of one row: answers of 3 and 7 tokens, so 2 and 6 of 6 steps."""
    answers = Answers([3, 7], [7], [7])
    spent = seconds([Sized(100, (HALF, HALF))], task(), alone(), SMALL, Counting(), answers)
    rows = 2 + 6
    grown = rows * (50 + (4 + 1) / 2)  # by as many as a row has steps on average
    wanted = 6 * 3 + 5 * rows + 7 * 6 + 11 * grown
    assert spent - (1000 * 100 + 20 + 50) == pytest.approx(wanted)


def test_fidelity_replays_all_rows_along_the_full_caches_answer() -> None:
    speed, answers = Counting(), Answers([4], [9], [5])
    sample = Sized(40, (FULL, HALF))
    without = seconds([sample], task(), alone(), SMALL, Counting(), answers)
    spent = seconds([sample], task(), alone(fidelity=True), SMALL, speed, answers)
    assert spent - without == pytest.approx(13 * 4 * 2)
    ((batch, width),) = speed.fed
    assert (batch.rows, width) == (2, 4)


def test_fidelity_brings_the_full_cache_where_it_is_finished_or_not_asked_for() -> None:
    speed = Counting()
    seconds([Sized(40, (HALF,))], task(), alone(fidelity=True), SMALL, speed, most(task()))
    assert ("full@1", 40) in speed.compressed
    assert speed.stored == 40 + 20


def test_many_rows_are_fed_in_more_passes() -> None:
    speed = Counting()
    sample = Sized(40, (HALF,) * 300, continuation=11)
    seconds([sample], task(), alone(), SMALL, speed, most(task()))
    ((batch, width),) = speed.fed  # asked once, for ten passes
    assert (batch.rows, width) == (300, 1)


def test_a_method_that_alters_the_prefill_has_one_of_its_own() -> None:
    speed = Counting()
    altering = parse_cell("h2o_sim_prefill@0.5")
    seconds([Sized(40, (FULL, altering))], task(), alone(), SMALL, speed, most(task()))
    spent = seconds([Sized(40, (altering,))], task(), alone(), SMALL, Counting(), most(task()))
    both = seconds([Sized(40, (FULL, altering))], task(), alone(), SMALL, Counting(), most(task()))
    assert spent // 1000 // 40 == 1
    assert both // 1000 // 40 == 2


def test_questions_of_one_context_share_its_prefill() -> None:
    speed = Counting()
    samples = [Sized(40, (HALF,), question=3, shared="a")] * 2 + [Sized(50, (HALF,), question=3)]
    seconds(samples, task(), alone(together=4), SMALL, speed, most(task()))
    assert speed.prefills == [40, 50]
    assert [width for _, width in speed.fed] == [3, 3, 3]


def test_samples_decode_together_as_far_as_a_quarter_of_the_memory_holds_them() -> None:
    samples = [Sized(100, (FULL,))] * 5
    room = (100 + task().max_new_tokens) * SMALL.entry_bytes
    for held, wanted in ((1, [1] * 5), (2, [2, 1, 2]), (9, [3, 2])):
        frame = alone(together=3, free=4 * held * room)
        sizes = [len(batch) for batch in batches(samples, task(), frame, SMALL)]
        assert sizes == wanted


@pytest.mark.parametrize("size", ["2", "auto"])
def test_batches_are_those_of_the_run(tiny: Tiny, size: str) -> None:
    settings = tiny("num_seeds=1", f"batch_size={size}")
    found = left(settings)
    planned = count_tokens(settings, found)
    sizes = sizes_of(settings.model, found.model)
    assert sizes is not None
    results = run(settings)
    frame = Frame.of(settings, free=1e12)
    for of, tokens in planned.items():
        made = [len(batch) for batch in batches(tokens.samples, of, frame, sizes)]
        wanted = [record.batch_samples for record in results.records(of.name, "full@1")]
        assert [size for size in made for _ in range(size)] == wanted


def test_bytes_of_a_cache_are_those_that_the_run_records(tiny: Tiny) -> None:
    settings = tiny("limit=1", "cells=[full@1,h2o@0.35,kvmerger@0.5]")
    sizes = sizes_of(settings.model, left(settings).model)
    assert sizes is not None
    results = run(settings)
    for name in TASKS:
        for cell in settings.cells:
            (record,) = results.records(name, cell.name)
            assert sizes.entry_bytes * entries(cell, record.prompt_tokens) == record.kv_bytes


def test_the_peak_holds_weights_caches_and_two_layers() -> None:
    samples: Sequence[Sized] = [Sized(1000, (FULL, HALF))]
    of = task(max_new_tokens=10)
    caches = (1010 + 510) * 2 * 3 * 2 * 8 * 2  # K and V, layers, KV heads, width, bytes
    layers = 2 * 1000 * (4 + 2 * 2) * 8 * 2
    active = 1000 * (4 * 32 + 3 * 64) * 2
    peak = peak_bytes(samples, of, alone(), SMALL, resident=7)
    assert peak == 7 + 2e9 + caches + layers + active
    logits = 512 * 100 * (2 + 4)
    wide = replace(SMALL, vocabulary=100_000)
    replayed = peak_bytes(samples, of, alone(fidelity=True), wide, resident=7)
    assert replayed == 7 + 2e9 + caches + layers + 1000 * logits


def test_a_method_that_divides_its_budget_over_layers_holds_all_of_them() -> None:
    held = peak_bytes([Sized(1000, (parse_cell("pyramidkv@0.5"),))], task(), alone(), SMALL, 0)
    freed = peak_bytes([Sized(1000, (HALF,))], task(), alone(), SMALL, 0)
    assert held - freed == (3 - 2) * 1000 * (4 + 2 * 2) * 8 * 2


def test_nothing_left_takes_nothing() -> None:
    assert seconds([], task(), alone(), SMALL, Counting(), most(task())) == 0
