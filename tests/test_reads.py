"""No file of a run is read twice: counted by the interpreter itself, over a whole command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import atexit, collections, json, sys
opened = collections.Counter()

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and "r" in (arguments[1] or "r"):
        opened[arguments[0]] += 1

sys.addaudithook(watch)
from harness.cli import main
try:
    main()
finally:
    with open(sys.argv.pop(), "w") as file:
        json.dump(opened, file)
"""


def reads(tmp_path: Path, *overrides: str) -> Counter[str]:
    """How often each file was opened for reading by one command."""
    out = tmp_path / "opened.json"
    program = PROGRAM.replace("sys.argv.pop()", repr(str(out)))
    subprocess.run([sys.executable, "-c", program, *overrides], check=True, cwd=ROOT)
    return Counter(json.loads(out.read_text()))


def test_a_run_reads_each_config_once_and_each_of_its_records_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cells = "cells=[full@1,kvmerger@0.5,h2o@0.5,h2o@0.35,kvmerger_log@0.5]"
    command = [
        "model=tiny-random",
        "benchmark.tasks=[passkey,quotation]",
        "limit=1",
        cells,
        f"output_dir={folder}",
    ]
    first = reads(tmp_path, *command)
    again = reads(tmp_path, *command)
    configs = {path: n for path, n in first.items() if path.startswith(str(ROOT / "configs"))}
    # Hydra composes twice by itself: once to learn whether it is a sweep. The rest is ours.
    composed = {"config", "smollm2-135m", "tiny-random", "_base", "mini", "kvmerger"}
    ours = {Path(path).stem: n - 2 * (Path(path).stem in composed) for path, n in configs.items()}
    assert {name for name, n in ours.items() if n} == {"full", "h2o", "kvmerger", "kvmerger_log"}
    assert max(ours.values()) == 1
    records = {path: n for path, n in again.items() if path.startswith(str(folder / "predictions"))}
    assert len(records) == 10
    assert set(records.values()) == {1}
    assert again[str(folder / "run.json")] == 1
    published = {n for path, n in first.items() if path.startswith(str(ROOT / "results/reference"))}
    assert published == {1}
