"""Samples that cells lose and gain, whether they are the same ones, and what goes with them."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.judgement import FlipRule
from harness.report.flip_properties import SHUFFLES, properties, rates
from harness.report.flips import (
    TOTAL,
    Count,
    Shared,
    counts,
    flips,
    points,
    shared_losses,
    without_flips,
)
from harness.report.run import Run
from harness.report.tables.table import Table, number, score_text, tidy
from harness.report.words import INTERVAL, gaps, setting, span, subject
from kvmerge.names import parse_name

_SHARED_HEADER = (
    "task",
    "budget",
    "methods",
    "answered well",
    "lost by any",
    "lost by all",
    "share %",
    "by chance %",
    "alone",
)
_PROPERTY_HEADER = (
    "cell",
    "property",
    "tasks",
    "lost",
    "kept",
    "of lost",
    "of kept",
    "difference",
    "p",
    "adjusted p",
)


def flip_table(run: Run, rule: FlipRule) -> Table | None:
    """Put tasks in rows, cells in columns: samples lost and gained; None without a full cache."""
    found = counts(run, rule)
    if not found:
        return None
    by_key = {(one.task, one.cell): one for one in found}
    cells = [cell for cell in run.cells if (TOTAL, cell) in by_key]
    header = ("task", "n", "answered well", *cells)
    rows = []
    for task in dict.fromkeys(one.task for one in found):
        here = [by_key.get((task, cell)) for cell in cells]
        known = [one for one in here if one]
        sizes = span({one.n for one in known}), span({one.well for one in known})
        rows.append((task, *sizes, *(f"-{one.lost} +{one.gained}" if one else "" for one in here)))
    totals = [by_key[TOTAL, cell] for cell in cells]
    rows.append(("net", "", "", *(f"{one.net:+d}" for one in totals)))
    rows.append(
        ("lost, % of answered well", "", "", *(number(100 * one.lost_share, ".1f") for one in totals))
    )
    data = [_count_data(one) for one in found]
    return Table(
        name="flips",
        title=f"Samples lost and gained against {run.full_cell}",
        caption=f"-a +b: a samples lost that {run.full_cell} answers well and the cell does not, b "
        f"gained the other way round; net: b - a: {setting(run)}. {rule.sentence} Of methods that "
        "draw, seeds are averaged first. Only samples that both hold count.",
        header=header,
        rows=tuple(rows),
        notes=(*gaps(run), *_left_out(run)),
        data=tidy(run, data, [*data[0]]),
        subject=subject(run),
        cells=tuple(range(3, len(header))),
        averages=tuple(range(len(rows) - 3, len(rows))),
    )


def shared_table(run: Run, rule: FlipRule) -> Table | None:
    """Say how far the methods of each budget lose the same samples; None without two."""
    found = shared_losses(run, rule)
    if not found:
        return None
    rows = [
        (
            one.task,
            one.budget,
            str(len(one.cells)),
            str(one.well),
            str(one.by_any),
            str(one.by_all),
            number(100 * one.share, ".1f"),
            number(100 * one.by_chance, ".1f"),
            ", ".join(f"{parse_name(cell).variant} {lost}" for cell, lost in one.alone.items() if lost),
        )
        for one in found
    ]
    data = [_shared_data(one) for one in found]
    return Table(
        name="flips_in_common",
        title="Samples that all methods of a budget lose",
        caption=f"Of the samples that any method of a budget loses, the share that all of them lose: "
        f"{setting(run)}. {rule.sentence} By chance: the share, if methods lost as many of each task's "
        "samples, but independently. A share well above it says that it is the sample, near it that it "
        "is the method. Alone: samples that one method loses and no other.",
        header=_SHARED_HEADER,
        rows=tuple(rows),
        notes=(*gaps(run), *_left_out(run)),
        data=tidy(run, data, [*data[0]]),
        subject=subject(run),
        averages=tuple(i for i, one in enumerate(found) if one.task == TOTAL),
    )


def property_table(run: Run, rule: FlipRule) -> Table | None:
    """Compare samples lost with samples kept; None where neither side of any task has two."""
    found = properties(run, rule)
    if not found:
        return None
    rows = []
    data = []
    for one in found:
        shown = one.difference.estimate()
        counts = str(len(one.tasks)), str(one.lost), str(one.kept)
        means = f"{one.of_lost:.1f}", f"{one.of_kept:.1f}", score_text(one.difference, "+")
        ps = number(one.p, ".4f"), number(one.p_adjusted, ".4f")
        rows.append((one.cell, one.name, *counts, *means, *ps))
        name = parse_name(one.cell)
        data.append(
            {
                "method": name.variant,
                "budget": str(name.budget),
                "property": one.name,
                "tasks": len(one.tasks),
                "lost": one.lost,
                "kept": one.kept,
                "mean_of_lost": one.of_lost,
                "mean_of_kept": one.of_kept,
                "difference": shown.value,
                "ci_low": shown.low,
                "ci_high": shown.high,
                "p": one.p,
                "p_adjusted": one.p_adjusted,
            }
        )
    return Table(
        name="flip_properties",
        title="What goes with a lost sample",
        caption=f"Samples that {run.full_cell} answers well, those lost beside those kept: "
        f"{setting(run)}. {rule.sentence} Means are within tasks, of those with two samples or more on "
        f"either side, and then over tasks, by what each can tell. In brackets: {INTERVAL} of each "
        f"side. p: {SHUFFLES:,} draws of what is lost within each task, adjusted by Holm over the "
        f"{len(found)} rows. What goes with a loss need not cause it.",
        header=_PROPERTY_HEADER,
        rows=tuple(rows),
        notes=tuple(gaps(run)),
        data=tidy(run, data, [*data[0]]),
        subject=subject(run),
        naming=(0,),
    )


def rate_table(run: Run, rule: FlipRule) -> Table | None:
    """Put groups in rows, cells in columns: how many samples are lost; None without groups."""
    found = rates(run, rule)
    if not found:
        return None
    cells = list(dict.fromkeys(one.cell for one in found))
    by_key = {(one.name, one.value, one.cell): one for one in found}
    header = ("by", "value", *cells)
    rows = []
    for name, value in dict.fromkeys((one.name, one.value) for one in found):
        here = [by_key.get((name, value, cell)) for cell in cells]
        rows.append((name, str(value), *(f"{one.lost} of {one.well}" if one else "" for one in here)))
    data = [
        {
            "method": parse_name(one.cell).variant,
            "budget": str(parse_name(one.cell).budget),
            "by": one.name,
            "value": one.value,
            "well": one.well,
            "lost": one.lost,
        }
        for one in found
    ]
    return Table(
        name="flips_by_group",
        title="Samples lost by group",
        caption=f"Of the samples of a group that {run.full_cell} answers well, those that a cell "
        f"loses, over all tasks: {setting(run)}. {rule.sentence}",
        header=header,
        rows=tuple(rows),
        notes=tuple(gaps(run)),
        data=tidy(run, data, [*data[0]]),
        subject=subject(run),
        cells=tuple(range(2, len(header))),
    )


def flipped_samples(run: Run, rule: FlipRule) -> pd.DataFrame:
    """Return a line a flipped sample, with both scores, for those who want to look at it."""
    rows = []
    for one in flips(run, rule):
        full, own = points(run, one.task, run.full_cell or ""), points(run, one.task, one.cell)
        name = parse_name(one.cell)
        rows += [
            {
                "task": one.task,
                "method": name.variant,
                "budget": str(name.budget),
                "id": sample,
                "flip": flip,
                "score_full": full[sample],
                "score": own[sample],
            }
            for flip, samples in (("lost", one.lost), ("gained", one.gained))
            for sample in samples
        ]
    columns = ["task", "method", "budget", "id", "flip", "score_full", "score"]
    return tidy(run, rows, columns)


def _left_out(run: Run) -> list[str]:
    names = without_flips(run)
    if not names:
        return []
    return [f"No flips of {', '.join(names)}: their scores are no points of 0 to 100."]


def _count_data(one: Count) -> dict[str, Any]:
    name = parse_name(one.cell)
    return {
        "task": one.task,
        "method": name.variant,
        "budget": str(name.budget),
        "n": one.n,
        "well": one.well,
        "lost": one.lost,
        "gained": one.gained,
        "net": one.net,
        "lost_share": one.lost_share,
    }


def _shared_data(one: Shared) -> dict[str, Any]:
    return {
        "task": one.task,
        "budget": one.budget,
        "methods": ", ".join(parse_name(cell).variant for cell in one.cells),
        "well": one.well,
        "by_any": one.by_any,
        "by_all": one.by_all,
        "share": one.share,
        "by_chance": one.by_chance,
        "alone": ", ".join(f"{parse_name(cell).variant} {lost}" for cell, lost in one.alone.items()),
    }
