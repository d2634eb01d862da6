"""How much memory does a long prompt need, beside plain transformers?

Each way runs in a process of its own, so that nothing of one is left in the other's peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

from scripts.bench.measure import Bench, Report

_WAYS = ("generate", "generate, packed weights", "full@1", "kvmerger@0.35", "seven cells")


def memory(bench: Bench, length: int = 8000) -> Report:
    """Measure the peak of a prompt and 16 answer tokens above the loaded model, one process a way."""
    rows = []
    for way in _WAYS:
        command = [sys.executable, "-m", "scripts.bench.memory", way, str(length), *bench.overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"run": way} | json.loads(done.stdout.splitlines()[-1]))
    return Report(
        "memory",
        f"Memory of a prompt of {length:,} tokens",
        "Resident memory, sampled every 2 ms; 16 answer tokens, fidelity off.",
        rows,
        "during prefill the compressed caches and at most two full layers, which "
        "tests/kvmerge/test_memory.py counts",
    )


def child(way: str, length: int, overrides: Sequence[str]) -> dict[str, float]:
    """Run one way in this process, and give the peak in MiB above what was there before."""
    bench = Bench(overrides, repeats=1)
    model = bench.plain if way == "generate" else bench.model
    bench.generate(model, [bench.prompt(64)], 2)  # libraries allocate at their first use
    ids = [bench.prompt(length)]
    process = psutil.Process()
    loaded = process.memory_info().rss
    peak = loaded
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if way.startswith("generate"):
        bench.generate(model, ids, 16)
    else:
        bench.run(ids, bench.rows(bench.cells if way == "seven cells" else [way]), 16)
    done.set()
    watcher.join()
    return {"peak above the model MiB": round((peak - loaded) / 2**20)}


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
