"""Where a run writes unless it is told: a folder that people can read, which cells share.

Runs of `method=` and of `cells=` add their cells to one folder of a model and benchmark, so that they
end up in one table. What no two cells of a table may differ in is part of the folder's name where it is
not as the choices have it: `cells-seed=1/longbench-profile=kcf/smollm2-135m-dtype=bfloat16`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import OmegaConf

from harness.results import changed_settings

RUNS = Path("results") / "runs"
CELLS = "cells"
"""Folder of the runs that say themselves which cells they answer."""
_OF_RUN = (
    *("seed", "decode_policy", "pos", "question"),
    *("layers_skip", "skip_budget", "num_shards"),
)
"""Settings of a whole run that its folder cannot hold two of."""
_ELSEWHERE = {"model": ("name", "path", "shape"), "benchmark": ("name", "tasks", "data_dir")}
"""Settings that the name of the model or benchmark says, that cells may differ in, or whose contents
are compared instead."""
_LONGEST_VALUE = 40
_LONGEST = 200


def named_folder(run: str, benchmark: str, model: str) -> Path:
    """Return where a run of a name writes."""
    return RUNS / run / benchmark / model


def cells_folder(
    config: Mapping[str, Any], chosen: Mapping[str, str], names: Mapping[str, str]
) -> Path:
    """Return the folder that cells of a model and benchmark share. Hydra must be initialized.

    Args:
        config: the composed configuration as plain data.
        chosen: choice of each configuration group that it was composed with.
        names: what `model` and `benchmark` are called.
    """
    plain = _plain([f"{group}={chosen[group]}" for group in _ELSEWHERE])
    of_run = _changed(plain, config, _OF_RUN)
    parts = {
        group: _changed(plain[group], config[group], {*config[group]} - {*elsewhere})
        for group, elsewhere in _ELSEWHERE.items()
    }
    return named_folder(
        _named(CELLS, of_run),
        _named(names["benchmark"], parts["benchmark"]),
        _named(names["model"], parts["model"]),
    )


def _plain(choices: Iterable[str]) -> dict[str, Any]:
    """Return the configuration of some choices with nothing else given."""
    config: Any = OmegaConf.to_container(compose("config", list(choices)), resolve=True)
    return dict(config)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return which of some settings are others than they were, as `name=value`."""
    was, is_now = ({key: side.get(key) for key in keys} for side in (before, now))
    return [f"{name}={_text(value)}" for name, _, value in changed_settings(was, is_now)]


def _text(value: object) -> str:
    """Return a value as a name may hold it; a long one ends in its digest."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    short = re.sub(r"[^\w.,+\[\]-]+", "-", text).strip("-")
    return short if len(short) <= _LONGEST_VALUE else f"{short[: _LONGEST_VALUE - 9]}-{_digest(text)}"


def _named(name: str, changed: Iterable[str]) -> str:
    full = "-".join(filter(None, (name, ",".join(changed))))
    return full if full == name or len(full.encode()) <= _LONGEST else f"{name}-{_digest(full)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
