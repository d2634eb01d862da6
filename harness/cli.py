"""The command line: compose the configuration, run it, show the table.

A user error prints one message and exits with status 2; everything else keeps its traceback. Where some
samples fail the others are done, those are listed at the end, and the exit status is 3. Ctrl-C and the
signals that schedulers send (SIGTERM, SIGHUP) end a run alike, with 128 and the signal's number. Of a
sweep every point runs; those that failed are listed at the end, and the status is 2, or 3 where nothing
but samples failed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from harness.failures import SamplesFailed
from harness.launchers import SWEEPS, check_launcher, launcher_of, run_points, submits_jobs
from harness.lock import only_writer
from harness.noise import noise
from harness.observation import Observed
from harness.observing import observe_all
from harness.overrides import MULTIRUN, read_overrides, told
from harness.plan.show import print_plan
from harness.provenance import changed_beside
from harness.report.gates import log_gate
from harness.report.run import load_run
from harness.results import Results
from harness.runner import run
from harness.selfcheck import selfcheck
from harness.settings import Choices, Settings, settings_from
from harness.sources import take_config_dirs
from harness.stopping import Stopped, stopped_by_signals
from harness.sweep import Failed, Points, current_points, report_points, sweep
from kvmerge.command import USER_ERROR
from kvmerge.errors import UserError, first_line, is_of_storage
from kvmerge.files import remove_leftovers
from kvmerge.places import config_dir, config_dirs

SAMPLES_FAILED = 3


def main() -> None:
    """Run the command line, as `run.py` and the `kvmerge` command do."""
    _show_log()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints what it raises, and leaves

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def task(config: DictConfig) -> None:
        if points := current_points():
            _run_point(config, points)
        else:
            _guarded(lambda: execute(settings_from(config, Choices.of(HydraConfig.get()))))

    with stopped_by_signals():
        _guarded(lambda: _start(task))


def _start(task: Callable[[], None]) -> None:
    words, folders = take_config_dirs(sys.argv[1:])
    with config_dirs(folders):
        sys.argv[1:] = read_overrides(words)
        is_sweep = bool(MULTIRUN & set(sys.argv[1:]))
        launcher = launcher_of(sys.argv[1:])
        check_launcher(launcher, is_sweep)
        with told():
            if is_sweep:
                _sweep(task, launcher)
            else:
                task()


def _sweep(task: Callable[[], None], launcher: str) -> None:
    """Run every point of a sweep, report them together, and list those that failed."""
    with sweep(SWEEPS if submits_jobs(launcher) else None) as points:
        lost = run_points(task, launcher)
        report_points(points, Console())
        failed = [*points.failed, *map(Failed, lost)]
    if failed:
        others = "the others are done"
        if lost:
            others = "jobs that still run go on; the same command waits for them and does what is left"
        listed = "".join(f"\n  {each.line}" for each in failed)
        ended = SamplesFailed if all(each.by_samples for each in failed) else UserError
        raise ended(f"{len(failed)} of the points failed; {others}.{listed}")


def _run_point(config: DictConfig, points: Points) -> None:
    """Run one point of a sweep; what goes wrong is told now, noted for the end, and stops no other."""
    _show_log()  # again, where the point is a process of its own
    job = HydraConfig.get().job
    try:
        settings = settings_from(config, Choices.of(HydraConfig.get()))
        try:
            execute(settings)
        except SamplesFailed:
            points.note_done(job.num, settings)
            raise
        points.note_done(job.num, settings)
    except Exception as error:
        if not isinstance(error, UserError | SamplesFailed) and not is_of_storage(error):
            traceback.print_exc()
        line = f"{job.override_dirname}: {first_line(error)}"
        print(f"error: {job.override_dirname}: {error}", file=sys.stderr)
        points.note_failed(job.num, line, by_samples=isinstance(error, SamplesFailed))


def execute(settings: Settings) -> None:
    """Do what the settings are for."""
    _KINDS[settings.kind](settings, Console())


def compare(settings: Settings, console: Console) -> None:
    """Run a comparison and report it."""
    results = run(settings, after_task=partial(log_gate, settings.benchmark.name))
    if results.has_predictions():
        report(settings, results, console)
    results.failures.check()


def observe(settings: Settings, console: Console) -> None:
    """Observe prefills and report what was seen."""
    results = observe_all(settings)
    if results.has_predictions():
        report_observed(settings, results, console)
    results.failures.check()


def _alone(work: Callable[[Settings, Console], None]) -> Callable[[Settings, Console], None]:
    """Let work be the only writer of its folder; where the plan is asked for, print that instead."""

    def guarded(settings: Settings, console: Console) -> None:
        if settings.dry_run:
            print_plan(settings, console)
            return
        # points of a sweep may run at once and share a folder
        with only_writer(settings.results_dir, wait=current_points() is not None):
            remove_leftovers(settings.results_dir)
            work(settings, console)

    return guarded


_KINDS: dict[str, Callable[[Settings, Console], None]] = {
    "comparison": _alone(compare),
    "selfcheck": selfcheck,
    "observations": _alone(observe),
    "noise": noise,
}
"""What is done with the settings, by `kind`."""


def report(settings: Settings, results: Results, console: Console) -> None:
    """Write summary, tables and plots of a finished run, show the table and name the files."""
    if _left_to_shards(settings, console):
        return
    from harness.report.joined import on_common_samples
    from harness.report.page import write_report  # matplotlib and scipy are slow to import
    from harness.report.terminal import print_comparison

    changed = tuple(
        f"{cell} is another by now than the one that was answered: {why}. Run it with stale=rerun to "
        "answer it anew."
        for cell, why in changed_beside(settings, results).items()
    )
    loaded = replace(load_run(settings.output_dir, results), remarks=changed)
    loaded = on_common_samples(loaded, [cell.name for cell in settings.cells])
    page = write_report([loaded], judgements=[settings.judgement])
    print_comparison(loaded, console, settings.judgement)
    for path in ("summary.csv", "run.json", "predictions/", "tables/", "plots/"):
        console.print(f"  {settings.output_dir / path}", soft_wrap=True, highlight=False)
    console.print(f"  {page}", soft_wrap=True, highlight=False)


def report_observed(settings: Settings, results: Observed, console: Console) -> None:
    """Write tables and plots of a finished run that observes, show its claims and name the files."""
    if _left_to_shards(settings, console):
        return
    from harness.report.observed.page import print_claims, write_observed  # as above
    from harness.report.observed.run import load_observed

    loaded = load_observed(settings.output_dir, results)
    print_claims(loaded, write_observed(loaded), console)
    for path in ("run.json", "observations/", "tables/", "plots/"):
        console.print(f"  {settings.output_dir / path}", soft_wrap=True, highlight=False)


def _left_to_shards(settings: Settings, console: Console) -> bool:
    """Say how to join a run's shards, and return whether it has any."""
    if settings.num_shards > 1:
        console.print(
            f"shard {settings.shard} of {settings.num_shards} is done: {settings.results_dir}\n"
            f"When all are: make report DIRS={settings.output_dir}",
            soft_wrap=True,
        )
    return settings.num_shards > 1


def _show_log() -> None:
    """Show what the project itself reports (downloads, repairs), and warnings of the libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("benchmarks", "harness", "kvmerge"):
        logging.getLogger(package).setLevel(logging.INFO)


def _guarded(action: Callable[[], object]) -> None:
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except SamplesFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(SAMPLES_FAILED)
    except OSError as error:
        if not is_of_storage(error):
            raise
        where = f": {error.filename}" if error.filename else ""
        print(
            f"error: {error.strerror}{where}. What is finished is kept; the same command resumes.",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as stop:
        print("\nstopped; what is finished is kept, the same command resumes.", file=sys.stderr)
        sys.exit(128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT))
