"""Samples that cannot be answered: the others are done, these are told, and tried again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import harness.answering
from harness.failures import FILE, Failure, Failures
from harness.runner import run
from harness.settings import Settings
from kvmerge.errors import UserError
from tests.conftest import Output
from tests.tiny_run import read_lines

Tiny = Callable[..., Settings]
SMALL = ("benchmark.tasks=[trec,lcc]", "cells=[full@1,h2o@0.5]")
BROKEN = "trec-1"


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let one sample raise, alone and in a batch; calling it mends it."""
    honest = harness.answering.run_samples

    def failing(model: Any, requests: Sequence[Any], stop: Any) -> Any:
        if any(each.sample_id.endswith(f"/{BROKEN}") for each in requests):
            raise RuntimeError("a fault\nof two lines")
        return honest(model, requests, stop)

    monkeypatch.setattr(harness.answering, "run_samples", failing)
    return lambda: monkeypatch.setattr(harness.answering, "run_samples", honest)


def failed(folder: Path) -> list[dict[str, Any]]:
    path = folder / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("batch_size", ["auto", "1"])
def test_a_sample_that_raises_is_told_with_its_traceback_and_the_others_are_done(
    tiny: Tiny, fault: Callable[[], None], batch_size: str
) -> None:
    settings = tiny(*SMALL, f"batch_size={batch_size}")
    results = run(settings)
    lines = read_lines(settings.output_dir)
    assert {key[3] for key in lines} == {"trec-0", "trec-2", "lcc-0", "lcc-1", "lcc-2"}
    assert len(lines) == 10
    (line,) = failed(settings.output_dir)
    assert (line["task"], line["id"], line["cells"]) == ("trec", BROKEN, ["full@1", "h2o@0.5"])
    assert line["error"] == "RuntimeError: a fault"
    assert "in failing" in line["traceback"]
    assert [each.id for each in results.failures.new] == [BROKEN]


def test_the_next_run_tries_again_and_a_success_leaves_no_line(
    tiny: Tiny, fault: Callable[[], None], tmp_path: Path
) -> None:
    settings = tiny(*SMALL)
    for _ in range(2):
        assert run(settings).failures.new
        assert len(failed(settings.output_dir)) == 1
    fault()
    assert not run(settings).failures.new
    assert not (settings.output_dir / FILE).exists()
    whole = tiny(*SMALL, folder=tmp_path / "whole")
    run(whole)
    assert list(read_lines(settings.output_dir)) == list(read_lines(whole.output_dir)), "in order"


def test_a_failure_whose_sample_was_answered_since_is_taken_out(tiny: Tiny) -> None:
    settings = tiny(*SMALL)
    run(settings)
    failure = Failure(task="lcc", id="lcc-0", cells=["full@1"], error="e", traceback="t", time="now")
    Failures(settings.output_dir).add(failure)
    run(settings)
    assert failed(settings.output_dir) == []


def test_a_failure_of_cells_that_this_run_has_not_stays(tiny: Tiny) -> None:
    settings = tiny(*SMALL)
    run(settings)
    failure = Failure(task="lcc", id="lcc-0", cells=["tova@0.5"], error="e", traceback="t", time="now")
    Failures(settings.output_dir).add(failure)
    run(settings)
    assert [line["cells"] for line in failed(settings.output_dir)] == [["tova@0.5"]]


@pytest.mark.parametrize(
    ("layer", "error"),
    [
        ("lm_head", "full@1 on longbench/trec/trec-1: its logits are not finite"),
        ("model.layers.1.self_attn.k_proj", "keys of layer 1, KV head 0 are not finite"),
    ],
)
def test_a_sample_whose_numbers_are_not_finite_is_a_failure_of_its_own(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, layer: str, error: str
) -> None:
    honest = harness.answering.run_samples

    def to_nan(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan

    def spoiled(model: Any, requests: Sequence[Any], stop: Any) -> Any:
        with contextlib.ExitStack() as undone:
            if any(each.sample_id.endswith(f"/{BROKEN}") for each in requests):
                hook = model.get_submodule(layer).register_forward_hook(to_nan)
                undone.callback(hook.remove)
            return honest(model, requests, stop)

    monkeypatch.setattr(harness.answering, "run_samples", spoiled)
    settings = tiny(*SMALL)
    run(settings)
    assert len(read_lines(settings.output_dir)) == 10
    (line,) = failed(settings.output_dir)
    assert line["id"] == BROKEN
    assert line["error"].startswith("NotFinite: task trec, sample 'trec-1' (")
    assert error in line["error"]


def test_what_holds_for_the_whole_run_ends_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise UserError("no such thing")

    monkeypatch.setattr(harness.answering, "run_samples", refused)
    settings = tiny(*SMALL)
    with pytest.raises(UserError, match="no such thing"):
        run(settings)
    assert failed(settings.output_dir) == []


def test_a_command_reports_the_others_lists_those_that_failed_and_exits_with_3(
    command: Callable[..., Output],
    undrawn: None,
    fault: Callable[[], None],
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out"
    given = [f"model.path={checkpoint}", "benchmark=longbench", f"benchmark.data_dir={data}"]
    given += ["benchmark.tasks=[trec]", "cells=[full@1,h2o@0.5]", f"output_dir={folder}"]
    output = command(*given)
    assert output.status == 3
    assert "Traceback" not in output.err
    *_, first, sample, last = output.err.splitlines()
    assert first == "error: 1 sample failed; the others are done."
    assert sample == "  trec/trec-1: RuntimeError: a fault"
    assert last == f"{folder / FILE} has their tracebacks. The same command tries them again."
    assert (folder / "summary.csv").exists()
    fault()
    assert command(*given).status == 0


def test_where_every_sample_fails_they_are_listed_all_the_same(
    command: Callable[..., Output],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(harness.answering, "run_samples", broken)
    given = [f"model.path={checkpoint}", "benchmark=longbench", f"benchmark.data_dir={data}"]
    output = command(*given, "benchmark.tasks=[trec]", "method=h2o", f"output_dir={tmp_path / 'out'}")
    assert output.status == 3
    assert "error: 3 samples failed; the others are done." in output.err
    assert output.err.count("KeyError: 'x'") == 3


@pytest.mark.parametrize(("limits", "status", "failed"), [("1,2", 3, 1), ("0,2", 2, 2)])
def test_a_sweep_exits_with_3_where_nothing_but_samples_failed(
    command: Callable[..., Output],
    fault: Callable[[], None],
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    limits: str,
    status: int,
    failed: int,
) -> None:
    """A point is refused with a limit of 0, has no sample with 1, and the one that raises with 2."""
    given = [f"model.path={checkpoint}", "benchmark=longbench", f"benchmark.data_dir={data}"]
    given += ["benchmark.tasks=[trec]", "cells=[h2o@0.5]", "shard=1", "num_shards=2"]
    output = command("-m", *given, f"limit={limits}", f"output_dir={tmp_path}/${{limit}}")
    assert output.status == status
    assert "Traceback" not in output.err
    assert f"{tmp_path / '2/shards/1-of-2' / FILE} has their tracebacks." in output.err
    *_, summary = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert summary == f"error: {failed} of the points failed; the others are done."
    assert output.err.endswith(": 1 sample failed; the others are done.\n")
