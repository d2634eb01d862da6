"""Turn finished runs into tables, plots and one self-contained HTML page.

python -m harness.report results/runs/mini/mini/smollm2-135m
python -m harness.report DIR DIR ... --out results/report

Cells of one model and benchmark come into one table, from however many folders; --separate gives each
folder its own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.judgement import FlipRule, Judgement, check_flip_points, check_margin
from harness.report.answers import answers, in_short
from harness.report.export.card import card
from harness.report.export.every_eval_ever import write_every_eval_ever
from harness.report.export.tables import write_table
from harness.report.joined import join_all
from harness.report.names import benchmark_label, model_label
from harness.report.noise import find_floor, load_floor
from harness.report.page.html import Part, Section, render_page
from harness.report.page.samples import browser_of, task_samples
from harness.report.plots.draw import draw_all
from harness.report.plots.style import Look, looks
from harness.report.published import Reference, load_references
from harness.report.run import Run, load_run
from harness.report.submission import report_submissions
from harness.report.summary import summarise, to_csv, write_summary
from harness.report.tables.budgets import budget_table
from harness.report.tables.contrasts import contrast_by_task_table, contrast_table
from harness.report.tables.flips import (
    flip_table,
    flipped_samples,
    property_table,
    rate_table,
    shared_table,
)
from harness.report.tables.lengths import length_by_task_table, length_table
from harness.report.tables.noise import noise_tables
from harness.report.tables.published import gate_table, reference_table
from harness.report.tables.runs import runs_table
from harness.report.tables.scores import difference_table, group_tables, score_table
from harness.report.tables.table import Table
from harness.report.terminal import print_floor
from harness.report.words import all_made_by, count_tasks, ran_with, sample_counts
from harness.results import is_observed
from harness.variants import is_noise
from kvmerge.command import exits
from kvmerge.errors import UserError
from kvmerge.files import write_atomically

_OUT = Path("results/report")


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user error prints one message and gives exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("output_dir", nargs="+", type=Path, help="folder that a run wrote")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for the report (default: the output_dir itself; {_OUT} for several)",
    )
    parser.add_argument(
        "--separate",
        action="store_true",
        help="give each folder its own tables (default: cells of one model and benchmark share them)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="points by which scores may differ and count as equivalent "
        f"(default: that of the run; {Judgement.margin:g} for one that has none)",
    )
    parser.add_argument(
        "--flip-well",
        type=float,
        help="points from which a sample is answered well, which a cell may then lose "
        f"(default: that of the run; {FlipRule.well:g})",
    )
    parser.add_argument(
        "--flip-drop",
        type=float,
        help="points by which the other answer is worse, for it to be lost "
        f"(default: that of the run; {FlipRule.drop:g})",
    )
    parser.add_argument(
        "--noise",
        type=Path,
        help="folder that experiment=noise wrote with the same model and benchmark "
        "(default: that of the run, or where such an experiment writes)",
    )
    arguments = parser.parse_args(argv)
    observed = [folder for folder in arguments.output_dir if is_observed(folder)]
    floors = [folder for folder in arguments.output_dir if is_noise(folder)]
    answered = [folder for folder in arguments.output_dir if folder not in (*observed, *floors)]
    _check_given(arguments, answered)
    if arguments.out and (observed or floors) and len(arguments.output_dir) > 1:
        raise UserError(
            "--out takes one run that observes or measures noise at a time; leave it out for several."
        )
    for folder in floors:
        report_noise(folder, Console(), arguments.out)
    for folder in observed:
        _report_observed(folder, arguments.out)
    if answered:
        runs = _load_all(answered)
        if not arguments.separate:
            runs = join_all(runs)
        for remark in (remark for run in runs for remark in run.remarks):
            print(remark, file=sys.stderr)
        noise = None if arguments.noise is None else str(arguments.noise)
        given = arguments.margin, arguments.flip_well, arguments.flip_drop, noise
        print(write_report(runs, arguments.out, [run.judgement.but(*given) for run in runs]))
    return 0


def report_noise(folder: Path, console: Console, out: Path | None = None) -> None:
    """Write tables/ of a noise run, by default into its own folder, and print them.

    Raises:
        UserError: as `load_floor` does.
    """
    floor = load_floor(folder)
    for table in noise_tables(floor):
        write_table(table, (out or folder) / "tables")
    print_floor(floor, console)


def _report_observed(folder: Path, out: Path | None) -> None:
    from harness.report.observed.page import print_claims, write_observed  # late: they import torch
    from harness.report.observed.run import load_observed

    run = load_observed(folder)
    print_claims(run, write_observed(run, out), Console())


def _check_given(arguments: argparse.Namespace, answered: Sequence[Path]) -> None:
    """Raise `UserError` for what cannot be judged by, and where there is nothing to judge."""
    given = {
        "--margin": arguments.margin,
        "--flip-well": arguments.flip_well,
        "--flip-drop": arguments.flip_drop,
        "--noise": arguments.noise,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and not answered:
        raise UserError(
            f"{' and '.join(given)}: what observes, or measures noise, compares nothing that could be "
            "judged by it. Leave it out."
        )
    for name, value in given.items():
        if name == "--margin":
            check_margin(value, f"{name} ")
        elif name != "--noise":
            check_flip_points(value, f"{name} ")


def _load_all(output_dirs: Sequence[Path]) -> list[Run]:
    """Read runs. Raises `UserError` where one cannot be read or is given twice."""
    resolved = [output_dir.resolve() for output_dir in output_dirs]
    twice = [str(given) for i, given in enumerate(output_dirs) if resolved[i] in resolved[:i]]
    if twice:
        raise UserError(f"{', '.join(twice)} is given twice. Give each output_dir once.")
    return [load_run(output_dir) for output_dir in output_dirs]


def write_report(
    runs: Sequence[Run], out: Path | None = None, judgements: Sequence[Judgement] | None = None
) -> Path:
    """Write each summary.csv, and the report's files; return the page's path.

    These are tables/, plots/, every_eval_ever/, card.md and report.html. Several runs have one folder
    each below the former three, and one table of all of them; a summary of joined runs is in tables/. A
    run on the ZeroSCROLLS test split also gets its submissions/ (`harness.report.submission`).

    Args:
        runs: what was answered.
        out: folder for the report; None: the output_dir of one run, `results/report` for several,
            joined ones too.
        judgements: which differences count, for each run; None: what it was given.
    """
    sources = [source for run in runs for source in run.sources]
    out = out or (sources[0].output_dir if len(sources) == 1 else _OUT)
    for source in sources:
        write_summary(source)
        report_submissions(source)
    judgements = judgements or [run.judgement for run in runs]
    references = load_references()
    by_method = looks(runs)
    sections = [
        _section(run, slug, references, by_method, judgement)
        for run, slug, judgement in zip(runs, _slugs(runs), judgements, strict=True)
    ]
    several = len(runs) > 1
    for section, run, judgement in zip(sections, runs, judgements, strict=True):
        below = section.slug if several else ""
        for table in section.tables:
            write_table(table, out / "tables" / below)
        if run.joined:
            write_atomically(out / "tables" / below / "summary.csv", to_csv(summarise(run)))
        flipped = flipped_samples(run, judgement.flips)
        write_atomically(out / "tables" / below / "flipped_samples.csv", to_csv(flipped))
        for plot in section.plots:
            plot.write(out / "plots" / below)
        for samples in section.samples:
            samples.write(out, section.slug)
        write_every_eval_ever(run, out / "every_eval_ever" / below)
    overview = runs_table(runs) if several else None
    if overview:
        write_table(overview, out / "tables")
    write_atomically(out / "card.md", card(runs, judgements, references))
    page = out / "report.html"
    titled = sections[0].title if overview is None else "all runs"
    write_atomically(page, render_page(f"KV-cache compression: {titled}", sections, overview))
    return page


def _section(
    run: Run,
    slug: str,
    references: Sequence[Reference],
    by_method: Mapping[str, Look],
    judgement: Judgement,
) -> Section:
    margin, noise = judgement.margin, find_floor(run, judgement)
    parts: dict[str, list[Table | None]] = {
        "Contrasts": [
            contrast_table(run, margin, noise),
            contrast_by_task_table(run, margin, noise),
            *(noise_tables(noise.floor) if noise.floor else ()),
        ],
        "Scores": [
            gate_table(run, references),
            score_table(run, references),
            difference_table(run),
            *group_tables(run),
            reference_table(run, references),
        ],
        "Flips": [
            flip_table(run, judgement.flips),
            shared_table(run, judgement.flips),
            property_table(run, judgement.flips),
            rate_table(run, judgement.flips),
        ],
        "Lengths": [length_table(run), length_by_task_table(run)],
        "Budgets": [budget_table(run)],
    }
    drawn = draw_all(run, by_method, judgement)
    samples = task_samples(run, judgement.flips, slug)
    return Section(
        slug=slug,
        title=f"{model_label(run.model)} on {benchmark_label(run.benchmark)}"
        + ", the question after the compression" * run.asks_after,
        about=tuple(_about(run)),
        short=in_short(run, judgement),
        answers=tuple(answers(run, judgement, references)),
        parts=tuple(
            Part(title.lower(), title, tuple(table.of(run) for table in tables if table))
            for title, tables in parts.items()
            if any(tables)
        ),
        plots=drawn.plots,
        undrawn=drawn.notes,
        samples=tuple(samples),
        browser=browser_of(run, samples, judgement.flips, slug),
        provenance=(*ran_with(run).items(), *_provenance(run)),
    )


def _about(run: Run) -> Iterator[str]:
    """Yield what a run measured on what, a fact each."""
    yield f"{count_tasks(len(run.tasks))} of {sample_counts(run)} samples"
    yield f"{len(run.cells)} cells"
    yield from all_made_by(run)
    ended = [
        str(each["ended"])
        for source in run.sources
        for each in source.info.get("runs", [])
        if each.get("ended")
    ]
    if ended:
        yield f"finished {(max(ended) if run.joined else ended[-1])[:10]}"
    yield from (str(source.output_dir) for source in run.sources)


def _provenance(run: Run) -> Iterator[tuple[str, str]]:
    """Yield every leaf of run.json; of joined runs each folder's, below its name."""
    for source in run.sources:
        if run.joined:
            yield "folder", str(source.output_dir)
        yield from _flatten(source.info)


def _slugs(runs: Sequence[Run]) -> list[str]:
    names = [re.sub(r"[^\w.-]+", "-", f"{run.benchmark}-{run.model}") for run in runs]
    return [
        name if names.count(name) == 1 else f"{name}-{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf of run.json with its dotted path; lists stay whole."""
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flatten(child, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
