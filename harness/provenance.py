"""run.json: what produced the predictions beside it, and whether a later run may add to them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.metrics import metric_module
from harness import code
from harness.results import Results, changed_settings
from harness.settings import Settings
from kvmerge.cells import Cell, parse_cell
from kvmerge.errors import UserError, first_line
from kvmerge.kernels.choice import chosen, processor
from kvmerge.models.contents import digests

_ROOT = Path(__file__).resolve().parent.parent
_PASSED = ("kvmerge.engine", "kvmerge.models", "harness.answering")
"""Modules that every answer passes through."""
_OF_CELLS = ("cells", "methods")
"""Parts of a fingerprint that each cell has for itself."""
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "bitsandbytes",
    "numpy",
    "rouge",
    "rouge-score",
    "jieba",
    "hydra-core",
    "pandas",
    "scipy",
    "statsmodels",
)


def package_versions() -> dict[str, str | None]:
    """Return the installed versions of what the results depend on; None where absent."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def fingerprint(settings: Settings, data: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that can change a prediction, but not which samples, tasks and cells are run.

    Args:
        data: SHA-256 of each task's file.
    """
    versions = package_versions()
    roots = {*_PASSED, *code.homes(settings.model), *code.homes(settings.benchmark)}
    roots |= {
        module for task in settings.benchmark.tasks if (module := metric_module(task.metric.name))
    }
    if settings.observe is not None:
        roots.add("kvmerge.observations")
    shared = code.digests(roots)
    model = dict(settings.resolved["model"])
    model.pop("shape", None)
    folder = settings.model.folder()
    if folder is not None:
        model.pop("path")  # what it holds is compared by its digests
    benchmark = {
        key: value
        for key, value in settings.resolved["benchmark"].items()
        if key not in ("tasks", "data_dir")  # the data itself is compared by its digest
    }
    prints = {
        "model": model,
        "weights": settings.model.source() if folder is None else "a local checkpoint",
        "contents": {} if folder is None else digests(folder),
        "device": settings.model.torch_device().type,
        "benchmark": benchmark,
        "seed": settings.seed,
        "policy": asdict(settings.policy),
        "question": settings.question,
        "code": shared,
        "torch": (versions["torch"] or "").split("+")[0],
        "transformers": versions["transformers"],
        "tokenizers": versions["tokenizers"],
        "data": dict(data),
        **_of_cells(settings.cells, shared),
    }
    if settings.observe is not None:
        prints["observe"] = settings.observe.measured()
    return dict(json.loads(json.dumps(prints)))  # as it is read back


def check_resumable(results: Results, current: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the fingerprint of an earlier run in the same folder into this one's.

    Raises `UserError` naming the first setting that differs, or the cells whose method does, or saying
    that nothing tells what the folder's predictions were made with. Tasks and cells that one of the
    two runs lacks are no difference, and a run that failed before its first prediction binds nobody.
    What an earlier version did not record is refused, unless this run has nothing there.
    """
    merged = dict(current)
    earlier = results.info.get("fingerprint")
    if not results.has_predictions():
        return merged
    if not earlier:
        raise UserError(
            f"{results.folder} holds predictions but no run.json that says what made them. "
            "Choose another output_dir, or delete that folder to start over."
        )
    lacking = [key for key, value in current.items() if value and not _comparable(earlier, key, value)]
    if lacking:
        raise UserError(
            f"{results.folder} was begun by a version that did not record {', '.join(lacking)} as this "
            "one does, so nothing tells whether they are the same now. Choose another output_dir, or "
            "delete that folder to start over."
        )
    for key, value in current.items():
        before = earlier.get(key, {})
        if key in _OF_CELLS:
            merged[key] = {**(before or {}), **value}
        elif key == "data":
            for name in sorted(set(value) & set(before or {})):
                _refuse_change(results, f"{key}.{name}", before[name], value[name])
            merged[key] = {**(before or {}), **value}
        else:
            _refuse_change(results, key, before, value)
    stale = stale_cells(results, current)
    if stale:
        listed = "\n".join(f"  {cell}: {why}" for cell, why in stale.items())
        raise UserError(
            f"{results.folder} holds results that these cells would not give any more:\n{listed}\n"
            "The other cells are as they were. Give stale=rerun to answer these anew, and keep their "
            "old lines under another name; or leave them out, or choose another output_dir."
        )
    return merged


def _comparable(earlier: Mapping[str, Any], key: str, value: object) -> bool:
    """Return whether an earlier run recorded a part of the fingerprint in the form that it has now."""
    return key in earlier and isinstance(earlier[key], dict) == isinstance(value, dict)


