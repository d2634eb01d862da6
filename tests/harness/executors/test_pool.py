"""Workers of Ray that are killed, hang, or lose their machine: the run writes what a local one does."""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.executors.on_ray import import_ray
from harness.executors.units import units
from harness.runner import left, run
from harness.settings import Settings
from harness.stopping import Stopped
from kvmerge.errors import UserError
from tests.killing import POINTS
from tests.tiny_run import read_lines, row, write_rows

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed (make cluster)", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[3]
CELLS = ("benchmark.tasks=[trec,lcc]", "cells=[full@1,faulty@0.5]")
RAY = ("executor=ray", "executor.workers=2", "batch_size=1")
PATIENT = "executor.retries=20"
"""Where a busy machine may pass for a worker that hangs."""
DEADLINE = 300.0
"""Seconds after which a busy machine is no excuse."""

Tiny = Callable[..., Settings]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes on this machine; the first one, which this process joins, has no room for workers."""
    before = signal.getsignal(signal.SIGTERM)
    ray = import_ray()
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    signal.signal(signal.SIGTERM, before)  # Ray's own ends the process, and whatever is tested next


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a file is a fault of the method `faulty`."""
    folder, method = tmp_path / "faults", tmp_path / "configs" / "method" / "faulty.yaml"
    for each in (folder, method.parent):
        each.mkdir(parents=True)
    method.write_text(f"_target_: tests.harness.executors.faulty.Faulty\nsinks: 4\nfolder: {folder}\n")
    monkeypatch.setenv("KVMERGE_CONFIG_DIR", str(tmp_path / "configs"))
    return folder


@pytest.fixture
def whole(tiny: Tiny, faults: Path, tmp_path: Path) -> Path:
    """What a local run writes."""
    settings = tiny(*CELLS, "batch_size=1", folder=tmp_path / "local")
    run(settings)
    return settings.output_dir


def assert_same(found: Path, wanted: Path) -> None:
    assert list(read_lines(found).items()) == list(read_lines(wanted).items()), "in the same order too"
    for path in wanted.glob("prompts/*"):
        assert (found / "prompts" / path.name).read_bytes() == path.read_bytes()


