"""Exchanges whose signs are summed once a cell, against those that take each contrast by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.metrics import find_metric
from harness.report.bootstrap import Samples, Scored, score_cells, score_task
from harness.report.exchanges import Term, exchanged

LINEAR = find_metric("qa_f1")
OF_ANY_KIND = replace(LINEAR, name="other", score=lambda means: 100 * means[..., 0])
SCORED = (Scored(0.0, np.empty(0)),) * 2


def cells(task: str, count: int, contexts: int | None = None) -> list[Samples]:
    rng = np.random.default_rng(len(task))
    ids = tuple(f"{task}{i:02d}" for i in range(12))
    shared = tuple(str(i % contexts) for i in range(12)) if contexts else ()
    return [Samples(ids, rng.random((12, 1)).round(2), shared) for _ in range(count)]


def test_linear_scores_have_the_p_values_that_any_metric_would_have() -> None:
    assert LINEAR.is_linear
    assert not OF_ANY_KIND.is_linear
    tasks = {"t": cells("t", 3), "uu": cells("uu", 3, contexts=9)}
    found = []
    for metric in (LINEAR, OF_ANY_KIND):
        lines = [
            [Term(task, metric, of[a], of[b], SCORED) for task, of in tasks.items()]
            for a, b in ((0, 1), (0, 2), (1, 2))
        ]
        mixed = [lines[0], [replace(term, metric=LINEAR) for term in lines[1]], lines[2]]
        found += [exchanged(lines, 999), exchanged(mixed, 999)]
    assert all(p_values == found[0] for p_values in found)
    assert len(set(found[0])) == 3


def test_cells_scored_together_are_scored_as_each_by_itself() -> None:
    one, other, third = cells("t", 3)
    few = third.only(third.ids[:5])
    together = score_cells("t", {"a": one, "b": few, "c": other}, LINEAR, 700)
    assert list(together) == ["a", "b", "c"]
    for samples, scored in zip((one, few, other), together.values(), strict=True):
        alone = score_task("t", samples, LINEAR, 700)
        assert scored.value == alone.value
        np.testing.assert_allclose(scored.replicates, alone.replicates, rtol=1e-13)
