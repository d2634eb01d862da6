"""The faster way to multiply is measured once a machine, and can be named."""

from __future__ import annotations

import json

import pytest
import torch

from kvmerge.errors import UserError
from kvmerge.kernels import choice, tiled


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_taken", {})
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """A clock that a way moves on by its own seconds; and the ways that ran."""
    now, ran = [0.0], []

    def runs(**seconds):
        def run(way):
            ran.append(way)
            now[0] += seconds[way]

        return run

    monkeypatch.setattr(choice.time, "perf_counter", lambda: now[0])
    return runs, ran


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"torch": 0.2, "onednn": 0.1}, "onednn"),
        ({"torch": 0.1, "onednn": 0.2}, "torch"),
        ({"torch": 0.100, "onednn": 0.099}, "torch"),  # level
        ({"torch": 0.100, "onednn": 0.091}, "torch"),  # nearly
    ],
)
def test_the_faster_way_is_taken_and_torch_where_they_are_level(clock, seconds, way):
    runs, ran = clock
    assert choice.fastest(runs(**seconds)) == way
    assert ran[:4] == ["torch", "onednn", "torch", "onednn"]  # in turn
    assert choice.chosen() == way


def test_a_slow_moment_does_not_decide(clock, monkeypatch):
    runs, _ = clock
    steady = runs(torch=0.1, onednn=0.05)
    count = iter(range(100))

    def disturbed(way):
        steady(way)
        if next(count) == 5:  # one of oneDNN's rounds
            runs(torch=0, onednn=9)("onednn")

    assert choice.fastest(disturbed) == "onednn"


def test_another_process_takes_over_what_was_measured(clock, fresh):
    runs, ran = clock
    choice.fastest(runs(torch=0.2, onednn=0.1))
    measured = len(ran)
    choice._taken.clear()
    assert choice.fastest(runs(torch=0.1, onednn=0.2)) == "onednn"
    assert len(ran) == measured
    (machine,) = json.loads((fresh / choice.FILE).read_text())
    assert f"torch {torch.__version__}" in machine
    assert f"{torch.get_num_threads()} threads" in machine


@pytest.mark.parametrize("content", ["", "{", "[]", '{"this machine": 3}'])
def test_a_damaged_file_is_measured_anew(clock, fresh, content):
    runs, _ = clock
    (fresh / choice.FILE).write_text(content)
    assert choice.fastest(runs(torch=0.2, onednn=0.1)) == "onednn"
    assert choice.chosen() == "onednn"


def test_a_folder_that_cannot_be_written_costs_a_measurement_alone(clock, monkeypatch, tmp_path):
    runs, _ = clock
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / "file"))
    assert choice.fastest(runs(torch=0.2, onednn=0.1)) == "onednn"
    assert choice.chosen() == "onednn"  # this process keeps to it
    assert choice.fastest(runs(torch=0.1, onednn=0.2)) == "onednn"
    choice._taken.clear()
    assert choice.chosen() is None
    assert choice.fastest(runs(torch=0.1, onednn=0.2)) == "torch"


def test_the_first_of_two_processes_that_measure_at_once_decides_for_both(clock, fresh):
    runs, _ = clock
    steady = runs(torch=0.1, onednn=0.2)

    def meanwhile(way):
        steady(way)
        (fresh / choice.FILE).write_text(json.dumps({choice.machine(): "onednn", "other": "torch"}))

    assert choice.fastest(meanwhile) == "onednn"
    assert json.loads((fresh / choice.FILE).read_text())["other"] == "torch"


def test_other_threads_are_another_machine(clock, monkeypatch):
    runs, _ = clock
    assert choice.fastest(runs(torch=0.2, onednn=0.1)) == "onednn"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    assert choice.chosen() is None
    assert choice.fastest(runs(torch=0.1, onednn=0.2)) == "torch"


def test_the_environment_can_name_the_way_and_nothing_else(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "onednn")
    assert choice.fastest(lambda way: pytest.fail("nothing is to be measured")) == "onednn"
    assert choice.chosen() == "onednn"
    monkeypatch.setenv(choice.VARIABLE, "mkl")
    with pytest.raises(UserError, match=r"unknown KVMERGE_CPU_PRODUCTS 'mkl'.*onednn, torch"):
        choice.fastest(lambda way: None)


def test_short_prompts_and_other_dtypes_measure_nothing(monkeypatch):
    monkeypatch.setattr(choice, "fastest", lambda run: pytest.fail("nothing is to be measured"))
    assert tiled.faster_products(torch.ones(1, 1, 511, 2)) == "torch"
    assert tiled.faster_products(torch.ones(1, 1, 4096, 2, dtype=torch.bfloat16)) == "torch"


def test_a_long_prompt_takes_the_way_of_this_machine(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "torch")
    assert tiled.faster_products(torch.ones(1, 1, 512, 2)) == "torch"


def test_what_is_measured_is_this_attention(fresh):
    way = choice.fastest(tiled._rehearse)
    assert way in choice.WAYS
    assert choice.chosen() == way
