"""The findings as tables: a line a cell, a line a contrast, and what a page quotes of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from harness.report.bootstrap import Estimate, Scored
from harness.report.contrasts import AVERAGE, LEVEL
from harness.report.divergence import KL, kl_averages
from harness.report.export.markdown import markdown_table
from harness.report.run import Run, averages
from harness.report.summary import to_csv
from kvmerge.files import write_atomically
from kvmerge.names import parse_name
from scripts.findings.effects import Effect

Key = tuple[str, str]
"""An experiment, and the name of a setting."""
_UNITS = {KL: "KL to the full cache, nats", AVERAGE: "score, points"}
_DIGITS = {KL: 2, AVERAGE: 1}


def write_cells(runs: Mapping[Key, Run], out: Path) -> None:
    """Write cells.csv: score, KL and bytes of every cell, the mean over the tasks of a setting."""
    rows = []
    for (experiment, setting), run in runs.items():
        scores, kl = averages(run), kl_averages(run)
        for cell in run.cells:
            name, figures = parse_name(cell), run.over_tasks(cell)
            samples = [run.samples[task, cell] for task in run.tasks if (task, cell) in run.samples]
            if not samples:  # of a run that is not finished
                continue
            rows.append(
                {
                    "experiment": experiment,
                    "setting": setting,
                    "method": name.variant,
                    "budget": str(name.budget),
                    "n": sum(len(of_task.ids) for of_task in samples),
                    "contexts": sum(len(of_task.clusters) for of_task in samples),
                    **_bounds("score", scores.get(cell)),
                    **_bounds("kl", kl.get(cell)),
                    "kept": figures["budget_achieved_mean"],
                    "kv_bytes": figures["kv_bytes"],
                    "size_bytes": figures["size_bytes"],
                }
            )
    _write(rows, out / "cells.csv")


def write_effects(effects: Mapping[Key, Sequence[Effect]], out: Path) -> None:
    """Write effects.csv, and the same as tables of Markdown, effects.md."""
    rows = [
        {
            "experiment": experiment,
            "setting": setting,
            **effect.place._asdict(),
            "measure": effect.measure,
            "n": effect.n,
            "contexts": effect.contexts,
            **_bounds("difference", effect.scored),
            "p_adjusted": effect.p_adjusted,
            "needed": math.nan if effect.needed is None else effect.needed,
            "bytes_ratio": effect.bytes_ratio,
        }
        for (experiment, setting), found in effects.items()
        for effect in found
    ]
    _write(rows, out / "effects.csv")
    text = "".join(
        _section(key, measure, found) for key, found in effects.items() for measure in _UNITS
    )
    write_atomically(out / "effects.md", f"# Effects\n\n{_HOW}\n{text}")


_HOW = (
    "Differences with their 95% intervals, paired and resampled by whole contexts; bold: adjusted p "
    f"below {LEVEL:g} (Holm, over the contrasts of a run). The mean over selections, `all`, has no "
    "p-value.\n"
)


def _section(key: Key, measure: str, effects: Sequence[Effect]) -> str:
    """Return one table: a line a step and selection, a column a budget; nothing where there is none."""
    chosen = [effect for effect in effects if effect.measure == measure]
    if not chosen:
        return ""
    budgets = sorted({effect.place.budget for effect in chosen}, key=float, reverse=True)
    lines: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for effect in chosen:
        lines[effect.place.step, effect.place.keep][effect.place.budget] = _shown(effect)
    rows = [[*line, *(found.get(budget, "") for budget in budgets)] for line, found in lines.items()]
    table = markdown_table(["step", "kept by", *budgets], rows, range(2, 2 + len(budgets)))
    most = max(chosen, key=lambda effect: effect.n)
    return (
        f"\n## {key[0]}, {key[1]}: {_UNITS[measure]}\n\n"
        f"{most.n} samples on {most.contexts} contexts.\n\n{table}"
    )


def _shown(effect: Effect) -> str:
    digits = _DIGITS[effect.measure]
    low, high = effect.scored.interval(95)
    value = f"{effect.scored.value:+.{digits}f}"
    if effect.p_adjusted < LEVEL:
        value = f"**{value}**"
    return f"{value} [{low:.{digits}f}, {high:.{digits}f}]"


def _bounds(name: str, scored: Scored | None) -> Mapping[str, float]:
    """Return a number and its 95% interval by column name; NaN where there is none."""
    found = Estimate(math.nan, math.nan, math.nan) if scored is None else scored.estimate()
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _write(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    write_atomically(path, to_csv(pd.DataFrame(rows).round(6)))
