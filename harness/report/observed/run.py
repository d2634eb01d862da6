"""From the lines of a run that observes to arrays over its samples, and their means with intervals."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.metric import Array
from harness.observation import Observation, Observed, read_maps
from harness.report.bootstrap import Estimate, Samples, Scored, resampled_means
from harness.report.run import check_info, complete_shards, refuse_other_settings
from harness.report.words import made_by, span
from kvmerge.errors import UserError


@dataclass(frozen=True)
class ObservedRun:
    """What one output_dir of a run that observes holds."""

    output_dir: Path
    info: Mapping[str, Any]
    """run.json as written (of shard 0 where the run is sharded)."""
    tasks: Mapping[str, Sequence[Observation]]
    """Observations by task, in the run's own order; tasks without any are left out."""
    maps: Mapping[str, Any] | None
    """See `harness.observation.read_maps`."""

    @cached_property
    def measured(self) -> Mapping[str, Any]:
        """The settings of what was measured: `distances`, `thresholds`, `epsilon`, …"""
        found: Mapping[str, Any] = self.info["fingerprint"]["observe"]
        return found

    @cached_property
    def samples(self) -> list[Observation]:
        """All observations, task by task."""
        return [each for of_task in self.tasks.values() for each in of_task]

    @cached_property
    def task_of(self) -> list[str]:
        """The task of each sample."""
        return [task for task, of_task in self.tasks.items() for _ in of_task]

    @property
    def layers(self) -> list[int]:
        """The layers that were observed."""
        return self.samples[0].layers

    @property
    def at_epsilon(self) -> int:
        """Which of the thresholds is the nearest to `epsilon`."""
        thresholds = np.asarray(self.measured["thresholds"])
        return int(np.abs(thresholds - self.measured["epsilon"]).argmin())

    @property
    def kinds(self) -> list[str]:
        """The kinds of states whose cosines were measured."""
        return list(self.samples[0].cosine)

    def cosine(self, kind: str) -> Array:
        """Return mean cosines: `(samples, layers, KV heads, distances)`, NaN where there is no pair."""
        return self._array([each.cosine[kind] for each in self.samples])

    @cached_property
    def ratio(self) -> Array:
        """Compression ratios: `(samples, layers, KV heads, thresholds)`."""
        return self._array([each.ratio for each in self.samples])

    @cached_property
    def sizes(self) -> Array:
        """Each class's part of the sets: `(samples, layers, classes)`."""
        counts = self._array([each.sizes for each in self.samples])
        return counts / counts.sum(axis=-1, keepdims=True)

    @cached_property
    def distance(self) -> Array:
        """Quartiles of distances to pivots: `(samples, layers, 3)`, NaN where nothing is merged."""
        return self._array([_filled(each.distance) for each in self.samples])

    def sigma(self, rule: str) -> Array:
        """Return quartiles of a rule's sigmas: `(samples, layers, 3)`, NaN where nothing is merged."""
        return self._array([_filled(each.sigma[rule]) for each in self.samples])

    @cached_property
    def entropy(self) -> Array:
        """Entropies: `(samples, layers, query heads)` nats, NaN for a prompt of one token."""
        return self._array([each.entropy for each in self.samples])

    @cached_property
    def flatness(self) -> Array:
        """Entropies over the largest that there could be: `(samples, layers, query heads)`."""
        return self._array([each.flatness for each in self.samples])

    @staticmethod
    def _array(values: Any) -> Array:
        return np.array(values, dtype=np.float64)

    def setting(self) -> str:
        """Write one line that says what every number was measured on."""
        counts = span([len(of_task) for of_task in self.tasks.values()])
        lengths = span([each.prompt_tokens for each in self.samples])
        of = f"{self.info['model']} on {self.info['benchmark']}"
        return ", ".join([of, f"n = {counts} samples a task", f"{lengths} tokens", *made_by(self.info)])

    @cached_property
    def reached(self) -> list[int]:
        """Which of the distances some sample of every task reaches: means over the others compare
        different tasks."""
        cosine = self.cosine("keys")[:, 0, 0]
        there = [(~np.isnan(cosine[self._rows(task)])).any(axis=0) for task in self.tasks]
        return [int(at) for at in np.flatnonzero(np.all(there, axis=0))]

    def mean(self, values: Array, tasks: Sequence[str] | None = None) -> Array:
        """Average over the samples of each task, then over tasks, whatever is not a number left out.

        Args:
            values: `(samples, ...)`.
            tasks: those that count; None: all.
        """
        with _nothing_is_nan():
            return _nanmean([_nanmean(values[self._rows(task)]) for task in tasks or self.tasks])

    def average(self, values: Array, tasks: Sequence[str] | None = None) -> tuple[Array, Array]:
        """Return `mean` and its bootstrap replicates, drawn over the samples of each task.

        Returns:
            the means `(...)`; the replicates `(resamples, ...)`, none (0 resamples) where a task has
            one sample.
        """
        drawn = []
        chosen = list(tasks or self.tasks)
        with _nothing_is_nan():
            for task in chosen:
                rows = values[self._rows(task)].reshape(len(self.tasks[task]), -1)
                ids = tuple(each.id for each in self.tasks[task])
                if len(ids) > 1:
                    drawn.append(resampled_means(task, Samples(ids, rows)))
            is_whole = len(drawn) == len(chosen)
            replicates = _nanmean(drawn) if is_whole else np.empty((0, values[0].size))
        return self.mean(values, tasks), replicates.reshape(-1, *values.shape[1:])

    def _rows(self, task: str) -> NDArray[np.intp]:
        return np.flatnonzero(np.asarray(self.task_of) == task)

    def estimate(self, values: Array, tasks: Sequence[str] | None = None) -> Estimate:
        """Return the average of one number a sample, `(samples,)`, with its 95% interval."""
        mean, replicates = self.average(values, tasks)
        return Scored(float(mean), replicates).estimate()


