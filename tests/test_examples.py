"""The examples run as a person runs them, on the model that needs no weights."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.synthetic_run import record, write_run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `examples/<name>.py` with arguments, and return what it prints."""

    def run(name: str, *arguments: str) -> str:
        path = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_chat_is_answered_from_a_compressed_cache(example):
    arguments = [
        "--model",
        "tiny-random",
        "--max-new-tokens",
        "4",
        "--method",
        "h2o",
        "--budget",
        "100",
    ]
    printed = example("compress_a_chat", *arguments)
    tokens, kept = re.search(r"(\d+) prompt tokens, ([\d.]+) entries", printed).groups()
    assert int(tokens) > len((ROOT / "LICENSE").read_text(encoding="utf-8"))
    assert float(kept) == 100


@pytest.mark.parametrize(
    ("recompress", "compressed"), [("never", ["True", "False"]), ("each_turn", ["True", "True"])]
)
def test_a_chat_goes_on_from_its_cache(example, recompress, compressed):
    short = ["--model", "tiny-random", "--max-new-tokens", "4", "--method", "h2o", "--budget", "0.5"]
    printed = example("chat_turn_after_turn", *short, "--recompress", recompress)
    header, *lines = [line.split() for line in printed.splitlines()[-3:]]
    table = pd.DataFrame(lines, columns=header)
    assert table.turn.tolist() == ["1", "2"]
    assert table.compressed.tolist() == compressed
    first, second = table.prompt_tokens.astype(int) + table.appended_tokens.astype(int)
    assert second > first + 4


def test_methods_are_compared_on_prompts_from_the_command_line(example, tmp_path: Path):
    prompts = ["--prompts", "The river was high in spring.", "The mill stood still."]
    cells = ["--cells", "full@1", "kvmerger@10"]
    csv = tmp_path / "table.csv"
    short = ["--model", "tiny-random", "--max-new-tokens", "4", "--csv", str(csv)]
    printed = example("compare_methods", *short, *cells, *prompts)
    assert printed.count("prompt 1, ") == 2
    table = pd.read_csv(csv)
    assert table.cell.tolist() == ["full@1", "kvmerger@10"] * 2
    assert table.kept_entries[table.cell == "kvmerger@10"].tolist() == [10, 10]


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """A run of two cells on two tasks, with ids that look like numbers."""
    by_task = {"qa": [record("001", 0.25), record("002", 0.75)], "code": [record("1", 1)]}
    half = {"qa": [record("001", 0), record("002", 0.5)], "code": [record("1", 0.1)]}
    return write_run(
        tmp_path, {"qa": "qa_f1", "code": "code_sim"}, {"full@1": by_task, "h2o@0.5": half}
    )


def test_records_become_a_table_of_means(example, output_dir: Path):
    printed = example("read_records", str(output_dir))
    header, _, *lines = [line.split() for line in printed.splitlines()[2:]]
    assert header == ["cell", "full@1", "h2o@0.5", "mean"]
    assert lines[:2] == [["code", "1.000", "0.10", "0.550"], ["qa", "0.500", "0.25", "0.375"]]


def test_a_folder_without_records_is_named(example, tmp_path: Path):
    with pytest.raises(SystemExit, match=f"{re.escape(str(tmp_path))} holds no records"):
        example("read_records", str(tmp_path))
