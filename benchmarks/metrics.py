"""All metrics, by the names that tasks, settings and results give them."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import perplexity
from benchmarks.longbench import metrics as longbench
from benchmarks.metric import UNSCORED, Metric
from benchmarks.needle import metrics as needle
from benchmarks.zero_scrolls import metrics as zero_scrolls
from kvmerge.errors import unknown

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
    """Return the metric called `name`.

    Raises:
        UserError: listing the metrics, if there is none.
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]
