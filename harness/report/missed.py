"""Cells that did not keep what their name says, and how each is marked wherever its name stands."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from harness.columnar import Records
from harness.report.names import cell_label
from harness.report.run import Run
from kvmerge.names import parse_name

TOLERANCE = 0.02
"""Share of the entries asked for by which the entries kept may differ, mean over samples."""


def missed_budgets(run: Run) -> Mapping[str, str]:
    """Return what was kept by each cell that missed its budget, e.g. `kept 50%`; {} where all met it.

    A method may have a budget of its own, as some authors' code has: its name then tells what was asked
    for, not what was kept.
    """

    def missed() -> Mapping[str, str]:
        return {cell: kept for cell in run.cells if (kept := _kept(run, cell))}

    return run.once("missed budgets", missed)


def shown_name(run: Run, cell: str) -> str:
    """Return a cell's name as it is shown: one that missed its budget says what it kept."""
    return marked(cell, missed_budgets(run))


def shown_label(run: Run, cell: str) -> str:
    """Return a cell's name as people write it, with what it kept where it missed its budget."""
    kept = missed_budgets(run).get(cell)
    return cell_label(cell) + (f" ({kept})" if kept else "")


def marked(name: str, missed: Mapping[str, str]) -> str:
    """Return a cell's name with what it kept, where that is not what the name says."""
    return f"{name} ({missed[name]})" if name in missed else name


def missed_notes(missed: Mapping[str, str]) -> list[str]:
    """Return a note on each cell that missed its budget."""
    return [
        f"{marked(cell, missed)}: not the budget in its name, so it does not compare with cells that "
        "met theirs."
        for cell in missed
    ]


def _kept(run: Run, cell: str) -> str:
    """Return what a cell kept, where that is not what it was asked for; empty where it is."""
    budget = parse_name(cell).budget
    columns = [
        [Records.of(run.of(task, cell)).numbers(field) for task in run.tasks]
        for field in ("prompt_tokens", "context_tokens", "budget_achieved", "kept_entries")
    ]
    prompts, contexts, achieved, entries = map(np.concatenate, columns)
    lengths = np.where(np.isnan(contexts), prompts, contexts)  # as `Record.compressed_tokens`
    some = lengths > 0
    if not some.any():
        return ""
    asked = np.mean([budget.entries(int(length)) / length for length in lengths[some]])
    kept = float(np.mean(achieved[some]))
    if abs(kept - asked) <= TOLERANCE * asked:
        return ""
    if isinstance(budget.value, float):
        return f"kept {100 * kept:.3g}%"
    return f"kept {np.mean(entries[some]):,.0f} entries"
