"""All metrics, by the names that tasks, settings and results give them.

A name is what a report finds a metric by, so one from outside the project is called as it is found: by
its entry point under `kvmerge.metrics`, or by its module and object, `my_metrics.FIRST_WORD`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

from benchmarks import perplexity
from benchmarks.longbench import metrics as longbench
from benchmarks.metric import UNSCORED, Metric
from benchmarks.needle import metrics as needle
from benchmarks.zero_scrolls import metrics as zero_scrolls
from kvmerge.errors import UserError, unknown
from kvmerge.places import choices, find, in_two_places, is_dotted, target_of, where
from kvmerge.resolve import load_object

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        *longbench.METRICS,
        *zero_scrolls.METRICS,
        *needle.METRICS,
        perplexity.PERPLEXITY,
        UNSCORED,
    )
}


def find_metric(name: str) -> Metric:
    """Return the metric called `name`: of the project, announced by a package, or by its dotted name.

    Raises:
        UserError: listing the metrics, if there is none; if it is in two places, or cannot be loaded.
    """
    place = _place(name)
    if place is None:
        return METRICS[name]
    found = load_object("metric", name, place, METRICS)
    if not isinstance(found, Metric):
        raise UserError(f"metric {name!r}: {target_of(place)} is no benchmarks.metric.Metric.")
    return replace(found, name=name)


def metric_module(name: str) -> str | None:
    """Return the module of a metric that is not the project's own. Raises as `find_metric` does."""
    place = _place(name)
    return None if place is None else target_of(place).rpartition(".")[0]


def check_found(metric: Metric) -> None:
    """Refuse a metric that a report could not find by its name, once the run is done.

    Raises:
        UserError: if it is not the metric of that name.
    """
    try:
        found = find_metric(metric.name)
    except UserError as error:
        raise UserError(f"{error} Name a metric of your own as it is found: {_FORMS}.") from error
    if found != metric:
        raise UserError(f"another metric is called {metric.name!r}. Name your own {_FORMS}.")


_FORMS = "by its module and object, e.g. 'my_metrics.FIRST_WORD', or as its entry point"


def _place(name: str) -> EntryPoint | str | None:
    """Return where a metric is found; None for the project's own."""
    announced = choices("metric")
    if name in METRICS:
        if name in announced:
            raise in_two_places(f"metric {name}", "benchmarks.metrics", where(find("metric", name)))
        return None
    if name not in announced and not is_dotted(name):
        raise unknown("metric", name, {*METRICS, *announced})
    place = find("metric", name)
    if isinstance(place, Path):
        raise UserError(f"metric {name!r}: {place} is a file, and a metric is an object of a module.")
    return place
