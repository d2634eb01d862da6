"""The executor of many processes: workers of Ray, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from harness.executors.actor import Actor
from harness.executors.executor import Loaded
from harness.executors.time_limit import TimeLimit, Timeout
from harness.settings import Settings
from harness.start import usable_processors
from kvmerge.errors import UserError, first_line, summary
from kvmerge.models import Outline
from kvmerge.schema import Within

if TYPE_CHECKING:
    from harness.executors.pool import Pool

_STORE = 128 * 2**20
"""Bytes of shared memory of a Ray that is started here: what passes through it is text."""
_REACH = 10.0
"""Seconds in which a machine must answer; Ray itself would ask for minutes."""


@dataclass(frozen=True)
class Share:
    """What each worker is given, of how many."""

    workers: int
    cpus: float
    gpus: float

    @property
    def cores(self) -> int:
        """Threads of a worker."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Ray:
    """Answers units by workers of Ray (docs/cluster.md)."""

    address: str | None = None
    workers: Annotated[int, Within(1)] | None = None
    gpus_per_worker: float | None = None
    cpus_per_worker: float | None = None
    retries: Annotated[int, Within(0)] = 2
    timeout: Timeout = "auto"

    def __post_init__(self) -> None:
        """Raise `UserError` for shares that Ray cannot give, and for no time at all."""
        gpus = self.gpus_per_worker or 0
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise UserError(
                f"executor.gpus_per_worker={gpus:g} must be a fraction of one GPU, or a whole number."
            )
        if self.cpus_per_worker is not None and self.cpus_per_worker <= 0:
            raise UserError(
                f"executor.cpus_per_worker={self.cpus_per_worker:g} must be above 0, or null."
            )
        if isinstance(self.timeout, float | int) and self.timeout <= 0:
            raise UserError(f"executor.timeout={self.timeout:g} must be above 0, auto or null.")

    @contextlib.contextmanager
    def start(self, settings: Settings, known: Outline | None, loaded: Loaded | None) -> Iterator[Pool]:
        """Start or join Ray, and hire workers (see `harness.executors.executor.Executor`).

        Each looks at the model and loads it for itself: what this process holds stays in it.
        """
        self._check_use(settings)
        ray = import_ray()
        with self._joined(ray):
            share = self.share(_resources(ray))
            from harness.executors.pool import Pool  # imports Ray

            hired = ray.remote(Actor).options(
                num_cpus=share.cpus,
                num_gpus=share.gpus,
                max_restarts=0,  # it would come back without its model
                scheduling_strategy="SPREAD",
            )
            with contextlib.closing(
                Pool(
                    settings,
                    share.workers,
                    self.retries,
                    TimeLimit(self.timeout),
                    hire=lambda: hired.remote(share.cores),
                    has_room=lambda: _room(_resources(ray), share) > 0,
                )
            ) as pool:
                pool.wait()
                yield pool

    def share(self, nodes: Sequence[Mapping[str, float]]) -> Share:
        """Return how many workers there are to be, and what each gets.

        Args:
            nodes: resources of each machine, by Ray's names.

        Raises:
            UserError: if there is no room for as many.
        """
        has_gpus = any(node.get("GPU") for node in nodes)
        gpus = self.gpus_per_worker if self.gpus_per_worker is not None else float(has_gpus)
        hosts = [node for node in nodes if node.get("CPU") and node.get("GPU", 0) >= gpus]
        workers, cpus = self.workers, self.cpus_per_worker
        if workers is None:
            alone = not gpus and cpus is None
            workers = len(hosts) if alone else sum(_fitting(node, cpus or 0, gpus) for node in hosts)
        if cpus is None and hosts:
            cpus = min(node["CPU"] for node in hosts) / math.ceil(workers / len(hosts))
            cpus = math.floor(cpus) if cpus > 1 else cpus
        share = Share(workers, cpus or 1, gpus)
        room = _room(nodes, share)
        if not 0 < workers <= room:
            raise UserError(
                f"Ray has room for {room} of {max(workers, 1)} workers with {share.cpus:g} cores and "
                f"{gpus:g} GPUs each; its machines have {_told(nodes)}. Lower executor.workers, "
                "executor.gpus_per_worker or executor.cpus_per_worker."
            )
        return share

    def _check_use(self, settings: Settings) -> None:
        gpus = self.gpus_per_worker or 0
        if gpus > 1 and settings.model.device_map is None:
            raise UserError(
                f"executor.gpus_per_worker={gpus:g} gives each worker GPUs of which it would use one. "
                "Add model.device_map=auto, which divides the model among them, or leave it at 1."
            )

    @contextlib.contextmanager
    def _joined(self, ray: Any) -> Iterator[None]:
        """Be part of Ray inside the block: of that of this process, where it has one already."""
        if ray.is_initialized():
            if self.address is not None:
                raise UserError(
                    f"executor.address={self.address}: this process has joined Ray already. Leave the "
                    "address out to stay there, or call ray.shutdown() first."
                )
            yield
            return
        with _own_signals():
            self._connect(ray)
        try:
            yield
        finally:
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        """Start Ray here, or join that of the address. Raises `UserError` where that cannot be."""
        where: dict[str, Any] = {"address": self.address}
        if self.address is None:
            here = {"num_cpus": usable_processors(), "object_store_memory": _STORE}
            where = {"address": "local", "include_dashboard": False, **here}
        else:
            _check_answers(self.address)
        try:
            ray.init(**where, log_to_driver=False, logging_level="ERROR")
        except (
            Exception,
            SystemExit,
        ) as error:  # Ray raises all of it, and leaves where it waited long
            if self.address is not None:
                raise _unreachable(self.address, error) from error
            raise UserError(
                f"Ray does not start on this machine: {first_line(error)} On a busy one it may the "
                "next time; executor=local does without."
            ) from error


def import_ray() -> Any:
    """Return the package. Raises `UserError` saying how it is installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "executor=ray needs Ray: pip install 'kvmerge[cluster]', or `make cluster` in a clone. "
            "Without it, executor=local answers in this process, or shards split a run."
        ) from error
    return ray


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of signals that Ray sets its own for when it starts."""
    if threading.current_thread() is not threading.main_thread():  # where alone it sets any
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_answers(address: str) -> None:
    """Ask the machine of an address whether it listens there. Raises `UserError`."""
    if address == "auto":
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise UserError(
            f"executor.address={address!r} is no address of Ray. Give auto, HOST:6379 or ray://HOST:10001."
        )
    try:
        socket.create_connection((host, port), _REACH).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: BaseException) -> UserError:
    return UserError(
        f"executor.address={address}: no Ray answers there ({summary(error)}). `ray start --head` "
        "starts one, and `ray status` beside it shows it; without an address Ray is started here."
    )


def _resources(ray: Any) -> list[Mapping[str, float]]:
    """Return what each machine has for workers, whether or not it is in use."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(nodes: Sequence[Mapping[str, float]], share: Share) -> int:
    """Return for how many workers there is room."""
    return sum(_fitting(node, share.cpus, share.gpus) for node in nodes)


def _fitting(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers fit on a machine by what each asks for, something at least."""
    asked = {"CPU": cpus, "GPU": gpus}
    return min(int(node.get(name, 0) / each + 1e-6) for name, each in asked.items() if each)


def _told(nodes: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs" for node in nodes)
