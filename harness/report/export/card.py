"""A reproducibility card: what a paper's checklist asks of an experiment, answered from run.json.

The questions are those of the NeurIPS paper checklist that concern experiments: settings and details,
statistical significance, compute, access to data and code, licences. What a run did not record is said
to be not recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.judgement import Judgement
from harness.report.bootstrap import RESAMPLES, SEED
from harness.report.columns import TABLE
from harness.report.contrasts import LEVEL, contrasts, contrasts_by_task
from harness.report.exchanges import exchanges_of
from harness.report.export.markdown import markdown_table
from harness.report.gates import gates, summary_lines
from harness.report.missed import missed_budgets
from harness.report.names import cell_label
from harness.report.published import Reference
from harness.report.run import Run
from harness.report.words import code_digest, gaps, sample_counts, subject

NOT_RECORDED = "not recorded"

_INTRODUCTION = (
    "What a checklist asks of an experiment, answered from the run's own record (`run.json`, which "
    "holds the whole configuration). Written anew with each report."
)


def card(runs: Sequence[Run], judgements: Sequence[Judgement], references: Sequence[Reference]) -> str:
    """Return the card of one or more runs as Markdown; each that was joined has its own part."""
    parts = [f"# Reproducibility card\n\n{_INTRODUCTION}\n"]
    judged = [
        (source, judgement, f" in {source.output_dir}" if joined.joined else "")
        for joined, judgement in zip(runs, judgements, strict=True)
        for source in joined.sources
    ]
    for run, judgement, place in judged:
        parts.append(f"## {_plain(subject(run) + place)}\n")
        for title, answers in _questions(run, judgement, references):
            listed = "".join(f"- **{name}**: {answer}\n" for name, answer in answers)
            parts.append(f"### {title}\n\n{listed}")
        parts.append(f"### Cells\n\n{_cells(run)}")
        parts.append(f"### Tasks\n\n{_tasks(run)}")
    return "\n".join(parts)


def _questions(
    run: Run, judgement: Judgement, references: Sequence[Reference]
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each heading with its questions and answers."""
    yield "Setting and details", list(_details(run))
    yield "Statistical significance", list(_statistics(run, judgement))
    yield "What was chosen, and how", list(_choices(run, judgement))
    yield "Compute", list(_compute(run))
    yield "Code, data and their terms", list(_access(run))
    yield "Deviations and gates", list(_deviations(run, references))


def _details(run: Run) -> Iterator[tuple[str, str]]:
    model = ("config", "model")
    yield "Model", _value(run.model)
    yield "Weights", _value(run.recorded("fingerprint", "weights"))
    yield "Data type", _value(run.recorded("dtype"))
    yield "Quantised", _value(run.recorded(*model, "quantize"), absent=_none_if_known(run, *model))
    yield "Longest prompt", _value(run.recorded(*model, "max_length"), " tokens, before the chat wrap")
    yield "Chat wrap", _value(run.recorded(*model, "chat"))
    yield "Benchmark", _value(run.recorded("config", "benchmark") or run.benchmark)
    yield "Decoding", "greedy; the longest answer of each task is listed below"
    yield "Policy of the cache", _value(run.recorded("policy"))
    yield "Question", _value(run.recorded("question"), " the prompt that is compressed")
    yield "Batch size", _value(run.recorded("config", "batch_size"))


