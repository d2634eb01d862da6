"""One line a sample of a run that observes: what was measured on its prefill, layer by layer."""

from __future__ import annotations

import json
import logging
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from harness.records import append_record
from harness.results import OBSERVATIONS, Results
from harness.typed import Count, Line, Misfit, Positive, Share
from kvmerge.errors import UserError
from kvmerge.files import check_name
from kvmerge.observations import KINDS, RULES, LayerObservation

logger = logging.getLogger(__name__)

_DECIMALS = 5
_MAPS = ("maps", "layers", "heads", "tokens", "block", "sample", "asked")


@dataclass(frozen=True, kw_only=True)
class Observation(Line):
    """One observed sample.

    Lists are by layer, in the order of `layers`, then by head; null is what a prompt was too short for.
    """

    id: str
    prompt_hash: str
    prompt_tokens: Count
    """Tokens fed to prefill (T)."""
    layers: list[Count]
    """Those observed: all but layers that are left to a window of their own."""
    cosine: Mapping[str, list[list[list[float | None]]]]
    """By kind (`keys`, after RoPE, `keys_before_rope`, `values`): layer, KV head, distance."""
    ratio: list[list[list[Share]]]
    """Layer, KV head, threshold: sets left, as a share of the prompt's tokens."""
    sizes: list[list[Count]]
    """Layer, class of size: sets over all KV heads."""
    distance: list[list[Positive] | None]
    """Layer: quartiles of the distance of merged keys to their pivots; null where nothing is merged."""
    sigma: Mapping[str, list[list[Positive] | None]]
    """By rule: layer, quartiles over the sets of two or more tokens."""
    entropy: list[list[Positive | None]]
    """Layer, query head: nats, the mean over rows."""
    flatness: list[list[Share | None]]
    """Layer, query head: mean of each row's entropy over the log of the tokens it sees."""
    seconds: Positive | None = None
    """Of the prefill and of measuring it."""

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerObservation],
        *,
        sample: str,
        prompt_hash: str,
        tokens: int,
        seconds: float,
    ) -> Observation:
        """Write down what was measured of a sample's layers."""
        kinds = [kind for kind in KINDS if layers and kind in layers[0].cosine]
        return cls(
            id=sample,
            prompt_hash=prompt_hash,
            prompt_tokens=tokens,
            layers=[layer.layer_idx for layer in layers],
            cosine={kind: [_rounded(layer.cosine[kind]) for layer in layers] for kind in kinds},
            ratio=[_rounded(layer.ratio) for layer in layers],
            sizes=[layer.sizes for layer in layers],
            distance=[_rounded(layer.distance) for layer in layers],
            sigma={rule: [_rounded(layer.sigma[rule]) for layer in layers] for rule in RULES},
            entropy=[_rounded(layer.entropy) for layer in layers],
            flatness=[_rounded(layer.flatness) for layer in layers],
            seconds=round(seconds, 4),
        )

    def to_json(self) -> str:
        """Return the observation as one line of JSON, without newline."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read one line back. Raises `ValueError` where it is none, `Misfit` naming what is wrong."""
        read = super().from_json(line)
        read._check_lengths()
        return read

    def _check_lengths(self) -> None:
        """Refuse lists that are not of one length for every layer."""
        full = {f"cosine.{kind}": of_kind for kind, of_kind in self.cosine.items()}
        full |= {name: getattr(self, name) for name in ("ratio", "sizes", "entropy", "flatness")}
        gappy = {f"sigma.{rule}": of_rule for rule, of_rule in self.sigma.items()}
        for name, value in (full | gappy | {"distance": self.distance}).items():
            try:
                rows = value if name in full else [each for each in value if each is not None]
                np.array(rows, dtype=np.float64)
            except ValueError:
                raise Misfit(f"{name} has lists of different lengths") from None
            if len(value) != len(self.layers):
                raise Misfit(f"{name} has {len(value)} layers, not {len(self.layers)}")


def _rounded(values: Any) -> Any:
    """Return numbers as JSON has them; not-a-number becomes null."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [_rounded(each) for each in values]
    return None if values is None or math.isnan(values) else round(values, _DECIMALS)


class Observed(Results):
    """One results folder of a run that observes: its run.json and its observations."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._observations: dict[str, list[Observation]] = {}

    @property
    def map_file(self) -> Path:
        """Return where the maps of the chosen sample lie."""
        return self.folder / "maps.npz"

    def observations(self, task: str) -> list[Observation]:
        """Return the observations of a task in the order of their file; [] if there is none.

        Raises `UserError` naming file and line of what is damaged.
        """
        if task not in self._observations:
            self._observations[task] = read_observations(self._lines(task))
        return self._observations[task]

    def add_observation(self, task: str, observation: Observation) -> None:
        """Add an observation, on the disk first. Raises `UserError` where the disk is full."""
        observations = self.observations(task)
        append_record(self._lines(task), observation)
        observations.append(observation)

    def has_predictions(self) -> bool:
        """Return whether there is any line, here of observations."""
        return any(self.folder.glob(f"{OBSERVATIONS}/*.jsonl"))

    def _lines(self, task: str) -> Path:
        check_name("task", task)
        return self.folder / OBSERVATIONS / f"{task}.jsonl"


def read_observations(path: Path) -> list[Observation]:
    """Read all whole lines of a file of observations; a missing file has none.

    A last line that a kill left half-written is reported to the log and left out.

    Raises:
        UserError: naming file and line of what no kill explains, and of a sample that is there twice.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; moved elsewhere, its samples run again."
        ) from error
    found: dict[str, Observation] = {}
    for number, line in enumerate(lines, start=1):
        try:
            observation = Observation.from_json(line)
        except ValueError as error:
            if number == len(lines) and not rest and not isinstance(error, Misfit):
                rest = line
                break
            raise UserError(
                f"{path}, line {number} is not an observation: {error}. Delete that line: its sample "
                "runs again."
            ) from error
        if observation.id in found:
            raise UserError(
                f"{path}, line {number}: sample {observation.id!r} is there twice. Delete one."
            )
        found[observation.id] = observation
    if rest:
        logger.warning("%s ends in a half-written line; it is ignored", path)
    return list(found.values())


def read_maps(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read the maps of a sample; None where they are not there, or not whole.

    `maps` `(layers, heads, n, n)` float16 are the mean cosines of blocks of `block` tokens; `layers`
    and `heads` name them, `sample` (`<task>/<id>`) and `tokens` say of what, `asked` is what was asked.
    """
    try:
        with np.load(path) as found:
            return {name: found[name] for name in _MAPS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
