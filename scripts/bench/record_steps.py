"""Take one step over a folder of records in this process, and say what it took.

Each step imports what it needs and no more, as the command does that a user gives.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

_Work: TypeAlias = Callable[[Path], object]


def _resume() -> _Work:
    from harness.results import Results
    from harness.runner import pending
    from harness.settings import compose

    def work(folder: Path) -> None:
        cells = ",".join(json.loads((folder / "run" / "run.json").read_text())["cells"])
        data = f"benchmark.data_dir={folder / 'data'}"
        asked = ["benchmark=longbench", "model=tiny-random", "num_seeds=1", data, f"cells=[{cells}]"]
        settings = compose([*asked, f"output_dir={folder / 'run'}"])
        assert not pending(settings, Results(folder / "run")).jobs

    return work


def _summary() -> _Work:
    from harness.report.run import load_run
    from harness.report.summary import write_summary

    return lambda folder: write_summary(load_run(folder / "run"))


def _report() -> _Work:
    from harness.report.page import write_report
    from harness.report.run import load_run

    return lambda folder: write_report([load_run(folder / "run")])


def _check() -> _Work:
    from scripts.records import check

    def work(folder: Path) -> None:
        assert not list(check(folder / "run"))

    return work


STEPS: Mapping[str, Callable[[], _Work]] = {
    "what is left of the run": _resume,
    "summary": _summary,
    "report, its summary too": _report,
    "check": _check,
}


def measured(step: str, folder: Path) -> dict[str, Any]:
    """Take one step, once its libraries are loaded."""
    work = STEPS[step]()
    loaded = _peak()
    started, used = time.perf_counter(), time.process_time()
    work(folder)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "CPU seconds": round(time.process_time() - used, 1),
        "peak MiB": _peak(),
        "libraries MiB": loaded,
    }


def _peak() -> int:
    """Return the most memory that this process has held, MiB.

    `ru_maxrss` begins with what the process held that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10)  # type: ignore[index]


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], Path(sys.argv[2]))))