def _statistics(run: Run, judgement: Judgement) -> Iterator[tuple[str, str]]:
    yield (
        "Intervals",
        f"95%, percentiles of {RESAMPLES:,} bootstrap resamples of a task's samples (generator seeded "
        f"with {SEED} and the sample ids). Cells that hold the same samples are resampled alike, so "
        "differences are paired; the average resamples within tasks; samples of one context are drawn "
        "together",
    )
    yield (
        "What they cover",
        "which samples were drawn; neither other models, prompts and training, nor, for methods that "
        "draw, the seed, which is averaged within a sample first (its spread is in the contrasts)",
    )
    family, by_task = len(contrasts(run)), len(contrasts_by_task(run))
    yield (
        "Tests",
        "two-sided paired sign-flip permutation tests over samples, adjusted by Holm's method within "
        f"each family: {family} contrasts on the average and on KL ({exchanges_of(family):,} "
        f"exchanges, or all), {by_task:,} by task ({exchanges_of(by_task):,}); better means adjusted p "
        f"below {LEVEL:g}",
    )
    yield (
        "Equivalence",
        f"the 90% interval of the difference lies within {judgement.margin:g} points of 0",
    )
    yield (
        "Samples",
        f"{sample_counts(run)} a task; with one, or one context, there is neither interval nor verdict",
    )


def _choices(run: Run, judgement: Judgement) -> Iterator[tuple[str, str]]:
    yield "Budgets", "given with the cells, and listed below with what was achieved"
    thresholds = _thresholds(run)
    yield (
        "Thresholds of merging",
        NOT_RECORDED
        if thresholds is None
        else "; ".join(thresholds)
        or "no cell takes calibrated ones: a budget is met by count, or a fixed cosine is an option",
    )
    yield "Margin of equivalence", f"{judgement.margin:g} points ({_origin(run, 'margin')})"
    yield "Rule for flips", f"{judgement.flips.sentence.rstrip('.')} ({_origin(run, 'flips')})"
    seeds = sorted(run.values("seed"))
    yield "Seeds", f"{', '.join(map(str, seeds)) or 'none'}; a method that does not draw has the first"
    yield "Samples left out", _limit(run)


def _compute(run: Run) -> Iterator[tuple[str, str]]:
    hardware = ("hardware",)
    memory = run.recorded(*hardware, "memory_bytes")
    yield "Device", _value(run.recorded("device"))
    yield "Processor", _value(run.recorded(*hardware, "cpu"))
    yield (
        "Cores and threads",
        f"{_value(run.recorded(*hardware, 'cores'))} and {_value(run.recorded(*hardware, 'threads'))}",
    )
    yield "Memory", f"{memory / 2**30:.1f} GiB" if isinstance(memory, int | float) else NOT_RECORDED
    gpus = run.recorded(*hardware, "gpus")
    yield "GPUs", ("none" if gpus == [] else _value(gpus))
    yield "System", _value(run.recorded(*hardware, "system"))
    yield "Wall time", _wall_time(run)
    yield "Shards", _value(run.recorded("num_shards"))


def _access(run: Run) -> Iterator[tuple[str, str]]:
    commit = run.recorded("git", "commit")
    dirty = " with local changes, which are not recorded" if run.recorded("git", "dirty") else ""
    yield "Commit", _value(commit) + (dirty if commit else "")
    yield "Digest of the code", _value(code_digest(run))
    yield "Python", _value(run.recorded("hardware", "python"))
    packages = run.recorded("packages")
    known = packages if isinstance(packages, Mapping) else {}
    yield (
        "Packages",
        ", ".join(f"{_value(name)} {_value(version)}" for name, version in known.items() if version)
        or NOT_RECORDED,
    )
    weights = run.recorded("fingerprint", "weights")
    yield (
        "Revision of the model",
        _value(
            run.recorded("config", "model", "revision"),
            absent="see the weights above" if weights else NOT_RECORDED,
        ),
    )
    yield "Revision of the data", "the SHA-256 of each task's file is listed below"
    yield "Licences of model and data", f"{NOT_RECORDED} by the run; see their sources"
    yield "Records", "every answer with its score is in `predictions/` of the run"


