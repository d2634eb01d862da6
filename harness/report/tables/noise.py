"""The noise floor as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from harness.report.contrasts import AVERAGE
from harness.report.divergence import KL
from harness.report.noise import Change, Floor
from harness.report.tables.table import Table, number, tidy
from harness.report.words import setting, subject, task_label
from kvmerge.names import parse_name

IN_FILES_ALONE = ("changes", "as recorded")
"""Columns for which a terminal has no room."""
_WHAT = (
    "The same cells on the same samples, computed in another way: the base as the settings say, each "
    "variant with one change. The largest of a handful is no bound, and with n samples one that is "
    "answered otherwise moves its task by up to 100/n."
)


def noise_tables(floor: Floor) -> list[Table]:
    """Return the noise of each task, and what each variant changed."""
    return [_by_task(floor), _by_variant(floor)] if floor.changes else []


def notes(floor: Floor) -> list[str]:
    """Say which variants say nothing, and why."""
    silent = [f"{name} says nothing: {why}." for name, why in floor.passed_over.items()]
    return silent if floor.changes else [*silent, "No variant was measured: there is no noise floor."]


def _by_task(floor: Floor) -> Table:
    order = [task for task in (*floor.base.tasks, AVERAGE, KL) if task in floor.largest]
    rows = [_task_row(floor, floor.largest[task]) for task in order]
    return Table(
        name="noise",
        title="Noise floor",
        caption=f"{_WHAT} Noise: the largest difference that any variant made in any cell, and which: "
        f"{setting(floor.base)}.",
        header=("on", "n", "noise", "variant", "cell", "base", "variant's"),
        rows=tuple(rows),
        notes=tuple(notes(floor)),
        data=tidy(floor.base, map(_change_data, floor.changes), list(_change_data(floor.changes[0]))),
        subject=subject(floor.base),
        naming=(4,),
        averages=tuple(place for place, task in enumerate(order) if task == AVERAGE),
    )


def _task_row(floor: Floor, change: Change) -> tuple[str, ...]:
    label = {AVERAGE: AVERAGE, KL: "KL to full"}.get(change.task)
    form = ".4f" if change.task == KL else ".2f"
    none = change.difference == 0
    return (
        label or task_label(floor.base, change.task),
        str(change.n),
        format(abs(change.difference), form),
        "" if none else change.variant,
        "" if none else change.cell,
        "" if none else format(change.base, form),
        "" if none else format(change.value, form),
    )


def _change_data(change: Change) -> dict[str, Any]:
    name = parse_name(change.cell)
    return {
        "variant": change.variant,
        "changes": change.setting,
        "method": name.variant,
        "budget": str(name.budget),
        "task": change.task,
        "n": change.n,
        "base": change.base,
        "value": change.value,
        "difference": change.difference,
        "answers_changed": change.changed,
    }


def _by_variant(floor: Floor) -> Table:
    cells = floor.base.cells
    fixed = ("variant", "changes", "as recorded", "answers changed", "largest on a task")
    rows = [_variant_data(floor, name) for name in floor.variants]
    texts = [
        (
            row["variant"],
            row["changes"],
            row["as_recorded"],
            number(row["answers_changed"], ".1%"),
            number(row["largest_on_a_task"], ".2f"),
            *(number(row[f"average {cell}"], "+.2f") for cell in cells),
        )
        for row in rows
    ]
    return Table(
        name="noise_by_variant",
        title="Noise by variant",
        caption=f"{_WHAT} Answers changed: those whose text is another, over all cells. Under a "
        f"cell: its difference on the average. {setting(floor.base)}.",
        header=(*fixed, *cells),
        rows=tuple(texts),
        notes=tuple(notes(floor)),
        data=tidy(floor.base, rows, list(rows[0])),
        subject=subject(floor.base),
        cells=tuple(range(len(fixed), len(fixed) + len(cells))),
    )


def _variant_data(floor: Floor, name: str) -> dict[str, Any]:
    changes = [change for change in floor.changes if change.variant == name]
    on_tasks = [change for change in changes if change.task in floor.base.tasks]
    texts = [(change.changed, change.n) for change in on_tasks if not np.isnan(change.changed)]
    averages = {change.cell: change.difference for change in changes if change.task == AVERAGE}
    return {
        "variant": name,
        "changes": floor.settings[name],
        "as_recorded": "; ".join(_as_recorded(floor, name)),
        "answers_changed": sum(share * n for share, n in texts) / max(1, sum(n for _, n in texts))
        if texts
        else np.nan,
        "largest_on_a_task": max((abs(change.difference) for change in on_tasks), default=np.nan),
        **{f"average {cell}": averages.get(cell, np.nan) for cell in floor.base.cells},
    }


def _as_recorded(floor: Floor, name: str) -> Iterator[str]:
    """Yield what records say of how a variant ran, where the base ran otherwise."""
    for label, attribute in (
        ("batch of", "batch_samples"),
        ("threads", "threads"),
        ("kernel", "kernel"),
    ):
        before, after = (run.values(attribute) for run in (floor.base, floor.variants[name]))
        if before != after:
            yield f"{label} {', '.join(sorted(map(str, after)))}"
