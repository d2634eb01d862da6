"""Which method is best at a budget, and which second, where the difference is resolved."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from harness.report.contrasts import AVERAGE, LEVEL, Contrast, Verdict, contrasts, contrasts_by_task
from harness.report.names import budget_groups
from harness.report.run import Run


class Mark(Enum):
    """What a cell's score is among the methods at its budget."""

    BEST = "best"
    SECOND = "second"


MARKS_NOTE = (
    "Bold: better than each other method at that budget (adjusted p below "
    f"{LEVEL:g}). Underlined: second, better than each but that one. Unmarked: not resolved."
)


def ranks(run: Run) -> dict[tuple[str, str], Mark]:
    """Return the best and the second cell of each budget, by task (or `average`) and cell.

    The best is better than every other cell of its budget, by the adjusted verdicts of
    `harness.report.contrasts`; the second than every other but the best, of which there must be one.
    The full cache takes no part.
    """
    averaged = [contrast for contrast in contrasts(run) if contrast.task == AVERAGE]
    better = {
        (contrast.task, winner, loser)
        for contrast in (*contrasts_by_task(run), *averaged)
        for winner, loser in _decided(contrast)
    }
    others = [cell for cell in run.cells if cell != run.full_cell]
    found = {}
    for task in {task for task, _, _ in better}:
        for cells in budget_groups(others).values():
            best = _ahead(task, cells, better)
            if best is None:
                continue
            found[task, best] = Mark.BEST
            second = _ahead(task, [cell for cell in cells if cell != best], better)
            if second is not None:
                found[task, second] = Mark.SECOND
    return found


def _ahead(task: str, cells: list[str], better: set[tuple[str, str, str]]) -> str | None:
    """Return the cell that is better than each other one; None where there is none, or no other."""
    if len(cells) < 2:
        return None
    ahead: Iterable[str] = (
        cell for cell in cells if all((task, cell, other) in better for other in cells if other != cell)
    )
    return next(iter(ahead), None)


def _decided(contrast: Contrast) -> list[tuple[str, str]]:
    """Return the better and the worse cell; nothing where that is not resolved."""
    # Whether one is better does not depend on the margin.
    verdict = contrast.verdict(margin=1)
    if verdict is Verdict.FIRST:
        return [(contrast.first, contrast.second)]
    return [(contrast.second, contrast.first)] if verdict is Verdict.SECOND else []
