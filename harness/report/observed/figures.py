"""The figures of a run that observes, after those of KVMerger's paper (its Figures 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.metric import Array
from harness.report.observed.claims import SIGMA
from harness.report.observed.run import ObservedRun
from harness.report.observed.tables import estimates, size_labels
from harness.report.observed.variance import decompose
from harness.report.plots.style import COLOURS, INK, MARKERS, STYLE, Plot, render
from harness.report.words import INTERVAL
from kvmerge.observations import RULES

_WORDS = {"keys": "keys, after RoPE", "keys_before_rope": "keys, before RoPE", "values": "values"}
_SPREAD = (10, 90)
"""Percentiles over layers and heads that a band shows."""


def draw_observed(run: ObservedRun) -> list[Plot]:
    """Draw every figure that the run has numbers for."""
    with mpl.rc_context(STYLE):
        drawn = [
            cosine_maps(run),
            cosine_by_distance(run),
            ratio_by_layer(run),
            ratio_variance(run),
            sets_by_layer(run),
            entropy_by_layer(run),
        ]
    return [plot for plot in drawn if plot is not None]


def cosine_maps(run: ObservedRun) -> Plot | None:
    """Draw the cosines between all keys of one sample: a row a layer, a column a KV head."""
    if run.maps is None:
        return None
    maps, layers, heads = run.maps["maps"], run.maps["layers"], run.maps["heads"]
    tokens, block = int(run.maps["tokens"]), int(run.maps["block"])
    title = "Cosine similarity of keys after RoPE, token by token"
    figure = Figure((2.0 * len(heads) + 1.4, 1.9 * len(layers) + 1.0), layout="constrained")
    axes = figure.subplots(len(layers), len(heads), squeeze=False, sharex=True, sharey=True)
    for (row, column), axis in np.ndenumerate(axes):
        image = axis.imshow(
            maps[row, column].astype(np.float32),
            cmap="viridis",
            vmin=0,
            vmax=1,
            extent=(0, tokens, tokens, 0),
            interpolation="nearest",
        )
        axis.grid(visible=False)
        axis.set_title(f"layer {layers[row]}, head {heads[column]}", loc="left", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=figure.axes, label="cosine", aspect=30)
    of = f"sample {run.maps['sample']} of {tokens:,} tokens"
    averaged = f", each square the mean of {block} x {block} tokens" if block > 1 else ""
    caption = f"Cosines between the keys of all tokens of {of}{averaged}; {run.info['model']}."
    alt = "Maps of the cosine between any two keys of one sample, a row a layer and a column a KV head."
    return render(figure, "cosine_maps", title, caption, alt)


def cosine_by_distance(run: ObservedRun) -> Plot:
    """Draw the mean cosine against the tokens between two states, a line a kind."""
    title = "Cosine similarity by distance"
    figure, (axis,) = _figure(1, (6.4, 4.0))
    distances = [run.measured["distances"][at] for at in run.reached]
    for i, kind in enumerate(run.kinds):
        mean = run.mean(run.cosine(kind)[..., run.reached])
        by_head = mean.reshape(-1, mean.shape[-1])
        axis.plot(
            distances,
            by_head.mean(axis=0),
            color=COLOURS[i],
            marker=MARKERS[i],
            markersize=4,
            label=_WORDS[kind],
        )
        low, high = np.percentile(by_head, _SPREAD, axis=0)
        axis.fill_between(distances, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("distance, tokens")
    axis.set_ylabel("mean cosine")
    _below(axis, 3)
    caption = (
        "Mean cosine of two states by the tokens between them, over layers and KV heads; bands: "
        f"{_SPREAD[0]}th to {_SPREAD[1]}th percentile of heads. {run.setting()}."
    )
    alt = "Lines of the mean cosine, one a kind of state, over the tokens between two states."
    return render(figure, "cosine_by_distance", title, caption, alt)


def ratio_by_layer(run: ObservedRun) -> Plot:
    """Draw the compression ratio by layer: for every threshold, and for every task at one of them."""
    title = "Compression ratio by layer"
    figure, (left, right) = _figure(2, (9.5, 4.2))
    by_layer = run.ratio.mean(axis=2)
    thresholds = run.measured["thresholds"]
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(thresholds)))
    mean = run.mean(by_layer)
    for at, threshold in enumerate(thresholds):
        left.plot(run.layers, mean[:, at], color=shades[at], label=f"{threshold:g}", linewidth=1.4)
    left.set_title("by threshold, mean over tasks", loc="left")
    _below(left, 4)
    at = run.at_epsilon
    for i, task in enumerate(run.tasks):
        shown = estimates(run, by_layer[..., at], [task])
        style = {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        }
        _line(right, run.layers, shown, label=task, **style)
    right.set_title(f"by task, threshold {thresholds[at]:g}", loc="left")
    _below(right, 3)
    for axis in (left, right):
        axis.set_ylim(0, 1)
        axis.set_xlabel("layer")
        axis.set_ylabel("sets left, of the prompt's tokens")
    caption = (
        "Sets that a threshold leaves, as a share of the prompt's tokens, mean over KV heads. Bands: "
        f"{INTERVAL}. {run.setting()}."
    )
    alt = "Lines of the share of sets left over layers: left one a threshold, right one a task."
    return render(figure, "ratio_by_layer", title, caption, alt)


def ratio_variance(run: ObservedRun) -> Plot | None:
    """Draw what the variance of the compression ratio is due to, a bar a threshold."""
    thresholds = run.measured["thresholds"]
    found = [decompose(run.ratio[..., at], run.task_of) for at in range(len(thresholds))]
    if not found[0]:
        return None
    title = "What the compression ratio's variance is due to"
    figure, (axis,) = _figure(1, (7.2, 3.8))
    begin = np.zeros(len(thresholds))
    shades = [*COLOURS, "#999999", "#dddddd"]
    for i, component in enumerate(found[0]):
        shares = np.nan_to_num([each[i].share.value for each in found])
        axis.barh(
            np.arange(len(thresholds)),
            shares,
            left=begin,
            color=shades[i],
            label=component.name,
            height=0.75,
            edgecolor="white",
            linewidth=0.5,
        )
        begin += shares
    axis.set_yticks(range(len(thresholds)), [f"{threshold:g}" for threshold in thresholds])
    axis.grid(axis="x")
    axis.grid(visible=False, axis="y")
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the variance over layers, heads, tasks and samples")
    axis.set_ylabel("threshold")
    _below(axis, 4)
    caption = (
        "Random-effects components of the compression ratio's variance, by threshold (intervals are in "
        f"tables/variance.csv). {run.setting()}."
    )
    alt = "Stacked bars, one a threshold: the variance due to layers, heads, tasks and samples."
    return render(figure, "ratio_variance", title, caption, alt)


def sets_by_layer(run: ObservedRun) -> Plot:
    """Draw the sizes of sets by layer, and beside them the sigma that each rule gives."""
    epsilon = run.measured["epsilon"]
    title = f"Merging sets at a threshold of {epsilon:g}"
    figure, (left, right) = _figure(2, (9.5, 4.2))
    sizes = run.mean(run.sizes)
    begin = np.zeros(len(run.layers))
    shades = mpl.colormaps["viridis_r"](np.linspace(0.05, 1, sizes.shape[1]))
    for i, label in enumerate(size_labels()):
        left.bar(run.layers, sizes[:, i], bottom=begin, color=shades[i], width=0.9, label=label)
        begin += sizes[:, i]
    left.set_ylim(0, 1)
    left.set_xlabel("layer")
    left.set_ylabel("sets")
    left.set_title("sets by tokens", loc="left")
    _below(left, 4)
    for i, rule in enumerate(RULES):
        low, middle, high = run.mean(run.sigma(rule)).T
        right.plot(run.layers, middle, color=COLOURS[i], marker=MARKERS[i], markersize=4, label=rule)
        right.fill_between(run.layers, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
    right.axhline(SIGMA, color=INK, linewidth=1, linestyle=(0, (5, 2)), label=f"the paper's {SIGMA:g}")
    right.set_ylim(bottom=0)
    right.set_xlabel("layer")
    right.set_ylabel("sigma")
    right.set_title("sigma by rule, median and quartiles of sets", loc="left")
    _below(right, 2)
    caption = (
        "Left: sets by their number of tokens. Right: the sigma that each rule gives a set of two or "
        f"more tokens, median and quartiles. {run.setting()}."
    )
    alt = "Left: stacked bars of sets by their tokens, one a layer. Right: lines of sigma over layers."
    return render(figure, "sets_by_layer", title, caption, alt)


def entropy_by_layer(run: ObservedRun) -> Plot:
    """Draw the entropy of attention by layer, as a share of the largest that there could be."""
    title = "Entropy of attention by layer"
    figure, (axis,) = _figure(1, (6.4, 3.8))
    _line(axis, run.layers, estimates(run, run.flatness.mean(axis=2)), "mean", COLOURS[0], "o")
    by_head = run.mean(run.flatness)
    for head in range(by_head.shape[1]):
        axis.plot(run.layers, by_head[:, head], ".", color="#999999", markersize=3, zorder=1)
    axis.plot([], [], ".", color="#999999", markersize=3, label="each query head")
    axis.set_ylim(0, 1)
    axis.set_xlabel("layer")
    axis.set_ylabel("entropy / log of the tokens seen")
    _below(axis, 2)
    caption = (
        "Entropy of attention over its largest, the log of the tokens that a row sees (1: flat), mean "
        f"over rows. Band: {INTERVAL}. {run.setting()}."
    )
    alt = "A line of the mean entropy over layers, with a dot for each query head."
    return render(figure, "entropy_by_layer", title, caption, alt)


def _line(axis: Axes, layers: Sequence[int], shown: Array, label: str, color: str, marker: str) -> None:
    """Draw estimates by layer, with their intervals as a band."""
    values, low, high = ([getattr(each, name) for each in shown] for name in ("value", "low", "high"))
    axis.plot(layers, values, color=color, marker=marker, markersize=3, linewidth=1.1, label=label)
    axis.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)


def _below(axis: Axes, columns: int) -> None:
    """Put a panel's legend under it."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=7.5)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(size, layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])
