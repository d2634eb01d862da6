"""The gates of a run: does its full cache reproduce the published score of each task?

A method's row is read as its distance from the full cache, so a table counts as a reproduction only
where the full cache itself lies within a published band (results/reference, docs/reproducing.md).
Whatever cannot be compared is named with its reason, never passed in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from harness.report.published import Reference, load_references
from harness.report.run import Run, load_run
from harness.results import Results

logger = logging.getLogger(__name__)

NAMED = 3
"""Tasks of which nothing is published that are named one by one; more are counted."""
PROFILE = "official"
"""The benchmark profile that published bands hold under; a benchmark without profiles has it."""


class Verdict(StrEnum):
    """What a gate says."""

    INSIDE = "inside"
    OUTSIDE = "outside"
    NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True)
class Gate:
    """One task's full-cache score against one published number."""

    task: str
    """A task, or the name of a published aggregate."""
    samples: int
    """Samples that ours is over."""
    ours: float | None
    """The full cell's score, 0 to 100; None where there is none."""
    published: Reference | None
    verdict: Verdict
    reason: str
    """Why it is not comparable, or what its comparison rests on; empty where nothing is to say."""

    @property
    def text(self) -> str:
        """The two numbers in words, e.g. `triviaqa 70.10 (published 77.8 ± 2)`."""
        ours = "" if self.ours is None else f" {self.ours:.2f}"
        if self.published is None:
            return f"{self.task}{ours}"
        band = "" if self.published.tolerance is None else f" ± {self.published.tolerance:g}"
        source = self.published.source
        quoted = f", {source.words}" if source.is_quoted else ""
        return f"{self.task}{ours} (published {self.published.published}{band}{quoted})"


def gates(run: Run, references: Iterable[Reference]) -> list[Gate]:
    """Judge every task of a run, then the published averages whose tasks no source names.

    Empty for a benchmark of which nothing is published.
    """
    full = [r for r in references if r.benchmark == run.benchmark and r.method == "full"]
    fitting = [r for r in full if r.fits(run.model) and r.published]
    if not full:
        return []
    found: list[Gate] = []
    for task in run.tasks:
        found += _of_task(run, fitting, task, partial(_judge, run))
    return found + [_orientation(run, r) for r in fitting if r.is_aggregate and not r.over]


def sampled_gates(run: Run, references: Iterable[Reference]) -> list[Gate]:
    """Judge every task of a run that took only some samples, by the interval that these give.

    A task is outside only if the interval leaves its whole band out. The intervals hold 95% for all
    judged tasks together: each has a level of 5% divided by their number.
    """
    full = [r for r in references if r.benchmark == run.benchmark and r.method == "full"]
    fitting = [r for r in full if r.fits(run.model) and r.published]
    judged = [r for r in fitting if r.tolerance is not None and r.task in run.tasks]
    judge = partial(_judge_some, run, level=0.05 / max(1, len(judged)))
    return [gate for task in run.tasks for gate in _of_task(run, fitting, task, judge)]


def _of_task(
    run: Run, fitting: Iterable[Reference], task: str, judge: Callable[[Reference], Gate]
) -> list[Gate]:
    """Judge the bands of a task; without one, show what is published or say that nothing is."""
    of_task = [r for r in fitting if r.task == task]
    bands = [judge(r) for r in of_task if r.tolerance is not None]
    return bands or [_without_band(run, r) for r in of_task] or [_unpublished(run, task)]


def _judge_some(run: Run, band: Reference, level: float) -> Gate:
    ours, samples = _full_score(run, band.task)
    reason = _another_protocol(run, samples)
    if not reason and samples < 2:
        reason = "one sample has no interval"
    if reason or ours is None or band.score is None or band.tolerance is None:
        return Gate(band.task, samples, ours, band, Verdict.NOT_COMPARABLE, reason)
    key = band.task, run.full_cell or ""
    low, high = run.scores[key].sure_interval(level, len(run.samples[key].clusters))
    off = low > band.score + band.tolerance or high < band.score - band.tolerance
    reason = f"by {samples} samples, whose interval is {low:.1f} to {high:.1f}"
    return Gate(band.task, samples, ours, band, Verdict.OUTSIDE if off else Verdict.INSIDE, reason)


def profile_of(run: Run) -> str:
    """Name the benchmark profile of a run."""
    return str(run.recorded("config", "benchmark", "profile") or PROFILE)


def outside(found: Iterable[Gate]) -> set[str]:
    """Name the tasks whose full cache is outside a band."""
    return {gate.task for gate in found if gate.verdict is Verdict.OUTSIDE}


