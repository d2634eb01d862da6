"""Scores: by task and on the average, by groups of samples, and their differences to the full cache."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from statistics import mean

from harness.report.gates import gates, outside
from harness.report.groups import group_values, scores_by, unsampled_notes
from harness.report.published import Reference, members
from harness.report.ranks import ranks
from harness.report.run import Run, averages, differences
from harness.report.tables.published import MARK, MARK_NOTE, official_aggregates, official_members
from harness.report.tables.table import Table, score_row, score_text, tidy
from harness.report.words import INTERVAL, count_tasks, gaps, setting, span, subject, task_label


def score_table(run: Run, references: Iterable[Reference] = ()) -> Table:
    """Put tasks in rows, cells in columns, the averages last; each score with its interval.

    A dagger marks the tasks whose full cache is outside its published band, and the averages that
    they go into.
    """
    references = list(references)
    over = {"average": run.averaged_tasks} | official_members(run, references)
    marked = outside(gates(run, references))

    def label(name: str, text: str) -> str:
        return text + MARK * bool(members(name, over) & marked)

    header = ("task", "n", *run.cells)
    rows = []
    data = []
    for task in run.tasks:
        ns = [len(run.samples[task, cell].ids) for cell in run.cells if (task, cell) in run.samples]
        texts = [score_text(run.scores.get((task, cell))) for cell in run.cells]
        rows.append((label(task, task_label(run, task)), span(ns) if ns else "0", *texts))
        data += [
            score_row(cell, task, run.scores[task, cell], len(run.samples[task, cell].ids))
            for cell in run.cells
            if (task, cell) in run.scores
        ]
    averaged = {"average": averages(run)} | official_aggregates(run, references)
    for name, by_cell in averaged.items():
        rows.append((label(name, name), "", *(score_text(by_cell.get(cell)) for cell in run.cells)))
        data += [score_row(cell, name, scored) for cell, scored in by_cell.items()]
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
    brackets = f"In brackets: {INTERVAL}."
    names = [*run.tasks, *averaged]
    places = {cell: 2 + place for place, cell in enumerate(run.cells)}
    marks = {
        (names.index(task), places[cell]): mark
        for (task, cell), mark in ranks(run).items()
        if task in names
    }
    return Table(
        name="scores",
        title="Scores by task",
        caption=f"Scale 0 to 100: {setting(run)}. {brackets} "
        f"average: plain mean over {count_tasks(len(run.averaged_tasks))}, from unrounded scores.",
        header=header,
        rows=tuple(rows),
        notes=tuple(notes),
        data=tidy(run, data, ["method", "budget", "task", "n", "score", "ci_low", "ci_high"]),
        subject=subject(run),
        cells=tuple(range(2, len(header))),
        averages=tuple(range(len(run.tasks), len(rows))),
        brackets=brackets,
        marks=marks,
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
    header = ("task", *by, "n", "prompt tokens", *run.cells)
    rows = []
    for task, group in product(tasks, product(*(values[name] for name in by))):
        scores = [by_key.get((task, group, cell)) for cell in run.cells]
        counts = {one.n for one in scores if one is not None}
        texts = [score_text(one.scored if one else None) for one in scores]
        n = span(counts) if counts else "0"
        tokens = [one.prompt_tokens for one in scores if one is not None]
        length = f"{mean(tokens):,.0f}" if tokens else ""
        rows.append((task_label(run, task), *map(str, group), n, length, *texts))
    brackets = f"In brackets: {INTERVAL} within the group."
    return Table(
        name=f"scores_by_{'_and_'.join(by)}",
        title=f"Scores by {' and '.join(by)}",
        caption=f"Scores of the samples of each group: {setting(run)}. {brackets} "
        "Blank where a group has no samples. Prompt tokens: mean of what was really fed.",
        header=header,
        rows=tuple(rows),
        notes=(*gaps(run), *unsampled_notes(run)),
        data=tidy(
            run,
            [
                score_row(one.cell, one.task, one.scored, one.n)
                | dict(zip(by, one.group, strict=True))
                | {"prompt_tokens_mean": one.prompt_tokens}
                for one in found
            ],
            ["method", "budget", "task", *by, "n", "prompt_tokens_mean", "score", "ci_low", "ci_high"],
        ),
        subject=subject(run),
        cells=tuple(range(3 + len(by), len(header))),
        brackets=brackets,
    )


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
    header = ("task", "pairs", *others)
    rows = []
    for task in (*run.tasks, "average"):
        pairs = [by_key.get((task, cell)) for cell in others]
        counts = {pair.n for pair in pairs if pair is not None}
        texts = [score_text(pair.scored if pair else None, "+") for pair in pairs]
        label = task if task == "average" else task_label(run, task)
        rows.append((label, span(counts) if counts else "0", *texts))
    brackets = (
        f"In brackets: {INTERVAL}, paired by sample id. An interval that holds 0 may be no difference "
        "at all; with many tasks, claims rest on the average."
    )
    return Table(
        name="differences",
        title="Difference to the full cache",
        caption=f"Score of the cell minus score of {full}: {setting(run)}. {brackets}",
        header=header,
        rows=tuple(rows),
        notes=tuple(gaps(run)),
        data=tidy(
            run,
            [score_row(pair.cell, pair.task, pair.scored, pair.n) | {"minus": full} for pair in found],
            ["method", "budget", "minus", "task", "n", "score", "ci_low", "ci_high"],
        ).rename(columns={"score": "difference", "n": "pairs"}),
        subject=subject(run),
        cells=tuple(range(2, len(header))),
        averages=(len(rows) - 1,),
        brackets=brackets,
    )
