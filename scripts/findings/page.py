"""The tables of docs/findings.md, from results/findings/: no figure is carried over by hand.

A table stands in the page between two comments, `<!-- table NAME -->` and `<!-- end -->`. The name says
which it is: `steps 0.35 after`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from harness.report.contrasts import AVERAGE, LEVEL
from harness.report.divergence import KL
from harness.report.export.markdown import markdown_table
from kvmerge.errors import UserError
from kvmerge.files import write_atomically
from scripts.findings.effects import ALL, INSTEAD_OF_OURS, OWN_SETS, STEPS
from scripts.findings.runs import SETTINGS

MAIN_STEPS = (
    *("values, by key", "keys and values", "values and mass"),
    *("keys besides values", "mass besides values"),
)
_BESIDES = MAIN_STEPS[3:]
OTHER_STEPS = tuple(step for step in STEPS if step not in MAIN_STEPS)
_BUDGETS = ("0.5", "0.35", "0.2", "0.1", "0.05")
_TABLE = re.compile(
    r"(?<=<!-- table )(?P<name>[^\n]+)(?P<mark> -->\n)(?P<rows>.*?)(?=<!-- end -->)", re.S
)


class Findings:
    """What was found, as results/findings/ has it."""

    def __init__(self, folder: Path) -> None:
        """Read it. Raises `UserError` where it is not there."""
        try:
            self.cells, self.effects = (
                pd.read_csv(folder / name, dtype={"budget": str})
                for name in ("cells.csv", "effects.csv")
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename} is not there. Write it first: python -m scripts.findings report."
            ) from error

    def table(self, name: str) -> str:
        """Return a table by its name. Raises `UserError` for one that does not exist."""
        kind, *arguments = name.split()
        try:
            bound = inspect.signature(_TABLES[kind]).bind(self, *arguments)
        except (KeyError, TypeError) as error:
            raise UserError(f"no table {name!r}; there are: {', '.join(_TABLES)}.") from error
        return _TABLES[kind](*bound.args)

    def settings(self, question: str) -> Mapping[str, str]:
        """Return the names of settings by one mode that were run, with what a column calls each.

        Where nothing is asked, the context is what is compressed: that stands beside `after`.
        """
        found = set(self.effects.setting)
        return {
            setting.name: setting.benchmark
            for setting in SETTINGS
            if setting.name in found and question == (setting.question if setting.asks else "after")
        }

    def change(self, setting: str, step: str, keep: str, budget: str) -> str:
        """Return what a step does to the KL, with its interval; empty where it was not run."""
        wanted = {"setting": setting, "step": step, "keep": keep, "budget": budget, "measure": KL}
        found = _where(self.effects, **wanted)
        return "" if found.empty else _shown(found.iloc[0], 2)


def write_page(results: Path, page: Path) -> None:
    """Put the tables that a page names into it. Raises `UserError` for one that does not exist."""
    write_atomically(page, filled(page.read_text(encoding="utf-8"), Findings(results)))


def filled(text: str, findings: Findings) -> str:
    """Return a page with its tables made anew."""
    return _TABLE.sub(
        lambda found: f"{found['name']}{found['mark']}\n{findings.table(found['name'])}\n", text
    )


def _samples(findings: Findings) -> str:
    """Return how many samples and contexts stand behind each setting, and in how many cells."""
    rows = []
    for setting in SETTINGS:
        found = findings.cells[findings.cells.setting == setting.name]
        if not found.empty:
            cells = len(set(zip(found.method, found.budget, strict=True)))
            asked = setting.question if setting.asks else "none"
            counts = (found.n.max(), found.contexts.max(), cells)
            rows.append([setting.benchmark, asked, *map(str, counts)])
    return markdown_table(["benchmark", "question", "samples", "contexts", "cells"], rows, range(2, 5))


def _steps(findings: Findings, budget: str, question: str) -> str:
    """Return what the main steps do to the KL, the mean over the selections."""
    return _of_steps(findings, MAIN_STEPS, budget, question)


def _others(findings: Findings, budget: str, question: str) -> str:
    """Return the same of the other steps."""
    return _of_steps(findings, OTHER_STEPS, budget, question)


def _of_steps(findings: Findings, steps: Sequence[str], budget: str, question: str) -> str:
    def rows(setting: str) -> list[str]:
        return [findings.change(setting, step, ALL, budget) for step in steps]

    return _by_setting("step", steps, findings.settings(question), rows)


def _signs(findings: Findings) -> str:
    """Return how many changes by a step have an interval above or below zero, over all that was run."""
    folding = findings.effects[findings.effects.experiment == "merging"]
    rows = []
    for step in (*(step for step in STEPS if step not in _BESIDES), *_BESIDES, OWN_SETS):
        line = [step]
        for measure in (KL, AVERAGE):
            found = _where(folding, step=step, measure=measure)
            line += map(str, _counts(found[found.keep != ALL]))
        rows.append(line)
    heads = ["step", *("KL rises", "falls", "of"), *("score rises", "falls", "of")]
    return markdown_table(heads, rows, range(1, 7))


def _counts(found: pd.DataFrame) -> tuple[int, int, int]:
    above, below = found.difference_low > 0, found.difference_high < 0
    return int(above.sum()), int(below.sum()), len(found)


def _own(findings: Findings, question: str) -> str:
    """Return what KVMerger gains over the pivots of its own sets."""

    def rows(setting: str) -> list[str]:
        return [findings.change(setting, OWN_SETS, "kvmerger", budget) for budget in _BUDGETS]

    return _by_setting("budget", _BUDGETS, findings.settings(question), rows)


def _field(findings: Findings, budget: str, question: str) -> str:
    """Return KL and score of every method, by their mean rank of KL."""
    settings = findings.settings(question)
    cells = _where(findings.cells, experiment="methods", budget=budget)
    cells = cells[cells.setting.isin(list(settings))]
    kl = cells.pivot_table(index="method", columns="setting", values="kl")
    kl = kl.reindex(columns=list(settings))
    scores = cells.pivot_table(index="method", columns="setting", values="score").reindex(
        index=kl.index, columns=list(settings)
    )
    best_first = kl.rank().mean(axis=1).sort_values(kind="stable").index
    rows = [
        [f"`{method}`", *(_pair(kl.loc[method, name], scores.loc[method, name]) for name in settings)]
        for method in best_first
    ]
    return markdown_table(["method", *settings.values()], rows, range(1, 1 + len(settings)))


def _pair(kl: float, score: float) -> str:
    if math.isnan(kl):
        return ""
    return f"{kl:.3f}" if math.isnan(score) else f"{kl:.3f} / {score:.0f}"


def _ours(findings: Findings, question: str) -> str:
    """Return how every other method differs from ours, which stores no more."""
    heads = [
        *("budget", "benchmark", "methods", "KL higher", "adjusted p < .05"),
        *("closest by KL", "its KL minus ours"),
        *("closest by score", "its score minus ours", "score higher", "lower"),
    ]
    rows = []
    for budget in ("0.35", "0.2"):
        for setting, name in findings.settings(question).items():
            found = _where(findings.effects, setting=setting, step=INSTEAD_OF_OURS, budget=budget)
            kl = found[found.measure == KL].sort_values("difference")
            if kl.empty:
                continue
            above, _, of = _counts(kl)
            sure = int((kl.p_adjusted < LEVEL).sum())
            row = [budget, name, str(of), str(above), str(sure), f"`{kl.iloc[0].keep}`"]
            row.append(_shown(kl.iloc[0], 3))
            score = found[found.measure == AVERAGE].sort_values("difference", ascending=False)
            if not score.empty:
                higher, lower, _ = _counts(score)
                row += [f"`{score.iloc[0].keep}`", _shown(score.iloc[0], 1), str(higher), str(lower)]
            rows.append(row + [""] * (len(heads) - len(row)))
    return markdown_table(heads, rows, [0, 2, 3, 4, 6, 8, 9, 10])


_TABLES: Mapping[str, Callable[..., str]] = {
    "samples": _samples,
    "steps": _steps,
    "others": _others,
    "signs": _signs,
    "own": _own,
    "field": _field,
    "ours": _ours,
}


def _by_setting(
    head: str, lines: Sequence[str], settings: Mapping[str, str], rows: Callable[[str], list[str]]
) -> str:
    """Return a table with a column a setting, without settings and lines of which nothing was run."""
    columns = {name: rows(setting) for setting, name in settings.items()}
    known = {name: column for name, column in columns.items() if any(column)}
    body = [list(row) for row in zip(lines, *known.values(), strict=True) if any(row[1:])]
    return markdown_table([head, *known], body, range(1, 1 + len(known)))


def _where(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def _shown(line: pd.Series, digits: int) -> str:
    value = f"{line.difference:+.{digits}f}"
    if math.isnan(line.difference_low):
        return value
    return f"{value} [{line.difference_low:.{digits}f}, {line.difference_high:.{digits}f}]"