def summary_lines(found: Sequence[Gate]) -> list[tuple[Verdict, str]]:
    """Return in a line each what is outside, what is inside, and what is not comparable and why."""
    lines = []
    off = [gate for gate in found if gate.verdict is Verdict.OUTSIDE]
    within = [gate for gate in found if gate.verdict is Verdict.INSIDE]
    if off:
        lines.append(
            (
                Verdict.OUTSIDE,
                f"Gate: the full cache is OUTSIDE its published band on {len(off)} of "
                f"{len(off) + len(within)} tasks, so these do not count as a reproduction: "
                f"{', '.join(gate.text for gate in off)}.",
            )
        )
    if within:
        names = ", ".join(gate.task for gate in within)
        lines.append((Verdict.INSIDE, f"Gate: the full cache is inside its published band on {names}."))
    unclear = [gate for gate in found if gate.verdict is Verdict.NOT_COMPARABLE]
    for reason in dict.fromkeys(gate.reason for gate in unclear):
        of_reason = [gate for gate in unclear if gate.reason == reason]
        texts = ", ".join(gate.text for gate in of_reason)
        if len(of_reason) > NAMED and all(gate.published is None for gate in of_reason):
            texts = f"all {len(of_reason)} tasks"
        lines.append((Verdict.NOT_COMPARABLE, f"Gate not comparable, {reason}: {texts}."))
    return lines


def log_gate(benchmark: str, results: Results, task: str) -> None:
    """Log the verdict on a task that has just been finished, a warning where it is outside."""
    published = [r for r in load_references() if r.benchmark == benchmark and r.task == task]
    if not published:
        return
    for gate in gates(load_run(results.folder, results), published):
        if gate.task == task and gate.verdict is not Verdict.NOT_COMPARABLE:
            level = logging.WARNING if gate.verdict is Verdict.OUTSIDE else logging.INFO
            logger.log(level, "Gate: %s is %s", gate.text, gate.verdict)


def _judge(run: Run, band: Reference) -> Gate:
    ours, samples = _full_score(run, band.task)
    reason = _obstacle(run, band, samples)
    if reason or ours is None or band.score is None or band.tolerance is None:
        return Gate(band.task, samples, ours, band, Verdict.NOT_COMPARABLE, reason)
    within = abs(ours - band.score) <= band.tolerance + 1e-9  # of decimal fractions in binary
    given = run.recorded("config", "benchmark", "data_dir")
    basis = f"rows from {given}: only their number was compared" if given else ""
    return Gate(band.task, samples, ours, band, Verdict.INSIDE if within else Verdict.OUTSIDE, basis)


def _obstacle(run: Run, band: Reference, samples: int) -> str:
    """Return what keeps a score from being compared with a band; empty if nothing does."""
    if reason := _another_protocol(run, samples):
        return reason
    if samples != band.samples:
        return f"{samples} samples run, published on {band.samples}"
    return ""


def _another_protocol(run: Run, samples: int) -> str:
    if not samples:
        return "no full cell was run"
    if profile_of(run) != PROFILE:
        return f"profile {profile_of(run)}, published under {PROFILE}"
    return ""


def _unpublished(run: Run, task: str) -> Gate:
    ours, samples = _full_score(run, task)
    reason = f"no task scores published for {run.model}"
    return Gate(task, samples, ours, None, Verdict.NOT_COMPARABLE, reason)


def _without_band(run: Run, published: Reference) -> Gate:
    ours, samples = _full_score(run, published.task)
    reason = "no band is set for what was " + published.source.words
    return Gate(published.task, samples, ours, published, Verdict.NOT_COMPARABLE, reason)


def _orientation(run: Run, published: Reference) -> Gate:
    scores = [_full_score(run, task) for task in run.averaged_tasks]
    known = [score for score, _ in scores if score is not None]
    ours = sum(known) / len(known) if known and len(known) == len(scores) else None
    reason = f"for orientation only, {published.note}"
    samples = sum(samples for _, samples in scores)
    return Gate(published.task, samples, ours, published, Verdict.NOT_COMPARABLE, reason)


def _full_score(run: Run, task: str) -> tuple[float | None, int]:
    """Return the full cell's score of a task, without its bootstrap, and the samples it is over."""
    samples = run.samples.get((task, run.full_cell or ""))
    if samples is None or not samples.ids:
        return None, 0
    return float(run.metrics[task].score(samples.parts.mean(axis=0))), len(samples.ids)
