"""What a run says of the paper's claims: each has a rule that can fail, and the numbers it is held to.

The rules are this project's; the paper states its observations in words and pictures. A verdict needs
the whole 95% interval on one side of the rule's bound (docs/observations.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.metric import Array
from harness.report.bootstrap import Estimate, Scored
from harness.report.observed.run import ObservedRun
from harness.report.observed.variance import OF_TASK, decompose, share_of
from kvmerge.observations import RULES

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
MOST_HEADS = 0.9
"""Part of the heads that `all` stands for."""
OF_DATA = 0.05
"""Part of the variance up to which a quantity is not decided by the data."""
SAME = 0.1
"""Spread over tasks, relative to the mean, up to which a quantity counts as the same for all."""
SIGMA = 5.0
"""The paper's best fixed sigma."""
NEAR_SIGMA = 1.0
"""How near to it a layer's median sigma counts as around it."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper and how it fares."""

    name: str
    statement: str
    quantity: str
    """What is held to the bound."""
    value: Estimate
    rule: str
    verdict: str
    evidence: str
    """More numbers, in words."""


def claims(run: ObservedRun) -> list[Claim]:
    """Hold a run to every claim that it has numbers for."""
    return [
        _alike(run),
        _local(run),
        _values(run),
        _by_head(run),
        _independent(run),
        *(_sigma(run, rule) for rule in RULES),
        *_flat(run),
    ]


def _alike(run: ObservedRun) -> Claim:
    epsilon = run.measured["epsilon"]
    near, drawn = run.average(run.cosine("keys")[..., 0])
    share = _part(near, drawn, lambda heads: heads >= epsilon)
    distance = run.measured["distances"][0]
    return _held(
        "similar_keys",
        "Keys of neighbouring tokens are similar in every layer and head",
        f"KV heads whose mean cosine of keys {distance} token apart is {epsilon:g} or more",
        share,
        MOST_HEADS,
        "at least",
        f"mean cosine by head {near.min():.2f} to {near.max():.2f}, median {np.median(near):.2f}",
    )


def _local(run: ObservedRun) -> Claim:
    cosine = run.cosine("keys")
    far = run.reached[-1] if run.reached else 0
    mean, drawn = run.average(cosine[..., [0, far]])
    share = _part(mean, drawn, lambda heads: heads[..., 0] > heads[..., 1])
    over_heads = run.mean(cosine.mean(axis=(1, 2)))
    distances = run.measured["distances"]
    shown = [i for i, distance in enumerate(distances) if distance in (1, 8, 64) or i == far]
    course = ", ".join(f"{over_heads[i]:.2f} at {distances[i]}" for i in shown)
    still = float((mean[..., 1] >= run.measured["epsilon"]).mean())
    return _held(
        "local",
        "The likeness of keys is local",
        f"KV heads whose keys are more alike {distances[0]} than {distances[far]} tokens apart",
        share,
        MOST_HEADS,
        "at least",
        f"mean cosine {course}; at the last {100 * still:.0f}% of the heads are still at "
        f"{run.measured['epsilon']:g} or more",
    )


def _values(run: ObservedRun) -> Claim:
    epsilon = run.measured["epsilon"]
    near, drawn = run.average(run.cosine("values")[..., 0])
    keys = run.mean(run.cosine("keys")[..., 0])
    share = _part(near, drawn, lambda heads: heads >= epsilon)
    return _held(
        "values",
        "Values of neighbouring tokens are not similar",
        f"KV heads whose mean cosine of values {run.measured['distances'][0]} token apart is "
        f"{epsilon:g} or more",
        share,
        1 - MOST_HEADS,
        "at most",
        f"mean cosine {near.mean():.2f} of values, {keys.mean():.2f} of keys",
    )


def _by_head(run: ObservedRun) -> Claim:
    at = run.at_epsilon
    ratio = run.ratio[..., at]
    shown = [f"{each.name} {_percent(each.share)}" for each in decompose(ratio, run.task_of)]
    return _held(
        "ratio_of_the_model",
        f"Layer and head decide the ratio at {run.measured['thresholds'][at]:g}, not the data",
        "variance of the ratio that tasks account for, alone or by layer or head",
        share_of(ratio, run.task_of, OF_TASK) or _unknown(),
        OF_DATA,
        "at most",
        f"of the variance: {', '.join(shown)}" if shown else "one sample has no variance",
    )


