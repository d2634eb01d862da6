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
    margin: float
    output_dir: str | None
    dry_run: bool
