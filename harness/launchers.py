"""How the points of a sweep are run: Hydra's launchers, what they need, and how their jobs end.

A launcher that submits jobs hands each point to a process of its own, which may be on another machine,
be started again there, and outlive the command that submitted it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from subprocess import CalledProcessError

from harness.folders import RUNS
from kvmerge.errors import UserError

logger = logging.getLogger(__name__)

SWEEPS = RUNS / ".sweep"
"""Where Hydra keeps what belongs to sweeps (`hydra.sweep.dir`): jobs on other machines see it too."""
_CHOICE = "hydra/launcher="
_INLINE = ("basic", "joblib")
"""Launchers whose points run on this machine, and end with the command."""
_PACKAGES = {
    "joblib": ("hydra-joblib-launcher", "sweep"),
    **dict.fromkeys(
        ("slurm", "slurm_node", "submitit_slurm", "submitit_local"),
        ("hydra-submitit-launcher", "cluster"),
    ),
}
"""By launcher: the plugin of Hydra that brings it, and the extra that brings this."""


def launcher_of(words: Sequence[str]) -> str:
    """Return the name of the launcher that a command line chooses."""
    chosen = [word.removeprefix(_CHOICE) for word in words if word.startswith(_CHOICE)]
    return chosen[-1] if chosen else "basic"


def submits_jobs(launcher: str) -> bool:
    """Return whether a launcher submits jobs; one of the user's own is taken to."""
    return launcher not in _INLINE


def check_launcher(launcher: str, is_sweep: bool) -> None:
    """Refuse a launcher that cannot work here, or has nothing to do. Raises `UserError`."""
    given = f"{_CHOICE}{launcher}"
    if launcher != "basic" and not is_sweep:
        raise UserError(f"{given} says how the points of a sweep are run: add -m, or leave it out.")
    package, extra = _PACKAGES.get(launcher, ("", ""))
    if package and not _is_installed(package):
        raise UserError(
            f"{given} needs a plugin of Hydra: pip install 'kvmerge[{extra}]', or {package}. "
            "Without it the points run one after the other."
        )


def run_points(task: Callable[[], None], launcher: str) -> list[str]:
    """Run a sweep, and return a line for each job that ended without a word, as when it was killed.

    Raises:
        UserError: if no job can be submitted.
    """
    if submits_jobs(launcher):
        logger.info(
            "each point is a job, with a log below %s; on a cluster jobs go on if this command stops",
            SWEEPS / ".submitit",
        )
    try:
        task()
    except RuntimeError as error:
        if not submits_jobs(launcher) or not _is_installed("submitit"):
            raise
        if "srun" in str(error) and shutil.which("srun") is None:
            raise UserError(
                f"{_CHOICE}{launcher} submits with Slurm, which this machine lacks: start the command "
                f"where jobs are submitted. {_CHOICE}submitit_local runs the jobs here."
            ) from error
        return [_last_of_job(error)]
    return []


def _last_of_job(error: RuntimeError) -> str:
    """Return what submitit says of a job that left no result; other errors are raised again."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    if not isinstance(error, UncompletedJobError):
        raise error
    if isinstance(error.__cause__, CalledProcessError):
        raise UserError(f"no job was submitted: {error}") from error
    if isinstance(error, FailedJobError):
        return str(error)  # the traceback of what it raised
    return " ".join(str(error).splitlines()[:2])  # its log follows, which may be long


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
