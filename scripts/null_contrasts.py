"""Show that contrasts are calibrated: how often they err on methods that do not differ.

    python -m scripts.null_contrasts
    python -m scripts.null_contrasts --tables 100 --shift 8

Tables are simulated in the shape of ours: 7 to 9 tasks of n samples, a full cache and three methods at
one budget, scores from 0 to 1 with mass at both ends, alike between cells as answers to one prompt are.
Shown are the family-wise error rate of both families (the share of tables with any verdict of better),
with its binomial interval, and how many 95% intervals hold the true difference. `--shift` plants a
difference, to see that it is found.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import binomtest, norm
from tqdm import tqdm

from benchmarks.metric import Array
from benchmarks.metrics import find_metric
from harness.report.bootstrap import Samples, Scored, score_task
from harness.report.contrasts import AVERAGE, LEVEL, Contrast, Line, Term, compared
from harness.report.export.markdown import markdown_table

TABLES = 1_000
SIZES = (20, 50, 100, 200)
"""Samples of a task; tables take them in turn."""
CELLS = ("kvmerger@0.5", "h2o@0.5", "cam@0.5", "full@1")
EXCHANGES = 1_999
"""Fewer than a report's: the test is as valid, and a little less powerful."""
RESAMPLES = 1_000
_HEADER = (
    *("n", "tables", "any better, average", "any better, tasks"),
    *("coverage, average", "coverage, tasks"),
)


@dataclass(frozen=True)
class Simulated:
    """The contrasts of one table, in the two families that a report has."""

    n: int
    average: Sequence[Contrast]
    by_task: Sequence[Contrast]


def scores(generator: np.random.Generator, n: int, cells: int, shift: float = 0.0) -> Array:
    """Draw one task's scores, `(cells, n)`, 0 to 1, from one distribution for all cells.

    A part of the samples has 0, another 1, the rest lies between (one task in three has none between).
    The cells' ranks have a correlation of 0.6 to 0.95 over samples.

    Args:
        generator: what draws.
        n: samples.
        cells: cells.
        shift: points by which the first cell's expected score is lowered: so many of its samples in a
            hundred that are not 0 are set to it, as far as the score goes.
    """
    zero = generator.uniform(0.2, 0.6)
    one = 1 - zero if generator.random() < 1 / 3 else generator.uniform(0.1, 0.9 - zero)
    alike = generator.uniform(0.6, 0.95)
    shared, own = generator.normal(size=n), generator.normal(size=(cells, n))
    rank = norm.cdf(np.sqrt(alike) * shared + np.sqrt(1 - alike) * own)
    between = max(1 - zero - one, 1e-9)
    drawn = np.clip((rank - zero) / between, 0, 1)
    expected = one + between / 2
    drawn[0, generator.random(n) < shift / 100 / expected] = 0
    return np.asarray(drawn)


def tables(
    count: int, shift: float = 0.0, seed: int = 0, sizes: Sequence[int] = SIZES
) -> Iterator[Simulated]:
    """Simulate tables, of samples as many as `sizes` says in turn, and compare as a report does."""
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        yield _table(generator, sizes[number % len(sizes)], shift)


def _table(generator: np.random.Generator, n: int, shift: float) -> Simulated:
    metric = find_metric("qa_f1")
    ids = tuple(f"{sample:03d}" for sample in range(n))
    drawn: list[dict[str, tuple[Samples, Scored]]] = []
    salt = generator.integers(2**32)  # the bootstrap's own draws are seeded by name
    for task in range(generator.integers(7, 10)):
        parts = scores(generator, n, len(CELLS), shift)[..., None]
        samples = [Samples(ids, one) for one in parts]
        name = f"{salt}-{task}"
        drawn.append(
            {
                cell: (one, score_task(name, one, metric, RESAMPLES))
                for cell, one in zip(CELLS, samples, strict=True)
            }
        )

    def term(task: int, a: str, b: str) -> Term:
        (first, of_first), (second, of_second) = drawn[task][a], drawn[task][b]
        return Term(f"{salt}-{task}", metric, first, second, (of_first, of_second))

    pairs = list(combinations(CELLS, 2))
    tasks = range(len(drawn))
    average = [Line(AVERAGE, a, b, tuple(term(task, a, b) for task in tasks)) for a, b in pairs]
    by_task = [Line(str(task), a, b, (term(task, a, b),)) for task in tasks for a, b in pairs]
    return Simulated(n, compared(average, EXCHANGES), compared(by_task, EXCHANGES))


def any_better(family: Sequence[Contrast]) -> bool:
    """Return whether a family calls any cell better."""
    return any(contrast.p_adjusted < LEVEL for contrast in family)


def covers(contrast: Contrast) -> bool:
    """Return whether the 95% interval holds 0."""
    low, high = contrast.interval
    return low <= 0 <= high


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.null_contrasts", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tables", type=int, default=TABLES, help=f"default: {TABLES:,}")
    parser.add_argument("--shift", type=float, default=0.0, help="points that one method is worse by")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.tables < 1 or not 0 <= arguments.shift <= 10:
        parser.error("--tables must be 1 or more, and --shift from 0 to 10 points")
    simulated = list(
        tqdm(
            tables(arguments.tables, arguments.shift, arguments.seed),
            total=arguments.tables,
            unit="table",
        )
    )
    print("\n".join(_report(simulated)))


def _report(simulated: Sequence[Simulated]) -> Iterator[str]:
    yield (
        f"{len(simulated):,} tables of {len(CELLS)} cells; {EXCHANGES:,} exchanges, {RESAMPLES:,} "
        "resamples. In brackets: 95% Clopper-Pearson interval."
    )
    rows = []
    for n in (*SIZES, None):
        chosen = [one for one in simulated if n in (None, one.n)]
        if chosen:
            rows.append(
                (
                    str(n or "all"),
                    f"{len(chosen):,}",
                    _share([any_better(one.average) for one in chosen]),
                    _share([any_better(one.by_task) for one in chosen]),
                    f"{np.mean([covers(c) for one in chosen for c in one.average]):.1%}",
                    f"{np.mean([covers(c) for one in chosen for c in one.by_task]):.1%}",
                )
            )
    yield markdown_table(_HEADER, rows, numeric=range(len(_HEADER)))


def _share(hits: Sequence[bool]) -> str:
    bounds = binomtest(sum(hits), len(hits)).proportion_ci(0.95)
    return f"{np.mean(hits):.1%} [{bounds.low:.1%}, {bounds.high:.1%}]"


if __name__ == "__main__":
    main()
