"""The command line: compose the configuration, run it, show the table.

A user error prints one message and exits with status 2; everything else keeps its traceback.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from harness.plan import print_plan
from harness.report.gates import log_gate
from harness.report.run import load_run
from harness.report.terminal import print_comparison
from harness.results import Results
from harness.runner import run
from harness.settings import Choices, Settings, check_choices, settings_from
from kvmerge.errors import UserError
from kvmerge.resolve import config_dir

USER_ERROR = 2
INTERRUPTED = 130
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the disk that only its owner can mend."""


def main() -> None:
    """Entry point of `run.py` and of the `kvmerge` command."""
    _show_log()
    started: list[bool] = []  # tells an error of the configuration from one of the run

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def task(config: DictConfig) -> None:
        started.append(True)
        _guarded(lambda: execute(config))

    _guarded(lambda: check_choices(sys.argv[1:]))
    try:
        task()
    except SystemExit as stop:
        # Hydra has printed its message about the configuration and left with 1.
        sys.exit(USER_ERROR if stop.code == 1 and not started else stop.code)


def execute(config: DictConfig) -> None:
    """Run one composed configuration."""
    settings = settings_from(config, Choices.of(HydraConfig.get()))
    console = Console()
    if config.dry_run:
        print_plan(settings, console)
        return
    results = run(settings, after_task=partial(log_gate, settings.benchmark.name))
    report(settings, results, console)


def report(settings: Settings, results: Results, console: Console) -> None:
    """Write summary, tables and plots of a finished run, show the table and name the files."""
    if settings.num_shards > 1:
        console.print(
            f"shard {settings.shard} of {settings.num_shards} is done: {settings.results_dir}\n"
            f"When all are: make report DIRS={settings.output_dir}",
            soft_wrap=True,
        )
        return
    from harness.report.page import write_report  # matplotlib is slow to import

    loaded = load_run(settings.output_dir, results)
    page = write_report([loaded])
    print_comparison(loaded, console)
    for path in ("summary.csv", "run.json", "predictions/", "tables/", "plots/"):
        console.print(f"  {settings.output_dir / path}", soft_wrap=True, highlight=False)
    console.print(f"  {page}", soft_wrap=True, highlight=False)


def _show_log() -> None:
    """Show what the project itself reports (downloads, repairs), and warnings of the libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("benchmarks", "harness", "kvmerge"):
        logging.getLogger(package).setLevel(logging.INFO)


def _guarded(action: Callable[[], None]) -> None:
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(
            f"error: {error.strerror}{where}. What is finished is kept; the same command resumes.",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, the same command resumes.", file=sys.stderr)
        sys.exit(INTERRUPTED)
