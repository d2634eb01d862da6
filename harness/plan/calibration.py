"""A machine's speed with a model, measured once (`make calibrate-speed`) and kept for plans.

The file lies in the cache folder, an entry for each machine and model as a run would use them: another
processor, number of threads, torch, dtype or checkpoint has none until it is measured itself.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from harness.plan.speed import Batch
from kvmerge.cells import Cell
from kvmerge.errors import UserError
from kvmerge.files import cache_dir, read_object, write_atomically
from kvmerge.kernels.choice import machine
from kvmerge.models import ModelSpec
from kvmerge.names import parse_name
from kvmerge.schema import construct, fits

FILE = "speed.json"


@dataclass(frozen=True)
class Point:
    """One prompt that was answered, and the seconds of each part."""

    tokens: int
    batch: Batch
    """Its rows after the prefill."""
    answer: int
    """Tokens of every row's answer."""
    prefill: float
    """With what its rows cost to store."""
    decode: float
    replay: float
    """Of the answer, fed to every row in one pass."""

    @property
    def steps(self) -> int:
        """Decode steps: the first token comes from the prefill."""
        return self.answer - 1

    @property
    def grown(self) -> Batch:
        """Its rows halfway through the answer."""
        return self.batch.grown(self.steps)


@dataclass(frozen=True)
class Calibration:
    """Seconds of a machine's work with a model; none is negative."""

    loading: float
    """From the start of a run to its first prefill."""
    resident: float
    """Bytes of the process with the model, beside its weights."""
    prefilling: Sequence[float]
    """Of a prefill: once, a token, and a pair of tokens."""
    storing: float
    """Of storing an entry, all layers together."""
    decoding: Sequence[float]
    """Of a decode step: once, a row, an attention call in every layer, and an entry that is read."""
    replaying: Sequence[float]
    """Of replaying, beside what a step takes once and for its calls: a token of a row, and a token with
    an entry that it reads."""
    compressing: Mapping[str, Sequence[float]]
    """Of compressing all layers, by the method: seconds with `reference` tokens, and the power of the
    length that they grow with."""
    reference: int
    """Tokens."""
    error: float
    """The largest share by which a measured prompt is off what these numbers say of it."""

    def slower(self, share: float) -> Calibration:
        """Return the same machine with every time longer by a share; shorter by a negative one."""
        by = 1 + share
        return Calibration(
            self.loading * by,
            self.resident,
            [by * each for each in self.prefilling],
            self.storing * by,
            [by * each for each in self.decoding],
            [by * each for each in self.replaying],
            {name: [by * base, power] for name, (base, power) in self.compressing.items()},
            self.reference,
            self.error,
        )

    def knows(self, cell: Cell) -> bool:
        """Return whether a cell's method was measured, with these options or its usual ones."""
        return cell.is_full or self._method(cell) is not None

    def prefill(self, tokens: int) -> float:
        """Return the time of a prompt's pass through all layers."""
        return _dot(self.prefilling, (1, tokens, tokens**2))

    def compress(self, cell: Cell, tokens: int) -> float:
        """Return the time of a cell's method with all layers; if unknown, the mean of the others."""
        if cell.is_full or not self.compressing or cell.budget.entries(tokens) >= tokens:
            return 0.0
        known = self._method(cell)
        taken = [known] if known else list(self.compressing.values())
        return math.fsum(base * (tokens / self.reference) ** power for base, power in taken) / len(
            taken
        )

    def store(self, entries: float) -> float:
        """Return the time of putting away what rows keep."""
        return self.storing * entries

    def step(self, batch: Batch) -> float:
        """Return the time of one decode step."""
        return _dot(self.decoding, (1, *batch))

    def replay(self, batch: Batch, width: float) -> float:
        """Return the time of feeding `width` given tokens to each row at once."""
        once, _, call, _ = self.decoding
        return (
            once
            + call * batch.groups
            + _dot(self.replaying, (width * batch.rows, width * batch.entries))
        )

    def _method(self, cell: Cell) -> Sequence[float] | None:
        variant = parse_name(cell.name).variant
        return self.compressing.get(variant) or self.compressing.get(cell.method_name)


