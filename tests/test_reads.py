"""No file of a run is read twice: counted by the interpreter itself, over two whole commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CELLS = "cells=[full@1,kvmerger@0.5,h2o@0.5,h2o@0.35,kvmerger_log@0.5]"
TWICE = """
import collections, json, sys
counts = []

def watch(event, arguments):
    if counts and event == "open" and isinstance(arguments[0], str) and "r" in (arguments[1] or "r"):
        counts[-1][arguments[0]] += 1

sys.addaudithook(watch)
counts.append(collections.Counter())
from harness.cli import main
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure

Figure.savefig = lambda *_, **__: None  # slow, and reads nothing of a run
out = sys.argv.pop()
main()
GlobalHydra.instance().clear()
counts.append(collections.Counter())
main()
with open(out, "w") as file:
    json.dump(counts, file)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def reads(data: Path, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """How often a process opened each file for reading: in a command, and in the same again."""
    command = [
        "model=tiny-random",
        "benchmark=longbench",
        f"benchmark.data_dir={data}",
        "benchmark.tasks=[trec,lcc]",
        "limit=1",
        CELLS,
        f"output_dir={folder}",
    ]
    out = folder.parent / "opened.json"
    subprocess.run(
        [sys.executable, "-c", TWICE, *command, str(out)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    first, again = json.loads(out.read_text())
    return Counter(first), Counter(again)


def test_a_process_reads_each_methods_file_once(reads: tuple[Counter[str], Counter[str]]) -> None:
    # Hydra composes twice a command by itself: once to learn whether it is a sweep. The rest is ours.
    composed = {"config", "smollm2-135m", "tiny-random", "_base", "longbench", "kvmerger", "local"}
    ours = [
        {
            Path(path).stem: n - 2 * (Path(path).stem in composed)
            for path, n in opened.items()
            if path.startswith(str(ROOT / "configs"))
        }
        for opened in reads
    ]
    methods = {"full", "h2o", "kvmerger", "kvmerger_log"}
    assert {name: n for name, n in ours[0].items() if n} == dict.fromkeys(methods, 1)
    assert {name: n for name, n in ours[1].items() if n} == {}


def test_a_run_that_is_resumed_reads_each_of_its_files_once(
    reads: tuple[Counter[str], Counter[str]], folder: Path
) -> None:
    _, again = reads
    records = {path: n for path, n in again.items() if path.startswith(str(folder / "predictions"))}
    assert len(records) == 10
    assert set(records.values()) == {1}
    assert again[str(folder / "run.json")] == 1


def test_the_published_numbers_are_read_once(reads: tuple[Counter[str], Counter[str]]) -> None:
    first, _ = reads
    published = {n for path, n in first.items() if path.startswith(str(ROOT / "results/reference"))}
    assert published == {1}
