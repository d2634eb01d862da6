"""Two writers in one results folder: the second is refused, and a dead one is in nobody's way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.lock import FILE, only_writer
from kvmerge.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from harness.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_writer_is_refused_and_told_who_the_first_is(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    told = f"{tmp_path} is being written by process {holder.pid} on {socket.gethostname()} since 20"
    with pytest.raises(UserError, match=told), only_writer(tmp_path):
        pytest.fail("two writers")


def test_a_point_of_a_sweep_waits_until_the_folder_is_free(
    tmp_path: Path, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    threading.Timer(0.3, holder.kill).start()
    with only_writer(tmp_path, wait=True):
        assert holder.wait() == -signal.SIGKILL, "it held the folder until then"
        assert f'"pid": {os.getpid()}' in (tmp_path / FILE).read_text()
    assert f"waiting: {tmp_path} is being written by process {holder.pid}" in caplog.text


def test_a_killed_writer_is_in_nobodys_way(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / FILE).exists()
    with only_writer(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / FILE).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_has_not_said_who_it_is_still_holds(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    (tmp_path / FILE).write_text("")
    with (
        pytest.raises(UserError, match="written by another process"),
        only_writer(tmp_path),
    ):
        pytest.fail("two writers")


def test_a_folder_is_free_again_after_the_block_and_after_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), only_writer(tmp_path):
        raise RuntimeError
    with only_writer(tmp_path), pytest.raises(UserError), only_writer(tmp_path):
        pytest.fail("two writers in one process")
    with only_writer(tmp_path):
        pass


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with only_writer(tmp_path / "new"):
        (tmp_path / "new" / "result").touch()
    assert (tmp_path / "new" / "result").exists()
