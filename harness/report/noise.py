"""The noise floor: how far scores move where only batch size, threads, kernel or dtype is another.

Read from a folder that `experiment=noise` wrote. The noise of a task is the largest difference to the
base that any variant made in any cell, on the same samples: the maximum of a handful, no bound, and in
steps of 100/n where a sample is right or wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from harness.judgement import Judgement
from harness.records import Record
from harness.report.contrasts import AVERAGE, Contrast
from harness.report.divergence import KL, divergence
from harness.report.run import Run, load_run
from harness.report.words import span
from harness.results import changed_prints
from harness.variants import BASE, FOLDER, UNPACKED, Listed, check_noise, is_noise, read_variants
from kvmerge.errors import UserError

_VARIED = {"dtype": "model.dtype", UNPACKED: "model.pack_weights"}
"""What a variant changes of what a run's fingerprint holds, by its setting or its name."""
_DIGITS = 10  # decimals: equal differences must compare equal, however they were summed


@dataclass(frozen=True)
class Change:
    """What one variant changed in one cell, on a task, on the average, or on KL to the full cache."""

    variant: str
    setting: str
    """What the variant changes."""
    cell: str
    task: str
    """A task, `average` or `kl`."""
    n: int
    """Samples that both hold, summed over tasks."""
    base: float
    value: float
    """Score of the variant, or its KL."""
    changed: float
    """Share of the answers whose text is another; NaN where nothing is generated."""

    @property
    def difference(self) -> float:
        """The variant's minus the base's."""
        return round(self.value - self.base, _DIGITS)


@dataclass(frozen=True)
class Floor:
    """A base, its variants, and what they changed."""

    folder: Path
    base: Run
    variants: Mapping[str, Run]
    """By name; those that ran otherwise than the base."""
    settings: Mapping[str, str]
    """What each variant changes."""
    passed_over: Mapping[str, str]
    """Why others say nothing, by name."""
    apart: frozenset[str] = frozenset()
    """`average` and `kl` where they are over other tasks than those of the run beside it."""

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Every change: of each variant and cell on the tasks in order, on the average, on KL."""
        return tuple(
            change
            for name in self.variants
            for cell in self.base.cells
            for change in self._of_cell(name, cell)
        )

    @cached_property
    def largest(self) -> dict[str, Change]:
        """The largest change on each task, on the average and on KL, where it was measured."""
        found: dict[str, Change] = {}
        for change in self.changes:
            so_far = found.get(change.task)
            if so_far is None or abs(change.difference) > abs(so_far.difference):
                found[change.task] = change
        return found

    def noise(self, task: str) -> float:
        """Return the noise of a task, `average` or `kl`; NaN where it was not measured."""
        change = self.largest.get(task)
        return np.nan if change is None or task in self.apart else abs(change.difference)

    def covers(self, contrast: Contrast) -> bool:
        """Return whether a contrast is no larger than noise that was measured and is not 0."""
        noise = self.noise(contrast.task)  # NaN compares as false
        return noise > 0 and abs(round(contrast.value, _DIGITS)) <= noise

    def _of_cell(self, name: str, cell: str) -> Iterator[Change]:
        base, variant = self.base, self.variants[name]
        by_task = self._on_tasks(base, variant, name, cell)
        yield from by_task.values()
        averaged = base.averaged_tasks
        if averaged and by_task.keys() >= set(averaged):
            yield self._over(name, cell, AVERAGE, [by_task[task] for task in averaged])
        seen = divergence(base)
        of_kl = self._on_tasks(seen, divergence(variant), name, cell)
        if of_kl and len(of_kl) == len(seen.tasks):
            yield self._over(name, cell, KL, [*of_kl.values()])

    def _on_tasks(self, base: Run, variant: Run, name: str, cell: str) -> dict[str, Change]:
        """Return the change of each task that both hold samples of, by the runs' own metrics."""
        found = {}
        for task in base.tasks:
            key = task, cell
            if key not in base.samples or key not in variant.samples:
                continue
            common = set(base.samples[key].ids) & set(variant.samples[key].ids)
            if not common:
                continue
            before, after = (
                float(run.metrics[task].score(run.samples[key].only(common).parts.mean(axis=0)))
                for run in (base, variant)
            )
            changed = _share_changed(_paired(base.records[key], variant.records[key]))
            found[task] = self._change(name, cell, task, len(common), before, after, changed)
        return found

    def _over(self, name: str, cell: str, label: str, changes: Sequence[Change]) -> Change:
        """Average changes of some tasks."""
        n = sum(change.n for change in changes)
        values = ([c.base for c in changes], [c.value for c in changes], [c.changed for c in changes])
        return self._change(name, cell, label, n, *(float(np.mean(each)) for each in values))

    def _change(self, name: str, cell: str, task: str, n: int, *values: float) -> Change:
        return Change(name, self.settings[name], cell, task, n, *values)


