"""The settings of `configs/config.yaml`, with what each may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from harness.plan.cards import CARDS
from harness.variants import UNPACKED
from kvmerge.errors import UserError, unknown
from kvmerge.kernels.forced import KERNELS
from kvmerge.models.spec import DTYPES
from kvmerge.observations import Measures
from kvmerge.schema import Within

Count = Annotated[int, Within(1)]
Index = Annotated[int, Within(0)]


@dataclass(frozen=True)
class Given:
    """A composed configuration as plain data. What a text may say is checked where it is used."""

    kind: Literal["comparison", "selfcheck", "observations", "noise"]
    """What is done with the settings (`harness.cli`)."""
    model: Mapping[str, Any]
    benchmark: Mapping[str, Any]
    method: Mapping[str, Any]
    executor: Mapping[str, Any]
    """Where samples are answered (`harness.executors`)."""
    budget: Any
    """What `Budget.parse` takes."""
    baseline: Literal["full", "none"]
    """What a single cell is compared with."""
    cells: Sequence[Any] | None
    limit: Count | None
    seed: Index
    num_seeds: Annotated[int, Within(1, 10_000)]
    decode_policy: str
    pos: str
    question: Literal["inside", "after"]
    """`inside`: the whole prompt is compressed, its question too. `after`: only its context is, and the
    question is stored whole."""
    layers_skip: Sequence[int]
    skip_budget: str
    fidelity: bool | None
    batch_size: Literal["auto"] | Count
    shard: Index
    num_shards: Count
    margin: float
    flips: Mapping[str, Any]
    """Of `harness.judgement.FlipRule`."""
    noise: str | None
    """Folder of a run of `kind=noise`, for the report."""
    output_dir: str | None
    stale: Literal["refuse", "rerun"]
    dry_run: bool
    plan: Mapping[str, Any]
    """Of `PlanOptions`."""
    selfcheck: Mapping[str, Any] | None
    """Of `SelfcheckOptions`, for `kind=selfcheck`."""
    observe: Mapping[str, Any] | None
    """Of `Observe`, for `kind=observations`."""
    vary: Mapping[str, Any] | None
    """Of `Vary`, for `kind=noise`."""


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is made for.

    Raises `UserError` for a card whose figures are not known, and a price that is none.
    """

    device: str | None
    """Of `harness.plan.cards.CARDS`; None: this machine."""
    price: float | None
    """Of a worker's hour, in any currency; None: cost is not told."""

    def __post_init__(self) -> None:
        if self.device is not None and self.device not in CARDS:
            raise unknown("plan.device", self.device, CARDS)
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UserError(
                f"plan.price={self.price:g} must be a number of 0 or more: what a worker costs an hour."
            )


@dataclass(frozen=True)
class SelfcheckOptions:
    """What `kind=selfcheck` has of its own."""

    tasks: Mapping[str, Any]
    """Tasks to take by benchmark, where `benchmark.tasks` names none."""
    tokens: Annotated[int, Within(2)]
    """Tokens of each answer that are compared with plain transformers'."""


@dataclass(frozen=True)
class Observe(Measures):
    """What a run observes of each sample's prefill, where it answers nothing."""

    map_sample: str | None = None
    """Sample whose cosines are drawn as maps, `<task>/<id>`; None: the first that the run takes."""
    map_layers: Sequence[int] | None = None
    """Layers of the maps; negative ones count from the end. None: four from the first to the last."""
    map_heads: Sequence[Index] | None = None
    """KV heads of the maps. None: the first four, or as many as there are."""

    def measured(self) -> dict[str, Any]:
        """Return the settings that decide what a sample's record holds."""
        return {each.name: getattr(self, each.name) for each in fields(Measures)}


@dataclass(frozen=True)
class Vary:
    """What `kind=noise` changes, one at a time.

    Raises `UserError` for a dtype or kernel that does not exist.
    """

    batch_sizes: Sequence[Count]
    threads: Sequence[Count] | None
    """None: 1, 2, 4 and so on, up to the processors that the process may use."""
    kernels: Sequence[str]
    """Of `kvmerge.kernels.forced.KERNELS`, and `unpacked`."""
    dtypes: Sequence[str]

    def __post_init__(self) -> None:
        for name, given, known in (
            ("vary.kernels", self.kernels, (*KERNELS, UNPACKED)),
            ("vary.dtypes", self.dtypes, DTYPES),
        ):
            for each in given:
                if each not in known:
                    raise unknown(f"entry of {name}", each, known)


JUDGED = ("margin", "flips", "noise")
"""Settings of what the report judges by, which only a comparison has."""
OF_CELLS = (
    *("method", "budget", "baseline", "cells", "seed", "num_seeds", "decode_policy", "pos"),
    *("layers_skip", "skip_budget", "question", "fidelity", "batch_size", "stale", *JUDGED),
)
"""Settings of what is answered, which a run that observes has no use for."""
