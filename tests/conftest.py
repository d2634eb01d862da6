"""What whole runs need: a checkpoint and data on disk, and `run.py` in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import absl.logging
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from harness import cli
from harness.settings import Settings
from tests.tiny_run import TASKS, row, save_checkpoint, tiny_settings, write_rows

# rouge_score imports absl, whose handler takes for its own the stream that tests are captured in, and
# closes it as Hydra sets logging up. Those of the process it leaves open.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

# The same examples everywhere, and no test that fails because a machine is busy.
settings.register_profile("kvmerge", deadline=None, derandomize=True)
settings.load_profile("kvmerge")


class Output(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same numbers in every run of a test that names no generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples of each of four LongBench tasks; not to be changed."""
    rows = {task: [row(task, number) for number in range(3)] for task in TASKS}
    return write_rows(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture
def tiny(checkpoint: Path, data: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a run with the tiny model on all four tasks; overrides change them."""

    def settings(*overrides: str, folder: Path = tmp_path / "out", rows: Path = data) -> Settings:
        return tiny_settings(checkpoint, rows, folder, *overrides)

    return settings


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one empty picture with a true caption where drawing is not the point: it takes seconds."""
    from harness.report.page import assemble  # matplotlib is slow to import
    from harness.report.plots.draw import Drawn
    from harness.report.plots.style import Plot
    from harness.report.words import setting

    monkeypatch.setattr(
        assemble,
        "draw_all",
        lambda run, by_method, judgement: Drawn(
            (Plot("scores_by_task", "Scores by task", setting(run), "Marks.", b"", b""),)
        ),
    )


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Run `run.py` in this process, in an empty folder; gives its exit status and output."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> Output:
        monkeypatch.setattr("sys.argv", ["run.py", *arguments])
        capfd.readouterr()
        status: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            GlobalHydra.instance().clear()
        assert isinstance(status, int)
        return Output(status, *capfd.readouterr())

    return run