def _paired(before: Iterable[Record], after: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
    """Yield the records of the same sample and seed."""
    others = {(record.id, record.seed): record for record in after}
    for record in before:
        if (record.id, record.seed) in others:
            yield record, others[record.id, record.seed]


def _share_changed(pairs: Iterable[tuple[Record, Record]]) -> float:
    texts = [(one.prediction, other.prediction) for one, other in pairs]
    if not any(one or other for one, other in texts):
        return np.nan  # a given text was scored, and nothing generated
    return float(np.mean([one != other for one, other in texts]))


def load_floor(folder: Path) -> Floor:
    """Read the folder of a noise run.

    Raises:
        UserError: where it is none, cannot be read, or a variant differs from the base, or within
            itself, in a setting that it was not to change, naming that.
    """
    content = read_variants(folder)
    base = _read(folder / FOLDER / BASE)
    variants: dict[str, Run] = {}
    passed_over: dict[str, str] = {}
    for listed in content["variants"]:
        name = listed["name"]
        if name == BASE:
            continue
        if listed["obstacle"]:
            passed_over[name] = listed["obstacle"]
            continue
        run = _read(folder / FOLDER / name)
        _refuse_other_changes(base, run, listed)
        if _ran_alike(base, run):
            passed_over[name] = "it ran as the base did, in the same batches, threads and kernels"
        else:
            variants[name] = run
    settings = {listed["name"]: listed["setting"] for listed in content["variants"]}
    return Floor(folder, base, variants, settings, passed_over)


def _read(folder: Path) -> Run:
    """Read a variant. Raises `UserError` also where it was resumed with another number of threads."""
    run = load_run(folder)
    threads = run.values("threads")
    if len(threads) > 1:
        raise UserError(
            f"{folder} was run with different threads ({', '.join(sorted(map(str, threads)))}), so it "
            "does not tell what one setting makes. Delete that folder and run experiment=noise again."
        )
    return run


def _refuse_other_changes(base: Run, run: Run, listed: Listed) -> None:
    """Refuse a variant that differs in what it was not to change.

    Tasks and cells that only one of the two has are no difference.
    """
    meant = _VARIED.get(listed["setting"]) or _VARIED.get(listed["name"])
    before, now = (each.recorded("fingerprint") or {} for each in (base, run))
    for setting, was, is_now in changed_prints(before, now):
        if setting != meant:
            raise UserError(
                f"{run.output_dir} and {base.output_dir} differ in {setting} ({is_now!r} against "
                f"{was!r}), so they do not tell what {listed['name']} alone changes. Delete the odd "
                "one and run experiment=noise again."
            )


def _ran_alike(base: Run, run: Run) -> bool:
    """Return whether every sample ran as in the base, as far as records tell."""
    return all(
        (one.batch_samples, one.threads, one.kernel)
        == (other.batch_samples, other.threads, other.kernel)
        for key, records in run.records.items()
        for one, other in _paired(base.records.get(key, ()), records)
    )


@dataclass(frozen=True)
class Found:
    """The noise floor that stands beside a run's contrasts, or why there is none."""

    floor: Floor | None
    note: str


def find_floor(run: Run, judgement: Judgement) -> Found:
    """Find the noise floor of a run: the one that was named, or that of its model and benchmark.

    By default it is looked for where `experiment=noise` writes, seen from the run's own folder
    `<root>/<run>/<benchmark>/<model>`.

    Raises:
        UserError: if the folder that was named holds none, or one of another model or benchmark.
    """
    return run.once(f"noise {judgement.noise}", lambda: _find(run, judgement.noise))


def _find(run: Run, given: str | None) -> Found:
    if given is not None:
        folder = Path(given).expanduser()
        if given == run.recorded("config", "noise") and not folder.exists():
            return Found(
                None, f"Noise: {folder}, which the run was given, is gone; --noise names another."
            )
        check_noise(folder, run.model, run.benchmark)
        return _beside(run, load_floor(folder))
    place = _default_place(run)
    if place is None or not is_noise(place):
        return Found(
            None,
            "Noise: not measured. `python run.py experiment=noise` with this model and benchmark "
            "measures what batch size, threads, kernel and dtype alone change.",
        )
    try:  # nobody asked for this folder, so it must not stand in the way of a report
        check_noise(place, run.model, run.benchmark)
        return _beside(run, load_floor(place))
    except UserError as error:
        return Found(None, f"Noise: left out, {error}")


def _default_place(run: Run) -> Path | None:
    parents = run.output_dir.resolve().parents
    return parents[2] / "noise" / run.benchmark / run.model if len(parents) > 2 else None


def _beside(run: Run, floor: Floor) -> Found:
    """Return a floor with what of it compares with a run."""
    apart = frozenset(
        what
        for what, theirs, ours in (
            (AVERAGE, floor.base.averaged_tasks, run.averaged_tasks),
            (KL, divergence(floor.base).tasks, divergence(run).tasks),
        )
        if theirs and ours and set(theirs) != set(ours)
    )
    floor = replace(floor, apart=apart)
    return Found(floor, _note(run, floor))


def _note(run: Run, floor: Floor) -> str:
    counts = {change.n for change in floor.changes if change.task in run.tasks}
    differs = [
        f"{what} {theirs} there, {ours} here"
        for what in ("device", "dtype")
        if (theirs := floor.base.info.get(what)) != (ours := run.info.get(what))
    ]
    return (
        f"Noise: the largest difference that one of {len(floor.variants)} other ways to compute "
        f"({', '.join(floor.variants)}) made in one of {', '.join(floor.base.cells)}, n = "
        f"{span(counts or {0})} samples a task, from {floor.folder}; blank: not measured."
        + (f" Measured otherwise: {'; '.join(differs)}." if differs else "")
        + (" Its averages are over other tasks, so they are left out." if floor.apart else "")
    )
