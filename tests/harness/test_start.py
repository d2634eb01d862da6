"""What is settled before torch is imported: how many threads there are."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import kvmerge
from harness.start import SPINS, see_working_directory, settle_threads, usable_processors

ROOT = Path(__file__).resolve().parents[2]


def test_there_is_a_thread_for_each_usable_processor_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == str(usable_processors())


def test_a_worker_has_a_thread_for_each_core_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for cores, threads in ((7, "7"), (0, "1"), (None, "1")):
        settle_threads(cores)
        assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    ("quota", "usable"),
    [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("?", 4)],
)
def test_a_container_s_share_bounds_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, usable: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_processors(tmp_path / "cpu.max") == usable
    assert usable_processors(tmp_path / "absent") == 4


def test_modules_of_the_working_directory_are_found_and_hide_no_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/installed"])
    see_working_directory()
    see_working_directory()
    assert sys.path == ["/installed", str(tmp_path)]


def test_nothing_that_loads_openmp_is_imported_before_threads_are_settled() -> None:
    code = "import sys, harness.start; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n"


def test_an_interrupt_while_torch_is_imported_has_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from harness.start import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "kvmerge: loading torch and transformers\n"


def test_the_version_is_ours_and_costs_no_import() -> None:
    code = "import sys, harness.start; harness.start.main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"kvmerge {kvmerge.__version__}\nFalse\n"
    assert kvmerge.__version__ == version("kvmerge")


def test_threads_sleep_soon_unless_the_user_says_how_they_wait(monkeypatch):
    for given, wanted in (
        ({}, SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        settle_threads()
        assert os.environ.get("GOMP_SPINCOUNT") == wanted
        monkeypatch.undo()
