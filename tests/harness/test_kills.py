"""A run that is killed at any line of the harness, and resumed, leaves what a whole run does.

`KVMERGE_KILLS=30 python -m pytest tests/harness/test_kills.py` tries more points than the suite does.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.settings import Settings
from tests.killing import POINTS, run_until
from tests.tiny_run import assert_same_lines, read_lines

Tiny = Callable[..., Settings]
SMALL = ("benchmark.tasks=[trec,lcc]", "cells=[full@1,cam@0.5]", "batch_size=2")


def in_child(settings: Settings, last: int | None, counted: Path) -> int:
    """Run in a process of its own, killed at the line of this number; return how it ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    status = 1
    try:
        torch.set_num_threads(1)
        run_until(settings, last, counted)
        status = 0
    finally:
        os._exit(status)


@pytest.fixture
def whole(tiny: Tiny, tmp_path: Path) -> tuple[Path, int]:
    """A run that nothing befell, and the lines that it passed."""
    settings = tiny(*SMALL, folder=tmp_path / "whole")
    assert in_child(settings, None, tmp_path / "lines") == 0
    return settings.output_dir, int((tmp_path / "lines").read_text())


def test_a_run_killed_at_random_lines_and_resumed_leaves_the_files_of_a_whole_one(
    tiny: Tiny, tmp_path: Path, whole: tuple[Path, int]
) -> None:
    folder, lines = whole
    draw = random.Random(0)
    for point in (draw.randrange(lines) for _ in range(POINTS)):
        settings = tiny(*SMALL, folder=tmp_path / f"killed at {point} of {lines}")
        assert in_child(settings, point, tmp_path / "lines") == -signal.SIGKILL
        assert in_child(settings, None, tmp_path / "lines") == 0
        found, wanted = read_lines(settings.output_dir), read_lines(folder)
        assert_same_lines(found, wanted)
        assert list(found) == list(wanted), "in the benchmark's order"
        for path in (folder / "prompts").iterdir():
            assert (settings.output_dir / "prompts" / path.name).read_bytes() == path.read_bytes()