def _deviations(run: Run, references: Sequence[Reference]) -> Iterator[tuple[str, str]]:
    lines = [line for _, line in summary_lines(gates(run, references))]
    yield "Gate", " ".join(map(_plain, lines)) or "nothing published to hold the full cache against"
    notes = run.recorded("notes")
    yield (
        "Notes of the run",
        NOT_RECORDED if notes is None else " ".join(_plain(str(note)) for note in notes) or "none",
    )
    missed = missed_budgets(run)
    yield (
        "Missed budgets",
        "; ".join(_plain(f"{cell_label(cell)}: {kept}") for cell, kept in missed.items()) or "none",
    )
    yield "Missing", " ".join(map(_plain, gaps(run))) or "nothing: every cell has its samples"


def _cells(run: Run) -> str:
    """Return the cells with all settings of their methods and what they kept."""
    (achieved,) = [column for column in TABLE if column.name == "budget_achieved_mean"]
    rows = []
    for cell in run.cells:
        values = run.over_tasks(cell)
        mean, low, high = (
            achieved.text(values.get(name, float("nan")))
            for name in ("budget_achieved_mean", "budget_achieved_min", "budget_achieved_max")
        )
        rows.append(
            (
                _plain(cell_label(cell)),
                _value(cell),
                f"{mean} [{low}, {high}]" if mean else "",
                _value(run.recorded("fingerprint", "cells", cell)),
            )
        )
    header = ("cell", "name in files", "achieved budget [smallest, largest]", "settings")
    return markdown_table(header, rows, numeric=())


def _tasks(run: Run) -> str:
    rows = [
        (
            _value(task),
            _value(metric),
            _value(run.recorded("tasks", task, "samples")),
            sample_counts(run, [task]),
            _value(run.recorded("tasks", task, "max_new_tokens")),
            _value(run.recorded("fingerprint", "data", task)),
        )
        for task, metric in run.tasks.items()
    ]
    header = ("task", "metric", "samples there", "samples run", "longest answer", "SHA-256 of its data")
    return markdown_table(header, rows, numeric=())


def _thresholds(run: Run) -> list[str] | None:
    """Name the calibrated thresholds that cells take; None where settings are not recorded."""
    cells = run.recorded("fingerprint", "cells")
    if not isinstance(cells, Mapping):
        return None
    return [
        f"{_plain(cell_label(cell))}: calibrated ones, {_value(settings['thresholds'])}"
        for cell, settings in cells.items()
        if isinstance(settings, Mapping) and settings.get("thresholds")
    ]


def _limit(run: Run) -> str:
    config = run.recorded("config")
    if not isinstance(config, Mapping) or "limit" not in config:
        return NOT_RECORDED
    limit = config["limit"]
    return "none" if limit is None else f"all but {_value(limit)} of each task (`limit={limit}`)"


def _wall_time(run: Run) -> str:
    """Return how long the run took, all its starts together."""
    runs = run.recorded("runs")
    seconds = [each.get("seconds") for each in runs or () if isinstance(each, Mapping)]
    known = [value for value in seconds if isinstance(value, int | float)]
    if not known:
        return NOT_RECORDED
    whole = "" if len(known) == 1 else f", in {len(known)} starts"
    part = ", of shard 0 alone" if (run.recorded("num_shards") or 1) > 1 else ""
    return f"{sum(known):,.0f} s{whole}{part}"


def _origin(run: Run, name: str) -> str:
    config = run.recorded("config")
    recorded = isinstance(config, Mapping) and name in config
    return "of the run or of this report's command" if recorded else "this report's"


def _none_if_known(run: Run, *path: str) -> str:
    return "no" if run.recorded(*path) is not None else NOT_RECORDED


def _value(value: Any, unit: str = "", absent: str = NOT_RECORDED) -> str:
    """Return a value as code, which Markdown leaves as it is; numbers plain."""
    if value is None:
        return absent
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}{unit}" if isinstance(value, float) else f"{value}{unit}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    inner = f" {text} " if longest or not text else text
    return f"{fence}{inner}{fence}{unit}"


def _plain(text: str) -> str:
    """Return a text whose marks Markdown and HTML leave as they are, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))
