"""The seam: a run writes the same whoever answers it, and in whatever order."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from harness.executors.units import Outcome, Unit, units
from harness.executors.worker import Worker
from harness.runner import left, run
from harness.settings import Settings
from kvmerge.errors import UserError
from tests.tiny_run import compose, read_lines, row, write_rows

Tiny = Callable[..., Settings]
SMALL = ("benchmark.tasks=[trec,lcc]", "cells=[full@1,cam@0.5]")


@dataclass(frozen=True)
class Backwards:
    """Answers from the last sample to the first, and lets all that passes go through pickle."""

    @contextlib.contextmanager
    def start(self, settings: Settings, known: Any, loaded: Any) -> Iterator[_Backwards]:
        yield _Backwards(Worker.load(_passed(settings), known, cores=1))


class _Backwards:
    count, notes = 1, ()

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def answer(self, units: Sequence[Unit], is_stopping: Callable[[], bool]) -> Iterator[Outcome]:
        outcomes = [outcome for unit in units for outcome in self.worker.answer(_passed(unit))]
        yield from map(_passed, reversed(outcomes))


def _passed(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def test_records_are_the_same_and_in_the_benchmarks_order_whoever_answers(
    tiny: Tiny, tmp_path: Path
) -> None:
    run(tiny(*SMALL, folder=tmp_path / "local"))
    settings = tiny(*SMALL, folder=tmp_path / "backwards")
    run(replace(settings, executor=Backwards()))
    wanted = read_lines(tmp_path / "local")
    found = read_lines(settings.output_dir)
    assert list(found.items()) == list(wanted.items()), "in the same order too"
    one, other = (tmp_path / name / "prompts" / "lcc.jsonl" for name in ("local", "backwards"))
    assert one.read_bytes() == other.read_bytes()


def test_what_a_killed_run_left_out_of_order_is_put_in_order_by_the_next(tiny: Tiny) -> None:
    settings = tiny(*SMALL)
    run(settings)
    before = {path: path.read_bytes() for path in settings.output_dir.glob("pr*/**/*.jsonl")}
    for path, content in before.items():
        path.write_bytes(b"".join(reversed(content.splitlines(keepends=True))))
    run(settings)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("batch_size", "sizes"), [("2", [2, 2, 1]), ("auto", [5])])
def test_which_samples_share_a_unit_does_not_depend_on_what_is_finished(
    tiny: Tiny, tmp_path: Path, batch_size: str, sizes: list[int]
) -> None:
    rows = write_rows(tmp_path / "rows", {"trec": [row("trec", number) for number in range(5)]})
    given = ("benchmark.tasks=[trec]", "cells=[full@1]", f"batch_size={batch_size}")
    settings = tiny(*given, rows=rows)
    whole = list(units(left(settings).jobs))
    assert [len(unit.jobs) for unit in whole] == sizes
    run(tiny(*given, "limit=1", rows=rows))
    resumed = list(units(left(settings).jobs))
    assert [[job.sample.id for job in unit.jobs] for unit in resumed] == [
        [job.sample.id for job in unit.jobs if job.sample.id != "trec-0"] for unit in whole
    ]


@pytest.fixture
def backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `executor=backwards` be a choice."""
    path = tmp_path / "configs" / "executor" / "backwards.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"_target_: {__name__}.Backwards\n")
    monkeypatch.setenv("KVMERGE_CONFIG_DIR", str(tmp_path / "configs"))


@pytest.mark.usefixtures("backwards")
def test_an_executor_is_a_file_of_its_group() -> None:
    assert compose("executor=backwards").executor == Backwards()


@pytest.mark.usefixtures("backwards")
@pytest.mark.parametrize("kind", ["observations", "selfcheck", "noise"])
def test_only_a_comparison_has_another_executor_than_local(kind: str) -> None:
    assert compose(f"experiment={kind}", "executor=local")
    with pytest.raises(UserError, match=rf"executor=backwards: kind={kind} runs in one process"):
        compose(f"experiment={kind}", "executor=backwards")


def test_an_unknown_executor_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"unknown executor 'ary'.*Available: .*local"):
        compose("executor=ary")
