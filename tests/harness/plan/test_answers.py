from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import fmean

import pytest

from harness.plan.answers import finished, guessed, largest_of, least, most
from harness.results import Results
from harness.runner import run
from harness.settings import Settings
from tests.tiny_run import compose

Tiny = Callable[..., Settings]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_largest_of_several_is_the_mean_over_every_way_to_draw_them(count: int) -> None:
    lengths = [3.0, 9.0, 9.0, 20.0]
    every = [max(drawn) for drawn in itertools.product(lengths, repeat=count)]
    assert largest_of(lengths, count) == pytest.approx(fmean(every))


def test_lengths_are_those_of_the_finished_answers(tiny: Tiny) -> None:
    settings = tiny("benchmark.tasks=[samsum]", "limit=2", "cells=[full@1,h2o@0.5]")
    results = Results(settings.results_dir)
    (task,) = settings.benchmark.tasks
    assert finished(results, task, settings.cells) is None
    results = run(settings)
    full, other = (
        {record.id: record.generated_tokens for record in results.records("samsum", cell.name)}
        for cell in settings.cells
    )
    found = finished(results, task, settings.cells)
    assert found is not None
    assert sorted(found.of_rows) == sorted([*full.values(), *other.values()])
    assert sorted(found.longest) == sorted(max(full[name], other[name]) for name in full)
    assert sorted(found.replayed) == sorted(full.values())


def test_answers_that_nobody_knows_are_between_the_shortest_and_the_longest() -> None:
    for task in compose("benchmark=mini").benchmark.tasks:
        for name in ("of_rows", "longest", "replayed"):
            ((low,), (likely,), (high,)) = (
                getattr(answers(task), name) for answers in (least, guessed, most)
            )
            assert 1 <= low <= likely <= high == task.max_new_tokens
