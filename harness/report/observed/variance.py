"""How much of a quantity's variance is due to layer, head, task and sample.

Every sample is measured in every head, so the samples (in their tasks) cross the heads (in their
layers):

    y = mu + layer + head + task + sample + layer x task + layer x sample + head x task + residual

with heads nested in layers and samples in tasks, and the residual that of a head and a sample. All
effects are taken as random, and their variances are estimated by equating mean squares with their
expectations (Searle, Casella and McCulloch, Variance Components, 1992, chapters 4 and 5). Both sides
are nested, so the expectations are the product of two small tables: one of rows (mean, task, sample),
one of columns (mean, layer, head). Tasks may have different numbers of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.metric import Array
from harness.report.bootstrap import Estimate

NAMES = {
    ("mean", "layer"): "layer",
    ("mean", "head"): "head",
    ("task", "mean"): "task",
    ("sample", "mean"): "sample",
    ("task", "layer"): "layer x task",
    ("task", "head"): "head x task",
    ("sample", "layer"): "layer x sample",
    ("sample", "head"): "residual",
}
"""Components by the levels of rows and columns that they vary with."""
OF_TASK = ("task", "layer x task", "head x task")
"""Components that are nil where a quantity is the same whatever the data."""


@dataclass(frozen=True)
class Component:
    """One component of the variance."""

    name: str
    variance: float
    """The estimate, which may be negative where the component is small."""
    share: Estimate
    """Of the sum of all components, negative ones counted as nil."""


def decompose(values: Array, tasks: Sequence[str]) -> list[Component]:
    """Decompose the variance of `values` with an interval for each share.

    The intervals are those of the jackknife over samples (within their tasks, which are taken as they
    are), 1.96 standard errors each way. A percentile bootstrap would not do: a resample repeats
    samples, so that the variance among them shrinks by (n - 1) / n, and the noise of tasks' means is
    taken for differences between tasks.

    Args:
        values: `(samples, layers, heads)`.
        tasks: of each sample.

    Returns:
        a component for each of `NAMES` that the data can tell: with one task there is none of tasks,
        and where no task has two samples, samples and tasks are one (`sample`). Empty for fewer than
        two samples.
    """
    names = np.asarray(tasks)
    if len(names) < 2:
        return []
    variances = components(values, names)
    value, low, high = _jackknifed(values, names, variances)
    return [
        Component(name, variance, Estimate(value[i], low[i], high[i]))
        for i, (name, variance) in enumerate(variances.items())
    ]


def share_of(values: Array, tasks: Sequence[str], wanted: Sequence[str]) -> Estimate | None:
    """Return the share that some components have together; None where none of them can be told."""
    names = np.asarray(tasks)
    found = components(values, names) if len(names) > 1 else {}
    columns = [i for i, name in enumerate(found) if name in wanted]
    if not columns:
        return None
    value, low, high = _jackknifed(values, names, found, columns)
    return Estimate(value[0], low[0], high[0])


def components(values: Array, tasks: Array) -> dict[str, float]:
    """Estimate the variance of each component; arguments as in `decompose`, tasks as an array."""
    row_levels, row_table, row_freedom, by_row = _rows(values, tasks)
    _, layers, heads = values.shape
    column_levels = ["mean"] + ["layer"] * (layers > 1) + ["head"] * (heads > 1)
    column_table = {
        "head": {"head": 1.0},
        "layer": {"head": 1.0, "layer": float(heads)},
        "mean": {"head": 1.0, "layer": float(heads), "mean": float(layers * heads)},
    }
    column_freedom = {"mean": 1, "layer": layers - 1, "head": layers * (heads - 1)}
    squares = np.array(
        [
            [
                _squares(by_row[row], column) / (row_freedom[row] * column_freedom[column])
                for column in column_levels
            ]
            for row in row_levels
        ]
    )
    of_rows = np.array([[row_table[a].get(b, 0.0) for b in row_levels] for a in row_levels])
    of_columns = np.array([[column_table[a].get(b, 0.0) for b in column_levels] for a in column_levels])
    solved = np.linalg.solve(of_columns, np.linalg.solve(of_rows, squares).T).T
    return {
        name: float(solved[row_levels.index(row), column_levels.index(column)])
        for (row, column), name in NAMES.items()
        if row in row_levels and column in column_levels
    }


def _rows(
    values: Array, tasks: Array
) -> tuple[list[str], dict[str, dict[str, float]], dict[str, int], dict[str, Array]]:
    """Split values into the parts of the grand mean, of tasks and of samples.

    Returns:
        the levels that can be told; how often a component of each level (inner name) enters the mean
        square of each (outer name); their degrees of freedom; their parts, like `values`.
    """
    total = len(values)
    grand = np.broadcast_to(values.mean(axis=0), values.shape)
    _, task_of, sizes = np.unique(tasks, return_inverse=True, return_counts=True)
    repeated = bool((sizes > 1).any()) and len(sizes) > 1
    if not repeated:  # one task, or one sample each: samples alone
        table = {"sample": {"sample": 1.0}, "mean": {"sample": 1.0, "mean": float(total)}}
        parts = {"mean": grand, "sample": values - grand}
        return ["mean", "sample"], table, {"mean": 1, "sample": total - 1}, parts
    means = np.stack([values[task_of == index].mean(axis=0) for index in range(len(sizes))])[task_of]
    among = float((sizes**2).sum()) / total
    freedom = {"mean": 1, "task": len(sizes) - 1, "sample": total - len(sizes)}
    table = {
        "sample": {"sample": 1.0},
        "task": {"sample": 1.0, "task": (total - among) / freedom["task"]},
        "mean": {"sample": 1.0, "task": among, "mean": float(total)},
    }
    parts = {"mean": grand, "task": means - grand, "sample": values - means}
    return ["mean", "task", "sample"], table, freedom, parts


def _squares(part: Array, column: str) -> float:
    """Sum the squares of a part's means over columns, or of its layers' or heads' deviations."""
    of_layers = part.mean(axis=2, keepdims=True)
    mean = of_layers.mean(axis=1, keepdims=True)
    shown = {"mean": mean, "layer": of_layers - mean, "head": part - of_layers}[column]
    return float((np.broadcast_to(shown, part.shape) ** 2).sum())


def _jackknifed(
    values: Array, tasks: Array, variances: dict[str, float], together: Sequence[int] | None = None
) -> tuple[Array, Array, Array]:
    """Return shares with their intervals, of each component or of some together."""

    def shares(found: dict[str, float]) -> Array:
        each = np.clip(list(found.values()), 0, None)
        each = each / each.sum() if each.sum() > 0 else np.full(len(each), np.nan)
        return each if together is None else each[list(together)].sum(keepdims=True)

    value = shares(variances)
    squared = np.full(len(value), np.nan)
    for task in np.unique(tasks):
        members = np.flatnonzero(tasks == task)
        if len(members) < 2:
            continue
        left_out = []
        for member in members:
            rest = np.arange(len(values)) != member
            found = components(values[rest], tasks[rest]) if rest.sum() > 1 else {}
            if found.keys() == variances.keys():
                left_out.append(shares(found))
        if len(left_out) == len(members):
            deviations = np.stack(left_out) - np.mean(left_out, axis=0)
            of_task = (len(members) - 1) / len(members) * (deviations**2).sum(axis=0)
            squared = np.nansum([squared, of_task], axis=0)
    reach = 1.96 * np.sqrt(squared)
    return value, np.clip(value - reach, 0, 1), np.clip(value + reach, 0, 1)