def wait_for(is_there: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not is_there():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


@pytest.fixture
def then() -> Iterator[Callable[..., None]]:
    """Do something in a thread once a file is there."""
    threads = []

    def start(path: Path, action: Callable[[], None]) -> None:
        def act() -> None:
            wait_for(lambda: path.exists() and path.read_text() != "")
            action()

        threads.append(threading.Thread(target=act))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("cluster")
def test_two_workers_write_what_one_process_does_though_one_is_killed_and_a_sample_raises(
    tiny: Tiny, faults: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for fault in ("kill", "raise"):
        (faults / fault).touch()
    settings = tiny(*CELLS, *RAY)
    (failure,) = run(settings).failures.new
    assert failure.error == "RuntimeError: a fault"
    assert "faulty.py" in failure.traceback
    assert not any(faults.iterdir())
    (lost,) = (message for message in caplog.messages if "is lost" in message)
    assert "worker process has died" in lost
    assert "to be answered by another" in lost
    assert len(read_lines(settings.output_dir)) == 2 * 5
    run(tiny(*CELLS, "batch_size=1"))  # by another executor
    assert_same(settings.output_dir, whole)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_hangs_is_replaced(
    tiny: Tiny, faults: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (faults / "hang").touch()
    settings = tiny(*CELLS, *RAY, "executor.timeout=5", PATIENT)
    run(settings)
    assert "no answer within 5.0 s, by executor.timeout" in caplog.text
    assert_same(settings.output_dir, whole)


def test_a_node_may_be_removed_and_its_work_is_done_by_the_other(
    tiny: Tiny,
    faults: Path,
    whole: Path,
    cluster: Any,
    then: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (faults / "hang").touch()

    def remove() -> None:
        gone = (faults / "hangs").read_text().split()[0]
        cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id == gone))

    then(faults / "hangs", remove)
    settings = tiny(*CELLS, *RAY)
    run(settings)
    assert "a worker is lost" in caplog.text
    assert_same(settings.output_dir, whole)
    cluster.add_node(num_cpus=1)  # for those who come next


@pytest.mark.usefixtures("cluster")
def test_a_unit_that_costs_too_many_workers_ends_the_run_by_name(tiny: Tiny, faults: Path) -> None:
    (faults / "kill-always").touch()
    with pytest.raises(
        UserError,
        match=r"task trec, sample 'trec-\d': 1 worker was lost while they answered it, which is one "
        r"more than executor\.retries=0\. The last: .*worker process has died",
    ):
        run(tiny(*CELLS, *RAY, "executor.retries=0"))


@pytest.mark.usefixtures("cluster")
def test_the_second_signal_ends_a_run_whose_worker_hangs_and_nothing_is_lost(
    tiny: Tiny, faults: Path, whole: Path, then: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    (faults / "hang").touch()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: "once more ends it at once" in caplog.text)
        os.kill(os.getpid(), signal.SIGINT)

    then(faults / "hangs", interrupt)
    settings = tiny(*CELLS, *RAY)
    with pytest.raises(Stopped):
        run(settings)
    run(tiny(*CELLS, "batch_size=1"))
    assert_same(settings.output_dir, whole)


def test_a_driver_that_is_killed_leaves_no_worker_and_is_resumed(
    tiny: Tiny, faults: Path, whole: Path, data: Path
) -> None:
    settings = tiny(*CELLS)
    hangs = faults / "hangs"
    (faults / "hang").touch()
    words = [
        *("benchmark=longbench", f"benchmark.data_dir={data}"),
        *(f"model.path={settings.model.path}", f"output_dir={settings.output_dir}"),
        *("num_seeds=2", *CELLS, "batch_size=1", "executor=ray", "executor.workers=1"),
    ]
    with subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT, text=True) as driver:
        wait_for(lambda: hangs.exists() and hangs.read_text() != "")
        driver.kill()
    worker = psutil.Process(int(hangs.read_text().split()[1]))
    wait_for(lambda: not worker.is_running())
    run(tiny(*CELLS, "batch_size=1"))
    assert_same(settings.output_dir, whole)


def test_a_driver_killed_at_random_lines_and_resumed_leaves_the_files_of_a_whole_run(
    tiny: Tiny, faults: Path, whole: Path, cluster: Any, tmp_path: Path
) -> None:
    def in_process(settings: Settings, last: int | None) -> int:
        given = tmp_path / "settings"
        given.write_bytes(pickle.dumps(settings))
        command = [sys.executable, "-m", "tests.killing", given, str(last).lower(), tmp_path / "lines"]
        return subprocess.run(command, cwd=ROOT, check=False).returncode

    joined = (*CELLS, *RAY, f"executor.address={cluster.address}")
    assert in_process(tiny(*joined, folder=tmp_path / "unkilled"), None) == 0
    lines = int((tmp_path / "lines").read_text())
    draw = random.Random(0)
    for point in (draw.randrange(lines) for _ in range(POINTS)):
        settings = tiny(*joined, folder=tmp_path / f"killed at {point} of {lines}")
        ended = in_process(settings, point)
        # a run that waits less often has fewer lines
        assert ended == -signal.SIGKILL or int((tmp_path / "lines").read_text()) <= point
        assert in_process(settings, None) == 0
        assert_same(settings.output_dir, whole)


@pytest.mark.usefixtures("cluster")
def test_workers_killed_at_random_moments_leave_the_files_of_a_whole_run(
    tiny: Tiny, faults: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw, lost = random.Random(0), 0
    for point in range(POINTS):
        seconds = draw.uniform(0, 0.5)
        (faults / "kill-later").write_text(str(seconds))
        settings = tiny(*CELLS, *RAY, PATIENT, folder=tmp_path / f"{point}, killed after {seconds}")
        run(settings)
        assert_same(settings.output_dir, whole)
        lost += "a worker is lost" in caplog.text
        caplog.clear()
    assert lost, "some died before the run's end"


def test_the_longest_units_of_a_task_come_first(tiny: Tiny, tmp_path: Path) -> None:
    from harness.executors.pool import longest_first

    of_task = {"trec": (1, 3, 2), "lcc": (2, 1, 4)}
    rows = {
        task: [row(task, number, context="word " * words) for number, words in enumerate(of_words)]
        for task, of_words in of_task.items()
    }
    settings = tiny(
        "benchmark.tasks=[trec,lcc]", "batch_size=1", rows=write_rows(tmp_path / "rows", rows)
    )
    found = longest_first(list(units(left(settings).jobs)))
    ids = [job.sample.id for unit in found for job in unit.jobs]
    assert ids == ["trec-1", "trec-2", "trec-0", "lcc-2", "lcc-0", "lcc-1"]
