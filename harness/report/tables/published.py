"""Published numbers beside ours, the gate that they are, and the aggregates that they define."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from harness.report.bootstrap import Scored, aggregate
from harness.report.gates import NAMED, PROFILE, Gate, gates, outside, profile_of
from harness.report.published import QUOTED, Reference, Source, for_benchmark, members
from harness.report.run import Run
from harness.report.tables.table import Table, number, score_text, tidy
from harness.report.words import INTERVAL, count_tasks, setting, span, subject

MARK = " †"
MARK_NOTE = (
    "†: the full cache is outside its published band, so these rows do not count as a reproduction."
)
QUOTED_NOTE = f"{QUOTED}: quoted by somebody else than its authors, and not checked against their text."


def official_aggregates(run: Run, references: Iterable[Reference]) -> dict[str, dict[str, Scored]]:
    """Return the aggregates that the benchmark's own repository defines, by name and cell.

    Only those named `average...` whose every member this run has.
    """
    over = official_members(run, references)
    found: dict[str, dict[str, Scored]] = {}
    for name in over:
        if not name.startswith("average"):
            continue
        for cell in run.cells:
            scored = aggregate(name, scores_of(run, cell), over)
            if scored is not None:
                found.setdefault(name, {})[cell] = scored
    return found


def official_members(run: Run, references: Iterable[Reference]) -> dict[str, tuple[str, ...]]:
    """Return the tasks of each aggregate that the benchmark's own repository defines, by its name."""
    official = [r for r in references if r.benchmark == run.benchmark and r.source is Source.OFFICIAL]
    return {r.task: r.over for r in official if r.over}


def scores_of(run: Run, cell: str) -> dict[str, Scored]:
    """Return the scores of a cell by task, of the tasks that it has."""
    return {task: run.scores[task, cell] for task in run.tasks if (task, cell) in run.scores}


def gate_table(run: Run, references: Iterable[Reference]) -> Table | None:
    """Put the full cache beside the published bands; None where nothing is published."""
    found = gates(run, references)
    if not found:
        return None
    return Table(
        name="gate",
        title="Gate: does the full cache reproduce the published scores?",
        caption=f"Full cache: {setting(run)}. Where it is outside the band, the other rows of that "
        "task do not count as a reproduction. The bands and their reasons: docs/reproducing.md.",
        header=(
            "task",
            "n",
            "ours",
            "published",
            "tolerance",
            "verdict",
            "reason",
            "read in",
            "source",
        ),
        rows=tuple(_gate_rows(found)),
        notes=_quoted_note(gate.published for gate in found),
        data=tidy(
            run,
            [
                {
                    "task": gate.task,
                    "n": gate.samples,
                    "ours": gate.ours,
                    "published": gate.published and gate.published.score,
                    "tolerance": gate.published and gate.published.tolerance,
                    "verdict": str(gate.verdict),
                    "reason": gate.reason,
                    "source": gate.published and str(gate.published.source),
                }
                for gate in found
            ],
            ["task", "n", "ours", "published", "tolerance", "verdict", "reason", "source"],
        ),
        subject=subject(run),
    )


def _gate_rows(found: Sequence[Gate]) -> Iterator[tuple[str, ...]]:
    """Yield a row a gate; of many tasks of which nothing is published, one for all."""
    alone = [gate for gate in found if gate.published is None]
    together = len(alone) > NAMED
    yield from (_gate_row(gate) for gate in found if gate.published or not together)
    if together:
        for reason in dict.fromkeys(gate.reason for gate in alone):
            of_reason = [gate for gate in alone if gate.reason == reason]
            first = replace(of_reason[0], task=count_tasks(len(of_reason)), ours=None)
            task, _, *rest = _gate_row(first)
            yield (task, span({gate.samples for gate in of_reason}), *rest)


def _gate_row(gate: Gate) -> tuple[str, ...]:
    published = gate.published
    tolerance = published.tolerance if published else None
    return (
        gate.task,
        str(gate.samples),
        "" if gate.ours is None else f"{gate.ours:.2f}",
        published.text if published else "",
        "" if tolerance is None else f"{tolerance:g}",
        str(gate.verdict),
        gate.reason,
        str(published.source) if published else "",
        published.provenance if published else "",
    )


def _quoted_note(shown: Iterable[Reference | None]) -> tuple[str, ...]:
    """Say what the mark of quoted numbers means, where one is shown."""
    quoted = any(each and each.published and each.source.is_quoted for each in shown)
    return (QUOTED_NOTE,) if quoted else ()


def reference_table(run: Run, references: Iterable[Reference]) -> Table | None:
    """Put published numbers beside ours, with provenance; None where nothing is published."""
    references = list(references)
    marked = outside(gates(run, references))
    published = [
        reference
        for reference in for_benchmark(references, run.benchmark, run.model)
        if reference.is_aggregate or reference.task in run.tasks
    ]
    if not published:
        return None
    same_model = all(reference.fits(run.model) for reference in published)
    rows = []
    data = []
    for reference in published:
        # Each source has its own aggregates: two of them may mean different things by "average".
        over = {r.task: r.over for r in published if r.provenance == reference.provenance and r.over}
        scored = aggregate(reference.task, scores_of(run, reference.cell), over)
        same = scored is not None and reference.score is not None and reference.fits(run.model)
        difference = scored.value - reference.score if same else np.nan  # type: ignore[union-attr, operator]
        rows.append(
            (
                reference.task + MARK * bool(members(reference.task, over) & marked),
                reference.cell,
                reference.model,
                reference.text,
                str(reference.source),
                score_text(scored),
                number(difference, "+.2f"),
                "; ".join(filter(None, (reference.provenance, reference.note))),
            )
        )
        data.append(
            {
                "task": reference.task,
                "method": reference.method,
                "budget": reference.budget,
                "published_model": reference.model,
                "published": reference.score,
                "source": str(reference.source),
                "ours": np.nan if scored is None else scored.value,
                "difference": difference,
                "provenance": reference.provenance,
                "note": reference.note,
            }
        )
    notes = []
    if not same_model:
        notes.append(
            f"Nothing published was found for {run.model}: the models differ, so the two columns "
            "show tendencies only and no difference is formed."
        )
    if profile_of(run) != PROFILE:
        notes.append(f"Ours is by profile {profile_of(run)}, the published numbers are not.")
    if run.asks_after:
        notes.append("Ours read the question after the compression, the published numbers inside it.")
    if marked:
        notes.append(MARK_NOTE)
    notes += _quoted_note(published)
    kinds = "; ".join(f"{kind}: {kind.words}" for kind in Source)
    return Table(
        name="published",
        title="Published numbers beside ours",
        caption=f"Ours: {setting(run)}. In brackets: {INTERVAL}. Published numbers by where they "
        f"were read ({kinds}); blank where none was found.",
        header=("task", "cell", "model", "published", "read in", "ours", "difference", "source"),
        rows=tuple(rows),
        notes=tuple(notes),
        data=tidy(run, data, list(data[0])),
        subject=subject(run),
        naming=(1,),
    )
