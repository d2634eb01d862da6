"""What a person sees of the scores while a run is under way."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from benchmarks.longbench.tasks import TASKS
from harness.live import LiveScores


def record(name: str, score: float) -> Any:
    return SimpleNamespace(id=name, score=score, extra={})


def shown(scores: LiveScores) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=200)
    console.print(scores.table())
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.split() for line in text.splitlines()]


def test_scores_so_far_are_those_of_the_records_and_follow_them() -> None:
    tasks = [task for task in TASKS if task.name in ("trec", "lcc")]
    records = {("trec", "full@1"): [record("a", 1.0), record("b", 0.5)], ("trec", "h2o@0.5"): []}
    results: Any = SimpleNamespace(records=lambda task, cell: records[task, cell])
    cells: Any = [SimpleNamespace(name="full@1"), SimpleNamespace(name="h2o@0.5")]
    scores = LiveScores(results, tasks, cells)
    assert shown(scores) == [["scores", "so", "far"], ["full@1"], ["h2o@0.5"]]
    scores.note("trec")
    assert shown(scores)[1:] == [["full@1", "75.0", "(2)"], ["h2o@0.5"]]
    records["trec", "h2o@0.5"].append(record("a", 0.25))
    assert shown(scores)[1:] == [["full@1", "75.0", "(2)"], ["h2o@0.5", "25.0", "(1)"]]
