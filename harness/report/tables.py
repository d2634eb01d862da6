"""The tables of a run as plain text, ready for any format; every caption states the setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from harness.report.bootstrap import Scored, aggregate
from harness.report.columns import COLUMNS, TABLE, Column
from harness.report.contrasts import (
    AVERAGE,
    KL,
    LEVEL,
    Contrast,
    contrasts,
    contrasts_by_task,
    flips_of,
    without_kl,
)
from harness.report.gates import PROFILE, Gate, gates, outside, profile_of
from harness.report.groups import group_values, scores_by
from harness.report.published import QUOTED, Reference, Source, for_benchmark, members
from harness.report.run import Run, averages, differences
from harness.report.summary import summarise
from harness.report.words import INTERVAL, count_tasks, gaps, sample_counts, setting, span, task_label
from kvmerge.cells import parse_name

MARK = " †"
MARK_NOTE = (
    "†: the full cache is outside its published band, so these rows do not count as a reproduction."
)
QUOTED_NOTE = f"{QUOTED}: quoted by somebody else than its authors, and not checked against their text."


@dataclass(frozen=True)
class Table:
    """One table: texts for people, and the same numbers unrounded for programs.

    A newline in a cell separates a number from its interval.
    """

    name: str
    """File name without ending."""
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    data: pd.DataFrame


def _score_text(scored: Scored | None, sign: str = "") -> str:
    if scored is None or np.isnan(scored.value):
        return ""
    shown = scored.estimate()
    text = f"{shown.value:{sign}.2f}"
    return text if np.isnan(shown.low) else f"{text}\n[{shown.low:.2f}, {shown.high:.2f}]"


def _number(value: float, form: str) -> str:
    return "" if np.isnan(value) else format(value, form)


def _tidy(run: Run, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    known = ["model", "benchmark", *columns]
    named = ({"model": run.model, "benchmark": run.benchmark} | dict(row) for row in rows)
    return pd.DataFrame(named, columns=known)


def _score_row(cell: str, task: str, scored: Scored, n: int | None = None) -> dict[str, Any]:
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


def official_aggregates(run: Run, references: Iterable[Reference]) -> dict[str, dict[str, Scored]]:
    """Return the aggregates that the benchmark's own repository defines, by name and cell.

    Only those named `average...` whose every member this run has.
    """
    over = _official_members(run, references)
    found: dict[str, dict[str, Scored]] = {}
    for name in over:
        if not name.startswith("average"):
            continue
        for cell in run.cells:
            scored = aggregate(name, _scores_of(run, cell), over)
            if scored is not None:
                found.setdefault(name, {})[cell] = scored
    return found


def _official_members(run: Run, references: Iterable[Reference]) -> dict[str, tuple[str, ...]]:
    official = [r for r in references if r.benchmark == run.benchmark and r.source is Source.OFFICIAL]
    return {r.task: r.over for r in official if r.over}


def _scores_of(run: Run, cell: str) -> dict[str, Scored]:
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
        rows=tuple(_gate_row(gate) for gate in found),
        notes=_quoted_note(gate.published for gate in found),
        data=_tidy(
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
    )


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


def score_table(run: Run, references: Iterable[Reference] = ()) -> Table:
    """Put tasks in rows, cells in columns, the averages last; each score with its interval.

    A dagger marks the tasks whose full cache is outside its published band, and the averages that
    they go into.
    """
    references = list(references)
    over = {"average": run.averaged_tasks} | _official_members(run, references)
    marked = outside(gates(run, references))

    def label(name: str, text: str) -> str:
        return text + MARK * bool(members(name, over) & marked)

    rows = []
    data = []
    for task in run.tasks:
        ns = [len(run.samples[task, cell].ids) for cell in run.cells if (task, cell) in run.samples]
        texts = [_score_text(run.scores.get((task, cell))) for cell in run.cells]
        rows.append((label(task, task_label(run, task)), span(ns) if ns else "0", *texts))
        data += [
            _score_row(cell, task, run.scores[task, cell], len(run.samples[task, cell].ids))
            for cell in run.cells
            if (task, cell) in run.scores
        ]
    averaged = {"average": averages(run)} | official_aggregates(run, references)
    for name, by_cell in averaged.items():
        rows.append((label(name, name), "", *(_score_text(by_cell.get(cell)) for cell in run.cells)))
        data += [_score_row(cell, name, scored) for cell, scored in by_cell.items()]
    notes = [*([MARK_NOTE] if marked else []), *gaps(run)]
    lacking = [cell for cell in run.cells if cell not in averaged["average"]]
    if lacking and run.averaged_tasks:
        notes.append(f"No average for {', '.join(lacking)}: not every task has records.")
    left_out = [task for task in run.tasks if task not in run.averaged_tasks]
    if left_out:
        notes.append(f"Not in the average, as it is not a score of 0 to 100: {', '.join(left_out)}.")
    notes += [
        f"{name}: the benchmark's own average, a mean of category means."
        for name in averaged
        if name != "average"
    ]
    return Table(
        name="scores",
        title="Scores by task",
        caption=f"Scale 0 to 100: {setting(run)}. In brackets: {INTERVAL}. "
        f"average: plain mean over {count_tasks(len(run.averaged_tasks))}, from unrounded scores.",
        header=("task", "n", *run.cells),
        rows=tuple(rows),
        notes=tuple(notes),
        data=_tidy(run, data, ["method", "budget", "task", "n", "score", "ci_low", "ci_high"]),
    )


def group_tables(run: Run) -> list[Table]:
    """Return one table for each thing that samples are grouped by, and one for each two of them.

    What has the same value everywhere is left out.
    """
    names = [name for name, values in group_values(run).items() if len(values) > 1]
    return [_group_table(run, by) for by in (*((name,) for name in names), *combinations(names, 2))]


def _group_table(run: Run, by: tuple[str, ...]) -> Table:
    """Put tasks and groups in rows, cells in columns; blank where a group has no samples."""
    found = scores_by(run, by)
    by_key = {(one.task, one.group, one.cell): one for one in found}
    tasks = dict.fromkeys(one.task for one in found)
    values = group_values(run)
    rows = []
    for task, group in product(tasks, product(*(values[name] for name in by))):
        scores = [by_key.get((task, group, cell)) for cell in run.cells]
        counts = {one.n for one in scores if one is not None}
        texts = [_score_text(one.scored if one else None) for one in scores]
        n = span(counts) if counts else "0"
        rows.append((task_label(run, task), *map(str, group), n, *texts))
    return Table(
        name=f"scores_by_{'_and_'.join(by)}",
        title=f"Scores by {' and '.join(by)}",
        caption=f"Scores of the samples of each group: {setting(run)}. In brackets: {INTERVAL} within "
        "the group. Blank where a group has no samples.",
        header=("task", *by, "n", *run.cells),
        rows=tuple(rows),
        notes=tuple(gaps(run)),
        data=_tidy(
            run,
            [
                _score_row(one.cell, one.task, one.scored, one.n)
                | dict(zip(by, one.group, strict=True))
                for one in found
            ],
            ["method", "budget", "task", *by, "n", "score", "ci_low", "ci_high"],
        ),
    )


def budget_table(run: Run) -> Table:
    """Put cells in rows: what was kept, what it weighs, how far the predictions move from full."""
    rows = []
    data = []
    for cell in run.cells:
        name = parse_name(cell)
        values = run.over_tasks(cell)
        tasks = sum((task, cell) in run.records for task in run.tasks)
        rows.append((cell, str(tasks), *(_figure_text(column, values) for column in TABLE)))
        if values:
            data.append({"method": name.variant, "budget": str(name.budget), "tasks": tasks} | values)
    return Table(
        name="budgets",
        title="Budget, memory and fidelity",
        caption=f"What each cell kept: {setting(run)}. Means over samples, then tasks; in brackets "
        "the smallest and largest sample. Entries are per layer and KV head, after prefill; merged are "
        "the prompt tokens that share another's entry, evicted those that none stands for (told by "
        "methods that keep sizes). KV counts K and V alone, size vectors stand apart. KL(full || cell) "
        "in nats and top-1 agreement along the full cache's own answer.",
        header=("cell", "tasks", *(column.header for column in TABLE)),
        rows=tuple(rows),
        notes=tuple(gaps(run)),
        data=_tidy(run, data, ["method", "budget", "tasks", *(column.name for column in COLUMNS)]),
    )


def _figure_text(column: Column, values: Mapping[str, float]) -> str:
    """Return a figure as the table shows it, its extremes in brackets; empty where there is none."""
    text = column.text(values.get(column.name, np.nan))
    if text and column.brackets:
        low, high = (column.text(values[name]) for name in column.brackets)
        return f"{text}\n[{low}, {high}]"
    return text


def difference_table(run: Run) -> Table | None:
    """Put each cell's score minus the full cache's, paired by sample; None without a full cell."""
    full = run.full_cell
    if full is None:
        return None
    found = differences(run, full)
    others = [cell for cell in run.cells if cell != full]
    if not found:
        return None
    by_key = {(difference.task, difference.cell): difference for difference in found}
    rows = []
    for task in (*run.tasks, "average"):
        pairs = [by_key.get((task, cell)) for cell in others]
        counts = {pair.n for pair in pairs if pair is not None}
        texts = [_score_text(pair.scored if pair else None, "+") for pair in pairs]
        label = task if task == "average" else task_label(run, task)
        rows.append((label, span(counts) if counts else "0", *texts))
    return Table(
        name="differences",
        title=f"Difference to {full}",
        caption=f"Score of the cell minus score of {full}: {setting(run)}. In brackets: "
        f"{INTERVAL}, paired by sample id. An interval that holds 0 may be no difference at all; "
        "with many tasks, claims rest on the average.",
        header=("task", "pairs", *others),
        rows=tuple(rows),
        notes=tuple(gaps(run)),
        data=_tidy(
            run,
            [_score_row(pair.cell, pair.task, pair.scored, pair.n) | {"minus": full} for pair in found],
            ["method", "budget", "minus", "task", "n", "score", "ci_low", "ci_high"],
        ).rename(columns={"score": "difference", "n": "pairs"}),
    )


def contrast_table(run: Run, margin: float) -> Table | None:
    """Compare cells on the average and on KL; None where no two can be."""
    lacking = without_kl(run)
    return _contrast_table(
        run,
        contrasts(run),
        margin,
        name="contrasts",
        title="Contrasts on the average and on KL",
        about="KL to the full cache (nats, lower is better) has no margin, and no contrast with the "
        "full cache, whose own is 0 by definition",
        notes=[f"No contrast on KL, which is not recorded on every task: {', '.join(lacking)}."]
        if lacking
        else [],
    )


def contrast_by_task_table(run: Run, margin: float) -> Table | None:
    """Compare cells on each task; None where no two can be."""
    return _contrast_table(
        run,
        contrasts_by_task(run),
        margin,
        name="contrasts_by_task",
        title="Contrasts by task",
        about="Scores that are not of 0 to 100 have no margin",
    )


_CONTRAST_HEADER = (
    "on",
    "A",
    "B",
    "n",
    "A - B",
    "p",
    "adjusted p",
    "win/tie/loss",
    "SD over seeds A, B",
    "verdict",
)


def _contrast_table(
    run: Run,
    found: Sequence[Contrast],
    margin: float,
    *,
    name: str,
    title: str,
    about: str,
    notes: Sequence[str] = (),
) -> Table | None:
    if not found:
        return None
    family = sum(not np.isnan(contrast.p) for contrast in found)
    notes = [*gaps(run), *notes]
    flips = flips_of(len(found))
    least = min(1.0, 2 * family / (flips + 1))
    if least >= LEVEL:
        notes.append(
            f"With {family} contrasts in one family, {flips:,} flips give no adjusted p below "
            f"{least:.2g}: nothing here can be better. Claims rest on the average."
        )
    return Table(
        name=name,
        title=title,
        caption=f"Score of A minus score of B: {setting(run)}. In brackets: {INTERVAL}, paired by "
        f"sample id. p: sign-flip permutation test over samples, {flips:,} flips (all where fewer), "
        f"adjusted by Holm over the {family} contrasts of this table. Better: adjusted p below "
        f"{LEVEL:g}. Equivalent: 90% interval within {margin:g} points of 0. Unresolved: neither; in "
        "brackets the samples that would narrow the interval to the margin, if further ones scatter "
        "as these do (its width falls with the root of their number). Win: a sample on which A is "
        f"better. {about}.",
        header=_CONTRAST_HEADER,
        rows=tuple(_contrast_row(run, contrast, margin) for contrast in found),
        notes=tuple(notes),
        data=_tidy(
            run,
            [_contrast_data(contrast, margin) for contrast in found],
            list(_contrast_data(found[0], margin)),
        ),
    )


def _contrast_row(run: Run, contrast: Contrast, margin: float) -> tuple[str, ...]:
    label = {AVERAGE: AVERAGE, KL: "KL to full"}.get(contrast.task)
    spreads = ", ".join(_number(spread, ".2f") or "-" for spread in contrast.spreads)
    return (
        label or task_label(run, contrast.task),
        contrast.first,
        contrast.second,
        str(contrast.n),
        _score_text(contrast.scored, "+") if contrast.task != KL else _kl_text(contrast),
        _number(contrast.p, ".4f"),
        _number(contrast.p_adjusted, ".4f"),
        f"{contrast.wins}/{contrast.ties}/{contrast.losses}",
        "" if all(np.isnan(contrast.spreads)) else spreads,
        verdict_text(contrast, margin),
    )


def _kl_text(contrast: Contrast) -> str:
    low, high = contrast.interval
    text = f"{contrast.scored.value:+.4f}"
    return text if np.isnan(low) else f"{text}\n[{low:.4f}, {high:.4f}]"


def verdict_text(contrast: Contrast, margin: float) -> str:
    """Return a verdict in words, with the samples that would resolve it; empty where there is none."""
    verdict = contrast.verdict(margin)
    needed = contrast.needed(margin)
    return f"{verdict or ''}" + (f"\n[{needed:,} samples]" if needed else "")


def _contrast_data(contrast: Contrast, margin: float) -> dict[str, Any]:
    low, high = contrast.interval
    low_90, high_90 = contrast.narrow
    verdict = contrast.verdict(margin)
    return {
        "task": contrast.task,
        "a": contrast.first,
        "b": contrast.second,
        "n": contrast.n,
        "difference": contrast.scored.value,
        "ci_low": low,
        "ci_high": high,
        "ci90_low": low_90,
        "ci90_high": high_90,
        "p": contrast.p,
        "p_adjusted": contrast.p_adjusted,
        "wins": contrast.wins,
        "ties": contrast.ties,
        "losses": contrast.losses,
        "seed_sd_a": contrast.spreads[0],
        "seed_sd_b": contrast.spreads[1],
        "margin": margin if contrast.in_points else np.nan,
        "verdict": str(verdict or ""),
        "samples_needed": contrast.needed(margin),
    }


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
        scored = aggregate(reference.task, _scores_of(run, reference.cell), over)
        same = scored is not None and reference.score is not None and reference.fits(run.model)
        difference = scored.value - reference.score if same else np.nan  # type: ignore[union-attr, operator]
        rows.append(
            (
                reference.task + MARK * bool(members(reference.task, over) & marked),
                reference.cell,
                reference.model,
                reference.text,
                str(reference.source),
                _score_text(scored),
                _number(difference, "+.2f"),
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
        data=_tidy(run, data, list(data[0])),
    )


def runs_table(runs: Sequence[Run]) -> Table:
    """Put all cells of several runs in one table, keyed by model and benchmark."""
    overview = [column for column in TABLE if column.overview]
    ordered = sorted(runs, key=lambda run: (run.model, run.benchmark))
    rows = []
    frames = []
    for run in ordered:
        averaged = averages(run)
        for cell in run.cells:
            values = run.over_tasks(cell)
            rows.append(
                (
                    run.model,
                    run.benchmark,
                    str(run.output_dir),
                    cell,
                    f"{len(run.averaged_tasks)}",
                    sample_counts(run, run.averaged_tasks),
                    _score_text(averaged.get(cell)),
                    *(column.text(values.get(column.name, np.nan)) for column in overview),
                )
            )
        frames.append(summarise(run).assign(output_dir=str(run.output_dir)))
    return Table(
        name="runs",
        title="All runs",
        caption="Average score over each run's tasks, by model and benchmark. In brackets: "
        f"{INTERVAL}. Averages compare only within one benchmark and the same tasks and samples. "
        "Settings: " + "; ".join(f"{run.output_dir}: {setting(run)}" for run in ordered) + ".",
        header=(
            "model",
            "benchmark",
            "output_dir",
            "cell",
            "tasks",
            "n a task",
            "average",
            *(column.header for column in overview),
        ),
        rows=tuple(rows),
        notes=tuple(f"{run.output_dir}: {note}" for run in ordered for note in gaps(run)),
        data=pd.concat(frames, ignore_index=True),
    )
