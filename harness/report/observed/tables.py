"""The numbers of a run that observes as tidy tables: a line a number, unrounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.metric import Array
from harness.report.bootstrap import Estimate, Scored
from harness.report.observed.claims import Claim
from harness.report.observed.run import ObservedRun
from harness.report.observed.variance import decompose
from kvmerge.observations import QUARTILES, RULES, SIZES

ALL = "all"
"""In place of a task: the mean over tasks."""


def all_tables(run: ObservedRun, judged: Sequence[Claim]) -> dict[str, pd.DataFrame]:
    """Return every table by its name; 95% intervals as `low` and `high`, empty where unknown."""
    return {
        "claims": claims_table(judged),
        "cosine": cosine_table(run),
        "cosine_by_head": cosine_by_head(run),
        "ratio": ratio_table(run),
        "variance": variance_table(run),
        "sets": sets_table(run),
        "entropy": entropy_table(run),
        "samples": samples_table(run),
    }


def claims_table(judged: Sequence[Claim]) -> pd.DataFrame:
    """Return a line a claim: what was held to what, and the verdict."""
    rows = [
        (
            claim.name,
            claim.statement,
            claim.verdict,
            claim.quantity,
            *_interval(claim.value),
            claim.rule,
            claim.evidence,
        )
        for claim in judged
    ]
    columns = ["claim", "statement", "verdict", "quantity", "value", "low", "high", "rule", "evidence"]
    return pd.DataFrame(rows, columns=columns)


def cosine_table(run: ObservedRun) -> pd.DataFrame:
    """Return the mean cosine over layers and heads, by kind and distance."""
    rows = [
        (kind, distance, *_interval(shown))
        for kind in run.kinds
        for distance, shown in zip(
            run.measured["distances"], estimates(run, run.cosine(kind).mean(axis=(1, 2))), strict=True
        )
    ]
    return pd.DataFrame(rows, columns=["states", "distance", "cosine", "low", "high"])


def cosine_by_head(run: ObservedRun) -> pd.DataFrame:
    """Return the mean cosine by kind, layer, KV head and distance."""
    rows = []
    for kind in run.kinds:
        for (place, head, at), value in np.ndenumerate(run.mean(run.cosine(kind))):
            rows.append((kind, run.layers[place], head, run.measured["distances"][at], value))
    return pd.DataFrame(rows, columns=["states", "layer", "kv_head", "distance", "cosine"])


def ratio_table(run: ObservedRun) -> pd.DataFrame:
    """Return the compression ratio by task, layer and threshold, the mean over KV heads."""
    rows = []
    by_layer = run.ratio.mean(axis=2)
    for task in [ALL, *run.tasks]:
        found = estimates(run, by_layer, None if task == ALL else [task])
        for (place, at), shown in np.ndenumerate(found):
            threshold = run.measured["thresholds"][at]
            rows.append((task, run.layers[place], threshold, *_interval(shown)))
    return pd.DataFrame(rows, columns=["task", "layer", "threshold", "ratio", "low", "high"])


def variance_table(run: ObservedRun) -> pd.DataFrame:
    """Return the components of the compression ratio's variance, by threshold."""
    rows = [
        (threshold, each.name, each.variance, *_interval(each.share))
        for at, threshold in enumerate(run.measured["thresholds"])
        for each in decompose(run.ratio[..., at], run.task_of)
    ]
    columns = ["threshold", "component", "variance", "share", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def sets_table(run: ObservedRun) -> pd.DataFrame:
    """Return by layer each class's part of the sets, and quartiles of distances and sigmas."""
    rows = []
    for name, values, labels in [
        ("size", run.sizes, size_labels()),
        ("distance", run.distance, QUARTILES),
        *((f"sigma_{rule}", run.sigma(rule), QUARTILES) for rule in RULES),
    ]:
        for (place, at), shown in np.ndenumerate(estimates(run, values)):
            rows.append((run.layers[place], name, labels[at], *_interval(shown)))
    return pd.DataFrame(rows, columns=["layer", "of", "class_or_quantile", "value", "low", "high"])


def entropy_table(run: ObservedRun) -> pd.DataFrame:
    """Return the entropy of attention by layer and query head, in nats and over its largest."""
    nats, flatness = run.mean(run.entropy), run.mean(run.flatness)
    rows = [
        (run.layers[place], head, value, flatness[place, head])
        for (place, head), value in np.ndenumerate(nats)
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "entropy", "flatness"])


def samples_table(run: ObservedRun) -> pd.DataFrame:
    """Return the mean compression ratio of each sample, by threshold."""
    rows = [
        (task, each.id, each.prompt_tokens, threshold, float(ratio[..., at].mean()))
        for task, each, ratio in zip(run.task_of, run.samples, run.ratio, strict=True)
        for at, threshold in enumerate(run.measured["thresholds"])
    ]
    return pd.DataFrame(rows, columns=["task", "id", "prompt_tokens", "threshold", "ratio"])


def size_labels() -> list[str]:
    """Return the names of the classes of set sizes: `1`, `2`, `3-4`, … and `65+`."""
    bounds = [0, *SIZES]
    labels = [
        str(high) if high == low + 1 else f"{low + 1}-{high}"
        for low, high in zip(bounds, SIZES, strict=False)
    ]
    return [*labels, f"{SIZES[-1] + 1}+"]


def estimates(run: ObservedRun, values: Array, tasks: Sequence[str] | None = None) -> Any:
    """Return the average of each number of `(samples, ...)` and its interval, as `Estimate`s."""
    mean, drawn = run.average(values, tasks)
    found = np.empty(mean.shape, dtype=object)
    for place, value in np.ndenumerate(mean):
        found[place] = Scored(float(value), drawn[(slice(None), *place)]).estimate()
    return found


def _interval(shown: Estimate) -> tuple[float, float, float]:
    return shown.value, shown.low, shown.high