def fit(
    points: Sequence[Point],
    methods: Mapping[str, tuple[tuple[int, float], tuple[int, float]]],
    loading: float,
    resident: float,
) -> Calibration:
    """Return the times, none negative, by which measured prompts are least off, relative to their own.

    Args:
        points: prompts of at least three lengths, with few and with many rows, groups and entries.
        methods: for each method the seconds of all layers at two lengths, the shorter first.
        loading: seconds from a run's start to its first prefill.
        resident: bytes of the process with the model, beside its weights.
    """
    *prefilling, storing = _least(
        [(1, each.tokens, each.tokens**2, each.batch.entries) for each in points],
        [each.prefill for each in points],
    )
    decoding = _least(
        [(1, *each.grown) for each in points], [each.decode / each.steps for each in points]
    )
    left = [max(0.0, each.replay - decoding[0] - decoding[2] * each.batch.groups) for each in points]
    replaying = _least(
        [(each.steps * each.batch.rows, each.steps * each.grown.entries) for each in points], left
    )
    reference = max((longer[0] for _, longer in methods.values()), default=1)
    grown = {name: [longer[1], _power(shorter, longer)] for name, (shorter, longer) in methods.items()}
    found = Calibration(
        loading, resident, prefilling, storing, decoding, replaying, grown, reference, error=0.0
    )
    return Calibration(**vars(found) | {"error": max(_off(found, each) for each in points)})


def _least(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return the non-negative factors of columns whose sums are nearest to seconds, relatively."""
    wanted = np.maximum(np.asarray(seconds, dtype=float), 1e-9)
    weighted: NDArray[np.float64] = np.asarray(columns, dtype=float) / wanted[:, None]
    scale = weighted.max(axis=0)  # a square of tokens beside a one
    factors, _ = nnls(weighted / scale, np.ones(len(wanted)))
    return [float(each) for each in factors / scale]


def _power(shorter: tuple[int, float], longer: tuple[int, float]) -> float:
    """Return the power of the length that a time grows with, from 0 to 2."""
    if min(shorter[1], longer[1]) <= 0:
        return 1.0
    found = math.log(longer[1] / shorter[1]) / math.log(longer[0] / shorter[0])
    return min(2.0, max(0.0, found))


def _off(found: Calibration, point: Point) -> float:
    said = (
        found.prefill(point.tokens)
        + found.store(point.batch.entries)
        + point.steps * found.step(point.grown)
        + found.replay(point.grown, point.steps)
    )
    return abs(said / (point.prefill + point.decode + point.replay) - 1)


def _dot(factors: Sequence[float], counts: Sequence[float]) -> float:
    return math.fsum(factor * count for factor, count in zip(factors, counts, strict=True))


# --- the file


def keep(spec: ModelSpec, found: Calibration) -> Path:
    """Write a calibration for this machine and a model, beside those of others; return the file.

    Raises:
        UserError: if the cache folder cannot be written.
    """
    path = cache_dir() / FILE
    content = read_object(path)
    content.setdefault(_machine(spec), {})[_model(spec)] = asdict(found)
    try:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {path.parent}: {error.strerror}. Make room or correct "
            "its permissions, or give another folder: KVMERGE_CACHE=DIR."
        ) from error
    return path


def kept(spec: ModelSpec) -> Calibration | None:
    """Return what was measured on this machine with a model; None if nothing sound is kept."""
    of_machine = read_object(cache_dir() / FILE).get(_machine(spec))
    entry = of_machine.get(_model(spec)) if isinstance(of_machine, dict) else None
    if not isinstance(entry, dict):
        return None
    with contextlib.suppress(UserError):
        found = construct(Calibration, entry)
        return found if _is_whole(found) else None
    return None


def _is_whole(found: Calibration) -> bool:
    """Return whether an entry of the file has as many numbers as are read."""
    lists = [(found.prefilling, 3), (found.decoding, 4), (found.replaying, 2)]
    lists += [(of_method, 2) for of_method in found.compressing.values()]
    return all(fits(numbers, Sequence[float]) and len(numbers) == size for numbers, size in lists)


def _machine(spec: ModelSpec) -> str:
    if spec.torch_device().type != "cuda":
        return machine()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)}, {machine()}"


def _model(spec: ModelSpec) -> str:
    how = [
        spec.dtype,
        *([spec.quantize] if spec.quantize else []),
        *([] if spec.pack_weights else ["unpacked"]),
    ]
    return f"{spec.name}, {spec.source()}, {', '.join(how)}"
