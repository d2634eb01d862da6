"""The calls that docs/results.md shows load every line of a run as it was written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.records import Record
from tests.synthetic_run import record, write_run

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), re.DOTALL
)
CELLS: dict[str, dict[str, list[Record]]] = {
    "cam@0.5": {
        # what no line of the first file has, and what no other task has
        "qa": [record("0", 1.0, kl_to_full=None), record("1", 0.0, kl_to_full=None, seed=43)],
        "summaries": [
            record("0", 0.3, extra={"rouge1": 0.4, "rouge2": 0.2, "rougel": 0.3375}, seed=42)
        ],
    },
    "kvmerger@0.5": {
        "qa": [record("0", 0.5, kl_to_full=0.25, merged_tokens=3.5, prediction="a\u2028b\r\n ü")],
        "summaries": [record("0", 0.1, kept_entries_by_layer=[50.0, 49.5], answers=())],
        "needle": [record("0", 1.0, extra={"groups": {"length": 512, "depth": 0}})],
    },
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = {"qa": "qa_f1", "summaries": "rouge_gm", "needle": "number"}
    return write_run(tmp_path / "run", tasks, CELLS)


def written(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("predictions/*/*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def test_datasets_loads_every_line_with_what_it_lacks_as_null(run: Path) -> None:
    names: dict[str, Any] = {"output_dir": run}
    exec(BLOCKS[0], names)
    loaded = names["lines"].to_list()
    lines = written(run)
    assert len(loaded) == len(lines) == 6

    def place(line: dict[str, Any]) -> str:
        return f"{line['id']} {line['seed']} {line['score']}"

    for line, read in zip(sorted(lines, key=place), sorted(loaded, key=place), strict=True):
        assert {name: read[name] for name in line} == line
        assert all(read[name] is None for name in read.keys() - line.keys())


def test_pandas_gives_the_mean_score_by_task_and_cell(run: Path) -> None:
    names: dict[str, Any] = {"output_dir": run}
    exec(BLOCKS[1], names)
    assert names["scores"].loc["qa", "cam@0.5"] == 50
    assert names["scores"].loc["needle", "kvmerger@0.5"] == 100
