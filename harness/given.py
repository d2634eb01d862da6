"""The settings of `configs/config.yaml`, with what each may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from kvmerge.schema import Within

Count = Annotated[int, Within(1)]
Index = Annotated[int, Within(0)]


@dataclass(frozen=True)
class Given:
    """A composed configuration as plain data. What a text may say is checked where it is used."""

    kind: Literal["comparison", "selfcheck"]
    """What is done with the settings (`harness.cli`)."""
    model: Mapping[str, Any]
    benchmark: Mapping[str, Any]
    method: Mapping[str, Any]
    budget: Any
    """What `Budget.parse` takes."""
    cells: Sequence[Any] | None
    limit: Count | None
    seed: Index
    num_seeds: Annotated[int, Within(1, 10_000)]
    decode_policy: str
    pos: str
    layers_skip: Sequence[int]
    skip_budget: str
    fidelity: bool | None
    batch_size: Literal["auto"] | Count
    shard: Index
    num_shards: Count
    output_dir: str | None
    dry_run: bool
    selfcheck: Mapping[str, Any] | None
    """Of `SelfcheckOptions`, for `kind=selfcheck`."""


@dataclass(frozen=True)
class SelfcheckOptions:
    """What `kind=selfcheck` has of its own."""

    tasks: Mapping[str, Any]
    """Tasks to take by benchmark, where `benchmark.tasks` names none."""
    tokens: Annotated[int, Within(2)]
    """Tokens of each answer that are compared with plain transformers'."""
