"""`executor=ray`, as far as it goes without Ray: what workers are given, and what is refused."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

from harness.executors.on_ray import Ray, Share
from harness.runner import run
from harness.settings import Settings
from kvmerge.errors import UserError
from tests.tiny_run import compose

Tiny = Callable[..., Settings]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (make cluster)"
)
HEAD = {"CPU": 4.0}
CARDS = {"CPU": 32.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("given", "nodes", "wanted"),
    [
        ({}, [HEAD], Share(1, 4, 0)),
        ({}, [HEAD, HEAD], Share(2, 4, 0)),
        ({"cpus_per_worker": 1}, [HEAD], Share(4, 1, 0)),
        ({"cpus_per_worker": 0.5}, [HEAD], Share(8, 0.5, 0)),
        ({"workers": 3}, [HEAD], Share(3, 1, 0)),
        ({"workers": 8}, [HEAD], Share(8, 0.5, 0)),
        ({"workers": 3}, [HEAD, HEAD], Share(3, 2, 0)),
        ({}, [CARDS], Share(4, 8, 1)),
        ({}, [HEAD, CARDS, CARDS], Share(8, 8, 1)),
        ({"gpus_per_worker": 0.1}, [CARDS], Share(40, 0.8, 0.1)),
        ({"gpus_per_worker": 2}, [HEAD, CARDS], Share(2, 16, 2)),
        ({"gpus_per_worker": 0}, [CARDS], Share(1, 32, 0)),
        ({"workers": 1}, [{}, CARDS], Share(1, 32, 1)),
    ],
)
def test_workers_are_as_many_as_there_is_room_for_and_share_the_cores(
    given: dict[str, Any], nodes: list[dict[str, float]], wanted: Share
) -> None:
    assert Ray(**given).share(nodes) == wanted


@pytest.mark.parametrize(
    ("given", "nodes", "room"),
    [
        ({"workers": 5}, [CARDS], "room for 4 of 5 workers with 6 cores and 1 GPUs each"),
        ({"gpus_per_worker": 1}, [HEAD], "room for 0 of 1 workers with 1 cores and 1 GPUs each"),
        ({"gpus_per_worker": 8}, [CARDS, CARDS], "32 cores and 4 GPUs, 32 cores and 4 GPUs"),
        ({"workers": 3, "cpus_per_worker": 3}, [HEAD, HEAD], "room for 2 of 3 workers"),
        ({}, [], "room for 0 of 1 workers"),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused(
    given: dict[str, Any], nodes: list[dict[str, float]], room: str
) -> None:
    with pytest.raises(UserError, match=room):
        Ray(**given).share(nodes)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("executor.gpus_per_worker=1.5", "a fraction of one GPU, or a whole number"),
        ("executor.gpus_per_worker=-1", "a fraction of one GPU, or a whole number"),
        ("executor.cpus_per_worker=0", r"executor\.cpus_per_worker=0 must be above 0"),
        ("executor.timeout=0", r"executor\.timeout=0 must be above 0"),
        ("executor.timeout=nan", r"executor\.timeout=nan must be a number, auto or null"),
        ("executor.retries=-1", r"executor\.retries=-1 must be a whole number of 0 or more"),
        ("executor.workers=0", r"executor\.workers=0 must be a whole number of 1 or more"),
        ("executor.worker=2", r"unknown setting of executor 'worker'.*workers"),
    ],
)
def test_what_no_worker_can_be_given_is_refused(word: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        compose("executor=ray", word)


def test_several_gpus_for_a_model_that_uses_one_are_refused(tiny: Tiny) -> None:
    with pytest.raises(
        UserError, match=r"gpus_per_worker=2 .* would use one\. Add model\.device_map=auto"
    ):
        run(tiny("executor=ray", "executor.gpus_per_worker=2"))


def test_without_ray_the_extra_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"executor=ray needs Ray: pip install 'kvmerge\[cluster\]'"):
        run(tiny("executor=ray"))


@needs_ray
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_told_at_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"executor\.address={address}: no Ray answers there"):
            run(tiny("executor=ray", f"executor.address={address}"))


@needs_ray
def test_an_address_that_is_none_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"executor\.address='there' is no address of Ray"):
        run(tiny("executor=ray", "executor.address=there"))
