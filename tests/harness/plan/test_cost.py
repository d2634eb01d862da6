from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.plan.calibration import keep
from harness.plan.cost import Cost, Machine, Range, costs, machine_of
from harness.plan.sizes import Sizes, sizes_of
from harness.plan.tokens import count_tokens
from harness.runner import left, run
from harness.settings import Settings
from kvmerge.models import Outline, Shape
from tests.harness.plan.test_calibration import KNOWN
from tests.tiny_run import compose

Tiny = Callable[..., Settings]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / "cache"))


def planned(settings: Settings) -> tuple[dict[str, Cost], Machine]:
    found = left(settings)
    sizes = sizes_of(settings.model, found.model)
    assert sizes is not None
    machine = machine_of(settings, sizes)
    assert machine is not None
    cost = costs(settings, count_tokens(settings, found), sizes, machine)
    return {task.name: of for task, of in cost.items()}, machine


def is_ordered(time: Range) -> bool:
    return 0 < time.low < time.likely < time.high


@pytest.mark.parametrize("device", ["a100-80", "h100", "l4", "rtx4090"])
def test_a_card_gives_every_task_a_range(tiny: Tiny, device: str) -> None:
    cost, machine = planned(tiny("dry_run=true", f"plan.device={device}"))
    assert list(cost) == ["qasper", "trec", "samsum", "lcc"]
    assert all(is_ordered(of.time) and of.memory > 0 for of in cost.values())
    assert is_ordered(machine.loading)
    assert machine.memory in (24e9, 80e9)


def test_this_machine_is_asked_once_it_was_calibrated(tiny: Tiny) -> None:
    settings = tiny()
    sizes = sizes_of(settings.model, left(settings).model)
    assert sizes is not None
    assert machine_of(settings, sizes) is None
    keep(settings.model, KNOWN)
    cost, machine = planned(settings)
    assert all(is_ordered(of.time) for of in cost.values())
    assert machine.likely == KNOWN
    assert list(machine.unknown) == ["cam@0.5"]  # the others of the run are in KNOWN


def test_what_is_finished_costs_nothing_and_tells_how_long_answers_are(tiny: Tiny) -> None:
    given = ("benchmark.tasks=[samsum]", "cells=[full@1,h2o@0.5]")
    settings = tiny(*given)
    keep(settings.model, KNOWN)
    before, _ = planned(settings)
    run(tiny(*given, "limit=2"))
    after, _ = planned(settings)
    assert after["samsum"].time.high < 0.5 * before["samsum"].time.high
    assert after["samsum"].time.low > before["samsum"].time.low / 3  # no longer of one token
    run(settings)
    assert left(settings).jobs == []


def test_sizes_are_those_of_the_models_configuration(tiny: Tiny) -> None:
    settings = tiny("model.dtype=bfloat16")
    sizes = sizes_of(settings.model, left(settings).model)
    assert sizes is not None
    assert (sizes.layers, sizes.heads, sizes.kv_heads, sizes.head_dim) == (2, 4, 2, 16)
    assert sizes.weight_bytes == 2 * sizes.parameters
    assert sizes.entry_bytes == 2 * 2 * 2 * 16 * 2


@pytest.mark.parametrize("model", ["tiny-random", "smollm2-135m"])
def test_what_a_models_file_says_of_it_is_what_its_configuration_says(tiny: Tiny, model: str) -> None:
    settings = compose(f"model={model}", "benchmark=mini", "benchmark.tasks=[passkey]", "limit=1")
    exact = sizes_of(settings.model, left(settings).model)
    said = sizes_of(settings.model, Outline(None, None))
    assert exact is not None
    assert said is not None
    assert said.parameters == pytest.approx(exact.parameters, rel=1e-3)
    for name in ("layers", "heads", "kv_heads", "head_dim", "hidden", "vocabulary", "itemsize"):
        assert getattr(said, name) == getattr(exact, name), name


def test_sizes_without_a_configuration_follow_the_shape() -> None:
    spec = compose("model=llama2-7b-chat", "model.quantize=4bit").model
    sizes = sizes_of(spec, None)
    assert isinstance(sizes, Sizes)
    assert spec.shape == Shape(6.738e9, 32, 32, 128, 32, 32000)
    assert sizes.weight_bytes == 6.738e9 / 2
    assert sizes.entry_bytes == 512 * 1024


def test_ranges_add_up_end_by_end() -> None:
    assert Range.sum([Range(1, 2, 3), Range(10, 20, 30)]) == Range(11, 22, 33)
    assert Range(1, 2, 3) * 2 + Range(1, 1, 1) == Range(3, 5, 7)
