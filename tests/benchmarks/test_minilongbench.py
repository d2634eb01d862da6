"""MiniLongBench: LongBench's tasks on its own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import longbench, source
from benchmarks.longbench import tasks
from benchmarks.longbench.benchmark import LongBench
from benchmarks.longbench.tasks import find_task
from benchmarks.minilongbench import FILES, REVISION, ROWS, MiniLongBench
from benchmarks.source import HubFile
from kvmerge.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/longbench"


def rows(task: str, count: int, **changes: Any) -> list[dict[str, Any]]:
    fields = {
        "input": "Which?",
        "context": "A text.",
        "answers": ["Paragraph 1"],
        "all_classes": None,
        "dataset": task,
        "_id": "",
    }
    return [fields | {"_id": str(number)} | changes for number in range(count)]


def write(folder: Path, task: str, lines: list[dict[str, Any]]) -> None:
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_published_rows_are_237_in_the_order_of_longbench() -> None:
    assert list(ROWS) == [task.name for task in tasks.TASKS]
    assert sum(ROWS.values()) == 237


def test_every_task_has_one_file_at_one_commit() -> None:
    assert [file.filename for file in FILES] == [f"data/{name}.jsonl" for name in ROWS]
    assert {(file.repo, file.revision) for file in FILES} == {("linggm/MiniLongBench", REVISION)}
    assert len(REVISION) == 40


def test_rows_become_longbenchs_samples(tmp_path: Path) -> None:
    write(tmp_path, "qasper", rows("qasper", ROWS["qasper"]))
    mini, full = MiniLongBench(str(tmp_path), ["qasper"]), LongBench(str(tmp_path), ["qasper"])
    assert mini.tasks == full.tasks
    samples = mini.samples(mini.tasks[0])
    assert samples == full.samples(full.tasks[0])
    assert mini.score(samples[0], mini.tasks[0], "paragraph 1.") == {"score": 1}
    assert mini.notes() == []


@pytest.mark.parametrize("dataset", ["MiniLongBench_qasper", None])
def test_a_row_is_taken_whatever_its_dataset_field_holds(tmp_path: Path, dataset: str | None) -> None:
    write(tmp_path, "qasper", rows("qasper", 1, dataset=dataset))
    (sample,) = MiniLongBench(str(tmp_path), ["qasper"]).samples(find_task("qasper"))
    assert sample.prompt == longbench.prompt(rows("qasper", 1)[0])


def test_a_row_that_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "passage_retrieval_en", rows("passage_retrieval_en", 1, answers=["one"]))
    benchmark = MiniLongBench(str(tmp_path), ["passage_retrieval_en"])
    with pytest.raises(UserError, match="line 1: metric retrieval cannot"):
        benchmark.samples(benchmark.tasks[0])


def test_another_number_of_rows_is_noted(tmp_path: Path) -> None:
    write(tmp_path, "qasper", rows("qasper", 8))
    write(tmp_path, "passage_count", rows("passage_count", 4))
    (note,) = MiniLongBench(str(tmp_path), ["qasper", "passage_count"]).notes()
    assert note == "These are not MiniLongBench's rows, their number differs: qasper (8, not 9)."


def test_the_hubs_files_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "qasper", rows("qasper", 9))
    fetched: list[HubFile] = []

    def fetch(file: HubFile) -> Path:
        fetched.append(file)
        return tmp_path / Path(file.filename).name

    monkeypatch.setattr(source, "fetch", fetch)
    remote = MiniLongBench(tasks=["qasper"])
    assert fetched == []
    local = MiniLongBench(str(tmp_path), ["qasper"])
    assert remote.samples(remote.tasks[0]) == local.samples(local.tasks[0])
    assert remote.fingerprint() == local.fingerprint()
    assert {(file.filename, file.revision) for file in fetched} == {("data/qasper.jsonl", REVISION)}
    fetched.clear()
    other = MiniLongBench(tasks=["qasper"], revision="main")
    (note,) = other.notes()
    assert "revision main of linggm/MiniLongBench" in note
    assert {file.revision for file in fetched} == {"main"}


def test_real_rows_are_taken() -> None:
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is absent")
    benchmark = MiniLongBench(str(SHARED))
    counts = {task.name: len(benchmark.samples(task)) for task in benchmark.tasks}
    published = {
        name: count
        for name, count in counts.items()
        if name not in ("multifieldqa_zh", "multi_news", "passage_retrieval_zh")
    }
    # About six tenths of each task's rows are there, and no other rows in these tasks.
    assert published == {name: round(0.6 * ROWS[name]) for name in published}
