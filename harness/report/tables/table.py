"""A table as plain text and as numbers, and how a number is written in one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from harness.report.bootstrap import Estimate, Scored
from harness.report.contrasts import Contrast
from harness.report.missed import marked, missed_budgets
from harness.report.ranks import Mark
from harness.report.run import Run
from kvmerge.names import parse_name

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?( to \d+|\n.*)?$")


@dataclass(frozen=True)
class Table:
    """One table: texts for people, and the same numbers unrounded for programs.

    A newline in a text separates a number from its interval.
    """

    name: str
    """File name without ending."""
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    data: pd.DataFrame
    subject: str = ""
    """What was measured, as `smollm2-135m on mini`; empty in a table of several runs."""
    cells: tuple[int, ...] = ()
    """Columns that are a cell each, named by their header."""
    naming: tuple[int, ...] = ()
    """Columns whose texts name cells, or are blank."""
    averages: tuple[int, ...] = ()
    """Rows that average others."""
    brackets: str = ""
    """The sentence of the caption that says what stands in the brackets of cells."""
    marks: Mapping[tuple[int, int], Mark] = field(default_factory=dict)
    """By row and column: numbers that are best or second (`harness.report.ranks`)."""
    missed: Mapping[str, str] = field(default_factory=dict)
    """Cells that did not keep what their name says, and what they kept (`harness.report.missed`)."""

    @cached_property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column holds numbers, to be aligned right; blank cells do not count."""
        filled = ([text for text in column if text] for column in zip(*self.rows, strict=True))
        return tuple(all(map(_NUMBER.match, column)) for column in filled) or (True,) * len(self.header)

    def as_read(self) -> Table:
        """Return the table as it is read on a screen: averages first, and missed budgets told.

        A cell that missed its budget says so wherever its name stands.
        """
        others = (row for row in range(len(self.rows)) if row not in self.averages)
        order = [*self.averages, *others]
        header = [
            marked(text, self.missed) if column in self.cells else text
            for column, text in enumerate(self.header)
        ]
        rows = [
            tuple(
                marked(text, self.missed) if column in self.naming else text
                for column, text in enumerate(self.rows[row])
            )
            for row in order
        ]
        return replace(
            self,
            header=tuple(header),
            rows=tuple(rows),
            averages=tuple(range(len(self.averages))),
            marks={(order.index(row), column): mark for (row, column), mark in self.marks.items()},
            missed={},
        )

    def of(self, run: Run) -> Table:
        """Return the table with the run's missed budgets, to stand beside the names of cells."""
        return replace(self, missed=missed_budgets(run))


def score_text(scored: Scored | Contrast | None, sign: str = "") -> str:
    """Return a score to two decimals with its interval below it; empty where there is none."""
    return estimate_text(None if scored is None else scored.estimate(), sign)


def estimate_text(shown: Estimate | None, sign: str = "") -> str:
    """Return an estimate as `score_text` does a score."""
    if shown is None or np.isnan(shown.value):
        return ""
    text = f"{shown.value:{sign}.2f}"
    return text if np.isnan(shown.low) else f"{text}\n[{shown.low:.2f}, {shown.high:.2f}]"


def number(value: float, form: str) -> str:
    """Return a formatted number; empty for NaN."""
    return "" if np.isnan(value) else format(value, form)


def tidy(run: Run, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Return rows as a frame, each with the model and the benchmark first."""
    known = ["model", "benchmark", *columns]
    named = ({"model": run.model, "benchmark": run.benchmark} | dict(row) for row in rows)
    return pd.DataFrame(named, columns=known)


def score_row(cell: str, task: str, scored: Scored, n: int | None = None) -> dict[str, Any]:
    """Return the numbers of one score as a row of a tidy table."""
    name = parse_name(cell)
    method, budget = name.variant, str(name.budget)
    shown = scored.estimate()
    return {
        "method": method,
        "budget": budget,
        "task": task,
        "n": n,
        "score": shown.value,
        "ci_low": shown.low,
        "ci_high": shown.high,
    }