def _independent(run: ObservedRun) -> Claim:
    at = run.at_epsilon
    found = {task: run.average(run.ratio[..., at].mean(axis=(1, 2)), [task]) for task in run.tasks}
    means = {task: float(mean) for task, (mean, _) in found.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)

    def spread(ratios: Array) -> Array:
        """Return the largest minus the smallest of the tasks (the first axis), over their mean."""
        relative: Array = (ratios.max(axis=0) - ratios.min(axis=0)) / ratios.mean(axis=0)
        return relative

    value = _unknown()
    if len(means) > 1:
        is_drawn = all(len(drawn) for _, drawn in found.values())
        drawn = np.stack([drawn for _, drawn in found.values()]) if is_drawn else np.empty((2, 0))
        value = Scored(float(spread(np.array(list(means.values())))), spread(drawn)).estimate()
    return _held(
        "ratio_independent_of_data",
        f"The ratio at {run.measured['thresholds'][at]:g} is the same whatever the data",
        "the tasks' largest mean ratio minus the smallest, over their mean",
        value,
        SAME,
        "at most",
        f"mean ratio {means[low]:.3f} ({low}) to {means[high]:.3f} ({high})"
        if len(means) > 1
        else f"mean ratio {means[low]:.3f}; one task cannot tell",
    )


def _sigma(run: ObservedRun, rule: str) -> Claim:
    median, drawn = run.average(run.sigma(rule)[..., 1])
    known = ~np.isnan(median)
    share = (
        _part(median[known], drawn[:, known], lambda each: np.abs(each - SIGMA) <= NEAR_SIGMA)
        if known.any()
        else _unknown()
    )
    evidence = (
        f"median sigma by layer {median[known].min():.2f} to {median[known].max():.2f}, "
        f"median {np.median(median[known]):.2f}"
        if known.any()
        else "nothing is merged"
    )
    return _held(
        f"sigma_{rule}",
        f"The computed sigma ({rule}) is around {SIGMA:g} in most layers",
        f"layers whose median sigma is within {NEAR_SIGMA:g} of {SIGMA:g}",
        share,
        0.5,
        "at least",
        evidence,
    )


def _flat(run: ObservedRun) -> list[Claim]:
    """Compare the attention of the first two layers, and of the last, with the layers between."""
    by_layer = run.flatness.mean(axis=-1)
    count = by_layer.shape[1]
    if count < 4:
        return []
    between = by_layer[:, 2:-1].mean(axis=1)
    ends = {"first two layers": by_layer[:, :2].mean(axis=1), "last layer": by_layer[:, -1]}
    return [
        _held(
            f"flat_{name.split()[0]}",
            f"Attention is flat in the {name}",
            f"entropy over its largest, {name} minus those between",
            run.estimate(end - between),
            0.0,
            "at least",
            f"{run.estimate(end).value:.3f} there, {run.estimate(between).value:.3f} between",
        )
        for name, end in ends.items()
    ]


def _part(mean: Array, drawn: Array, holds: Callable[[Array], NDArray[np.bool_]]) -> Estimate:
    """Return the part of heads or layers for which something holds, in the means and each replicate."""
    parts = np.array([holds(each).mean() for each in drawn])
    return Scored(float(holds(mean).mean()), parts).estimate()


def _unknown() -> Estimate:
    return Estimate(np.nan, np.nan, np.nan)


def _held(
    name: str,
    statement: str,
    quantity: str,
    value: Estimate,
    bound: float,
    side: str,
    evidence: str,
) -> Claim:
    """Judge an estimate by a bound that it must be `at least` or `at most`."""
    above, below = value.low >= bound, value.high <= bound
    supported, refuted = (above, below) if side == "at least" else (below, above)
    verdict = UNDECIDED if supported == refuted else SUPPORTED if supported else REFUTED
    return Claim(name, statement, quantity, value, f"{side} {bound:g}", verdict, evidence)


def _percent(share: Estimate) -> str:
    if np.isnan(share.value):
        return "unknown"
    interval = "" if np.isnan(share.low) else f" [{100 * share.low:.1f}, {100 * share.high:.1f}]"
    return f"{100 * share.value:.1f}%{interval}"