def stale_cells(results: Results, current: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of this run whose lines were made by another method, and what of it differs.

    A method is its settings, its own modules and the files that it reads, without what all cells pass
    through.
    """
    earlier = results.info.get("fingerprint") or {}
    stale = {}
    for cell in current["cells"]:
        settings, modules = (_changes(earlier, current, part, cell) for part in _OF_CELLS)
        differing = [f"{name} was {then!r} and is {now!r}" for name, then, now in settings]
        differing += [f"{name} has changed" for name, *_ in modules]
        if differing and results.has_cell(cell):
            stale[cell] = ", ".join(differing)
    return stale


def changed_beside(settings: Settings, results: Results) -> dict[str, str]:
    """Return the cells of a finished run's folder that it did not run, and that are others by now.

    What of each differs is said, as by `stale_cells`.
    """
    prints = results.info.get("fingerprint") or {}
    names = set(results.info.get("cells", ())) - {cell.name for cell in settings.cells}
    found = {}
    beside: list[Cell] = []
    for name in sorted(names & set(prints.get("methods", {}))):
        try:
            beside.append(parse_cell(name))
        except UserError as error:
            found[name] = first_line(error).rstrip(".")
    return found | stale_cells(results, _of_cells(beside, prints["code"]))


def _changes(
    earlier: Mapping[str, Any], current: Mapping[str, Any], part: str, cell: str
) -> list[tuple[str, object, object]]:
    """Return what differs in a part of a cell; nothing where the cell is new."""
    before = earlier.get(part, {})
    return list(changed_settings(before[cell], current[part][cell])) if cell in before else []


def _refuse_change(results: Results, place: str, before: object, now: object) -> None:
    for setting, then, is_now in changed_settings(before, now, place):
        raise UserError(
            f"{results.folder} holds results made with another {setting}: {then!r} then, "
            f"{is_now!r} now. Choose another output_dir, or delete that folder to start over."
        )


def run_info(
    settings: Settings,
    results: Results,
    prints: Mapping[str, Any],
    counts: Mapping[str, int],
    notes: Iterable[str],
    seconds: float | None = None,
) -> dict[str, Any]:
    """Describe the run under way, keeping what earlier runs in the folder did: the content of run.json.

    Args:
        results: the folder that the run writes into.
        prints: the merged fingerprint.
        counts: samples that each task has in all.
        notes: what a reader of the results must know.
        seconds: wall time of the finished run; None while it is under way.
    """
    earlier = results.info if results.has_predictions() else {}
    cells = list(dict.fromkeys([*earlier.get("cells", []), *(c.name for c in settings.cells)]))
    tasks = dict(earlier.get("tasks", {}))
    for task in settings.benchmark.tasks:
        tasks[task.name] = {
            "metric": task.metric.name,
            "max_new_tokens": task.max_new_tokens,
            "samples": counts[task.name],
        }
    runs = [run for run in earlier.get("runs", []) if run.get("seconds") is not None]
    runs.append({"ended": _now() if seconds is not None else None, "seconds": seconds})
    return {
        "model": settings.model.name,
        "benchmark": settings.benchmark.name,
        "cells": cells,
        "tasks": tasks,
        "dtype": settings.model.dtype,
        "device": str(settings.model.torch_device()),
        "seed": settings.seed,
        "num_seeds": settings.num_seeds,
        "policy": asdict(settings.policy),
        "question": settings.question,
        "shard": settings.shard,
        "num_shards": settings.num_shards,
        "notes": list(notes),
        "git": git_state(),
        "packages": package_versions(),
        "hardware": hardware(),
        "runs": runs,
        "fingerprint": dict(prints),
        "config": settings.resolved,
    }


def hardware() -> dict[str, Any]:
    """Describe the machine in words."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": processor(),
        "cpu_products": chosen(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def git_state() -> dict[str, Any]:
    """Return the commit of the checkout and whether it has changes; None where this is no checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if not (_ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _of_cells(cells: Iterable[Cell], shared: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what each cell has for itself: its settings, and digests of what its method is made of.

    Args:
        cells: the cells.
        shared: modules that all cells pass through.
    """
    parts = {
        "cells": {cell.name: cell.settings() for cell in cells},
        "methods": {cell.name: _made_of(cell, shared) for cell in cells},
    }
    return dict(json.loads(json.dumps(parts)))  # as it is read back


def _made_of(cell: Cell, shared: Iterable[str]) -> dict[str, str]:
    """Return the digests of a method's own modules, and of the files that its settings name."""
    files = {path.name: code.digest(path) for path in cell.method.files()}
    return code.digests(code.homes(cell.method), without=shared) | files


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