def _nanmean(values: Any, axis: int = 0) -> Array:
    """Average along an axis, whatever is not a number left out; the plain mean where all are."""
    array = np.asarray(values)
    is_whole = not np.isnan(array).any()
    found: Array = array.mean(axis=axis) if is_whole else np.nanmean(array, axis=axis)
    return found


@contextlib.contextmanager
def _nothing_is_nan() -> Iterator[None]:
    """Let the mean of nothing be NaN without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def load_observed(output_dir: Path, results: Observed | None = None) -> ObservedRun:
    """Read an output_dir of a run that observes: its own observations, or those of all its shards.

    `results` is what was read and written there already, of an output_dir that is not sharded.

    Raises `UserError` where run.json is missing or incomplete, a shard is missing or differs in a
    setting, a sample is there twice, or there is none at all.
    """
    shards = [Observed(path) for path in sorted((output_dir / "shards").glob("*-of-*"))]
    parts = complete_shards(output_dir, shards) if shards else [results or Observed(output_dir)]
    for part in parts:
        check_info(part)
        if part.info.get("fingerprint", {}).get("observe") is None:
            raise UserError(f"{part.run_file} does not say what was observed. Run again to write it.")
        refuse_other_settings(part, parts[0])
    names = dict.fromkeys(task for part in parts for task in part.info["tasks"])
    found = {name: [each for part in parts for each in part.observations(name)] for name in names}
    for name, of_task in found.items():
        ids = [each.id for each in of_task]
        if len(set(ids)) < len(ids):
            raise UserError(f"{output_dir}: samples of {name} are in more than one shard.")
    # Sorted, so that the order in which samples finished has no effect.
    tasks = {name: sorted(each, key=lambda one: one.id) for name, each in found.items() if each}
    if not tasks:
        raise UserError(f"{output_dir} holds no observation yet.")
    drawn = [read_maps(part.map_file) for part in parts]
    maps = next((each for each in drawn if each is not None), None)
    run = ObservedRun(output_dir, parts[0].info, tasks, maps)
    _refuse_other_shapes(run)
    return run


def _refuse_other_shapes(run: ObservedRun) -> None:
    """Refuse samples that were measured of other layers, heads, distances or thresholds."""
    distances, thresholds = len(run.measured["distances"]), len(run.measured["thresholds"])

    def shapes(each: Observation) -> tuple[Any, ...]:
        cosines = [(kind, _shape(of_kind)) for kind, of_kind in each.cosine.items()]
        return each.layers, cosines, _shape(each.ratio), _shape(each.entropy)

    first = run.samples[0]
    wanted = shapes(first)
    heads = _shape(first.ratio)[1]
    is_right = _shape(first.ratio)[2] == thresholds and all(
        shape == (len(first.layers), heads, distances) for _, shape in wanted[1]
    )
    for task, each in zip(run.task_of, run.samples, strict=True):
        if not is_right or shapes(each) != wanted:
            raise UserError(
                f"{run.output_dir}: the line of task {task}, sample {each.id!r} is of other layers, "
                "heads, distances or thresholds than run.json or another line. Delete it: its sample "
                "runs again."
            )


def _filled(layers: Sequence[Sequence[float] | None]) -> list[Sequence[float]]:
    return [[np.nan] * 3 if each is None else each for each in layers]


def _shape(values: Any) -> tuple[int, ...]:
    return np.shape(values)
