"""Points of a sweep as jobs: what is submitted, and what becomes of those that are stopped or lost."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from harness import launchers as module
from harness.launchers import SWEEPS, check_launcher, launcher_of, submits_jobs
from kvmerge.errors import UserError
from kvmerge.places import config_dir
from tests import slurm
from tests.conftest import Output
from tests.tiny_run import read_lines

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
STOPPED = """
import os
import signal
from baselines.h2o import H2O

class Preempted(H2O):
    calls = 0

    def compress(self, layer, allowance):
        Preempted.calls += 1
        is_first = not os.path.exists("was_preempted")
        # in the second sample of two layers
        if is_first and Preempted.calls == 3 and os.environ.get("SLURM_ARRAY_TASK_ID") == "0":
            open("was_preempted", "w").close()
            for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGUSR2):
                os.kill(os.getpid(), number)
        return super().compress(layer, allowance)

class Killed(H2O):
    def compress(self, layer, allowance):
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""Methods that are stopped from outside, as far as they can tell."""

Command = Callable[..., Output]
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed (make cluster)"
)


@pytest.fixture
def jobs(
    command: Command, undrawn: None, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, data: Path
) -> Callable[..., Output]:
    """A sweep whose points may be jobs, over two samples of one task and one."""
    Path("stopped.py").write_text(STOPPED)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = [f"model.path={checkpoint}", "benchmark=longbench", f"benchmark.data_dir={data}"]
    return lambda *words: command("-m", *run, "benchmark.tasks=[trec]", "batch_size=1", *words)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the batch script lies that was submitted last to a Slurm of four small programs."""
    monkeypatch.setenv("SLURM_STUB", str(tmp_path / "slurm"))
    monkeypatch.setenv("PATH", str(tmp_path / "slurm"), prepend=os.pathsep)
    return slurm.install(tmp_path / "slurm")


@needs_submitit
def test_a_preempted_shard_is_queued_again_and_goes_on_where_it_was(
    jobs: Callable[..., Output], script: Path
) -> None:
    cells = "cells=[full@1,stopped.Preempted@0.5]"
    shards = ("num_shards=2", "shard=range(2)", cells)
    output = jobs("hydra/launcher=slurm", "hydra.launcher.partition=long", *shards, "output_dir=jobs")
    assert output.status == 0, output
    assert Path("was_preempted").exists()
    assert output.out.splitlines()[-1] == "all points together: jobs/report.html"
    log = (SWEEPS / ".submitit" / "7_0" / "7_0_0_log.err").read_text()
    assert "Bypassing signal SIGTERM" in log, "of preemption, which is no request to end by itself"
    assert "1 of 2 samples are done already; 1 are left" in log

    assert jobs(*shards, "output_dir=here").status == 0
    for shard in ("shards/0-of-2", "shards/1-of-2"):
        assert read_lines(Path("jobs", shard)) == read_lines(Path("here", shard))
    assert not list(SWEEPS.glob("kvmerge-sweep-*"))

    asked = script.read_text().splitlines()
    for line in ("requeue", "gpus-per-node=1", "cpus-per-task=8", "time=240", "partition=long"):
        assert f"#SBATCH --{line}" in asked
    assert "#SBATCH --array=0-1%2" in asked
    assert "#SBATCH --signal=USR2@120" in asked
    for name in ("SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        assert f"export {name}=$SLURM_CPUS_ON_NODE" in asked


@needs_submitit
def test_a_job_may_have_a_node_and_a_refused_one_is_told(
    jobs: Callable[..., Output], script: Path
) -> None:
    sbatch = script.with_name("sbatch")
    sbatch.write_text(f'#!/bin/sh\ncp "$1" {script}; echo "invalid account" >&2; exit 1\n')
    node = ("hydra/launcher=slurm_node", "hydra.launcher.gpus_per_node=4")
    output = jobs(*node, "num_shards=2", "shard=0,1")
    assert output.status == 2
    assert output.err.endswith("error: no job was submitted: invalid account\n")
    asked = script.read_text().splitlines()
    for line in ("requeue", "exclusive", "mem=0", "gpus-per-node=4", "ntasks-per-node=1"):
        assert f"#SBATCH --{line}" in asked
    assert not [line for line in asked if "cpus-per-task" in line]


@needs_submitit
def test_a_job_that_was_killed_is_named_and_the_others_are_reported(
    jobs: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    from submitit.core.core import Job

    monkeypatch.setattr(Job, "_results_timeout_s", 0)  # of a file system that is slow
    output = jobs("hydra/launcher=submitit_local", "limit=1", "method=h2o,stopped.Killed")
    assert output.status == 2
    assert "Traceback" not in output.err
    (page,) = Path("results/runs/cells/longbench").glob("*/report.html")
    assert output.out.splitlines()[-1] == f"all points together: {page}"
    *_, summary, lost = output.err.splitlines()
    assert summary.startswith("error: 1 of the points failed; jobs that still run go on")
    assert re.search(r"Job \d+ .*/.submitit/.* has not produced any output", lost)


@pytest.mark.parametrize("name", ["slurm", "slurm_node"])
def test_our_launchers_say_what_they_are(name: str) -> None:
    path = config_dir() / "hydra" / "launcher" / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    assert submits_jobs(name)


def test_sweeps_lie_where_hydra_puts_them() -> None:
    config = yaml.safe_load((config_dir() / "config.yaml").read_text())
    assert config["hydra"]["sweep"]["dir"] == str(SWEEPS)


def test_only_launchers_of_this_machine_are_known_to_submit_no_jobs() -> None:
    assert launcher_of(["-m", "limit=1"]) == "basic"
    assert launcher_of(["-m", "hydra/launcher=slurm"]) == "slurm"
    assert [submits_jobs(name) for name in ("basic", "joblib", "slurm", "mine")] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("launcher", "extra"), [("joblib", "sweep"), ("slurm", "cluster"), ("submitit_local", "cluster")]
)
def test_a_launcher_that_is_not_installed_is_refused_with_what_brings_it(
    launcher: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_is_installed", lambda package: False)
    check_launcher("basic", is_sweep=True)
    with pytest.raises(UserError, match=re.escape(f"pip install 'kvmerge[{extra}]'")) as refused:
        check_launcher(launcher, is_sweep=True)
    brought = [re.split("[<>=]", requirement)[0] for requirement in EXTRAS[extra]]
    assert any(f", or {name}." in str(refused.value) for name in brought)


@needs_submitit
def test_slurm_is_refused_where_there_is_none_also_by_a_launcher_of_ones_own(
    jobs: Callable[..., Output],
) -> None:
    Path("mine/hydra/launcher").mkdir(parents=True)
    Path("mine/hydra/launcher/ours.yaml").write_text("defaults: [slurm]\npartition: gpu\n")
    output = jobs("--config-dir=mine", "hydra/launcher=ours", "limit=1,2")
    assert output.status == 2
    (message,) = output.err.splitlines()
    assert message.startswith("error: hydra/launcher=ours submits with Slurm, which this machine lacks")


def test_a_launcher_without_a_sweep_is_refused() -> None:
    check_launcher("basic", is_sweep=False)
    with pytest.raises(UserError, match=r"hydra/launcher=joblib .* add -m, or leave it out"):
        check_launcher("joblib", is_sweep=False)
