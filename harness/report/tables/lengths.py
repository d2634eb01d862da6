"""How long answers are, and how they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.report.bootstrap import Estimate
from harness.report.lengths import Bounds, Lengths, generating, lengths, lengths_by_task
from harness.report.run import Run
from harness.report.tables.table import Table, estimate_text, tidy
from harness.report.words import INTERVAL, count_tasks, gaps, setting, subject, task_label
from kvmerge.names import parse_name


def length_table(run: Run) -> Table | None:
    """Put cells in rows: their answers on the average over tasks; None where no cell has all tasks."""
    found = lengths(run)
    return _length_table(
        run,
        found,
        ("cell", *_HEADER),
        [(one.cell, *_texts(one)) for one in found],
        name="lengths",
        title="Length of answers",
        over=f"Plain means over {count_tasks(len(generating(run)))}",
    )


def length_by_task_table(run: Run) -> Table | None:
    """Put tasks and cells in rows; None where nothing is generated."""
    found = lengths_by_task(run)
    return _length_table(
        run,
        found,
        ("task", "cell", *_HEADER),
        [(task_label(run, one.task), one.cell, *_texts(one)) for one in found],
        name="lengths_by_task",
        title="Length of answers by task",
        over="By task",
    )


_HEADER = ("n", "tokens", "change to full", "cut off %", "empty %")


def _length_table(
    run: Run,
    found: Sequence[Lengths],
    header: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    *,
    name: str,
    title: str,
    over: str,
) -> Table | None:
    if not found:
        return None
    notes = [*gaps(run)]
    if any(one.cut_off.low < one.cut_off.high for one in found):
        notes.append(
            "Records of an earlier version do not say why an answer ended: at most those that are as "
            "long as the limit were cut off."
        )
    if run.full_cell is None:
        notes.append("No change to full: the run has no full cache.")
    return Table(
        name=name,
        title=title,
        caption=f"{over}: {setting(run)}. Tokens of an answer, its end token included; change: paired "
        f"by sample id, in brackets: {INTERVAL}. Cut off: answers that the task's limit ended; empty: "
        "answers without text. Tasks that generate nothing are left out.",
        header=header,
        rows=tuple(rows),
        notes=tuple(notes),
        data=tidy(run, map(_data, found), [*_data(found[0])]),
        subject=subject(run),
        naming=(header.index("cell"),),
    )


def _texts(one: Lengths) -> tuple[str, ...]:
    return (
        str(one.n),
        f"{one.mean:.1f}",
        estimate_text(one.change, "+"),
        _share_text(one.cut_off),
        f"{100 * one.empty:.1f}",
    )


def _share_text(share: Bounds) -> str:
    """Return a share in percent, its upper bound, or that nothing is known of it."""
    if share.low == share.high:
        return f"{100 * share.low:.1f}"
    return "not recorded" if share.high - share.low == 1 else f"at most {100 * share.high:.1f}"


def _data(one: Lengths) -> dict[str, Any]:
    name = parse_name(one.cell)
    change = one.change or Estimate(np.nan, np.nan, np.nan)
    known = one.cut_off.low == one.cut_off.high
    return {
        "task": one.task,
        "method": name.variant,
        "budget": str(name.budget),
        "n": one.n,
        "tokens": one.mean,
        "pairs": one.pairs,
        "change": change.value,
        "ci_low": change.low,
        "ci_high": change.high,
        "cut_off": one.cut_off.low if known else np.nan,
        "cut_off_at_most": one.cut_off.high,
        "empty": one.empty,
    }
