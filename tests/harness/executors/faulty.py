"""A method that meets faults where its worker is: each is a file, taken by the first to come."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from baselines.streaming_llm import StreamingLLM
from kvmerge.method import Allowance, Entries, PrefillLayer


@dataclass(frozen=True)
class Faulty(StreamingLLM):
    """StreamingLLM, in a process that may be killed, hang or raise."""

    folder: str = ""
    """Where the faults lie: `kill`, `kill-always`, `kill-later` with seconds in it, `hang`, `raise`."""

    def compress(self, layer: PrefillLayer, allowance: Allowance) -> Entries:
        if (Path(self.folder) / "kill-always").exists() or self._takes("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        later = Path(self.folder) / "kill-later"
        seconds = later.read_text() if later.exists() else ""
        if seconds and self._takes("kill-later"):
            threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self._takes("hang"):
            (Path(self.folder) / "hangs").write_text(_whereabouts())
            time.sleep(600)
        if self._takes("raise"):
            raise RuntimeError("a fault")
        return super().compress(layer, allowance)

    def _takes(self, fault: str) -> bool:
        try:
            (Path(self.folder) / fault).unlink()
        except FileNotFoundError:
            return False
        return True


def _whereabouts() -> str:
    import ray

    return f"{ray.get_runtime_context().get_node_id()} {os.getpid()}"
