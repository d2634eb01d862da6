"""What every table and figure says of the numbers in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from harness.columnar import Records
from harness.report.bootstrap import RESAMPLES
from harness.report.missed import missed_budgets, missed_notes
from harness.report.run import Run

INTERVAL = f"95% percentile bootstrap interval over samples, {RESAMPLES:,} resamples"


def sample_counts(run: Run, tasks: Iterable[str] | None = None) -> str:
    """Return how many samples a task has, as `5` or `5 to 200`."""
    wanted = set(run.tasks if tasks is None else tasks)
    counts = {len(samples.ids) for (task, _), samples in run.samples.items() if task in wanted}
    return span(counts) if counts else "0"


def span(counts: Collection[int]) -> str:
    """Return `5`, or `5 to 200` where numbers differ."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def subject(run: Run) -> str:
    """Name the model and the benchmark."""
    return f"{run.model} on {run.benchmark}"


def setting(run: Run) -> str:
    """Write one line that says what every number of a run was measured on."""
    seeds = sorted(run.values("seed"))
    parts = [
        subject(run),
        f"n = {sample_counts(run)} samples a task",
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
    ]
    return ", ".join([*parts, *all_made_by(run)])


def all_made_by(run: Run) -> list[str]:
    """Say what made the numbers of a run, or of those that it was joined from: each fact once."""
    return list(dict.fromkeys(part for source in run.sources for part in made_by(source.info)))


def made_by(info: Mapping[str, Any]) -> list[str]:
    """Say what made a run's numbers, as far as its run.json tells: dtype, device and commit."""
    parts = [
        value.removeprefix("torch.")
        for name in ("dtype", "device")
        if isinstance(value := info.get(name), str)
    ]
    git = info.get("git")
    if isinstance(git, Mapping) and isinstance(commit := git.get("commit"), str):
        modified = " with local changes" if git.get("dirty") else ""
        parts.append(f"commit {commit[:10]}{modified}")
    return parts


def code_digest(run: Run) -> str | None:
    """Return one digest of the code that made a run; None where it is not recorded.

    A fingerprint has one for each module, by cell where they are a method's own; those of earlier
    versions had one over all code.
    """
    shared, methods = run.recorded("fingerprint", "code"), run.recorded("fingerprint", "methods")
    if not isinstance(shared, Mapping):
        return None if shared is None else str(shared)
    text = json.dumps([shared, methods], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def count_tasks(count: int) -> str:
    """Return `1 task`, `2 tasks`."""
    return f"{count} task" if count == 1 else f"{count} tasks"


def task_label(run: Run, task: str) -> str:
    """Name a task, and say where a lower score is the better one."""
    better = run.metrics[task].higher_is_better
    return task if better else f"{task} ({run.tasks[task]}, lower is better)"


NOT_RECORDED = "not recorded"


def ran_with(run: Run) -> dict[str, str]:
    """Say in which batches, with how many threads and by which kernels the samples of a run ran."""
    found = {
        label: run.values(name)
        for label, name in (
            ("samples a batch", "batch_samples"),
            ("threads", "threads"),
            ("kernel", "kernel"),
        )
    }
    return {label: _listed(values) for label, values in found.items()}


def ran_otherwise(run: Run) -> list[str]:
    """Name the tasks whose cells ran with other threads or another kernel than each other.

    A difference between such cells may be what that alone makes. How many samples shared a batch
    differs within every run. A prefill through a mask, and column sums by a kernel of their own, belong
    to the method.
    """
    return run.once("ran otherwise", lambda: _ran_otherwise(run))


def _ran_otherwise(run: Run) -> list[str]:
    tasks: dict[str, list[str]] = {}
    ran = {
        key: [
            (threads, (kernel or NOT_RECORDED).replace("+triton", ""))
            for threads, kernel in Records.of(records).distinct("threads", "kernel")
            if not (kernel or "").startswith("masked")
        ]
        for key, records in run.records.items()
    }
    for place, what in enumerate(("threads", "kernels")):
        for task in run.tasks:
            by_cell = {
                frozenset(way[place] for way in ran[task, cell])
                for cell in run.cells
                if (task, cell) in ran
            }
            if len(by_cell - {frozenset()}) > 1:
                tasks.setdefault(f"{what}: {_listed(set().union(*by_cell))}", []).append(task)
    return [
        f"The cells of {', '.join(of_tasks)} did not all run with the same {what}."
        for what, of_tasks in tasks.items()
    ]


def _listed(values: Collection[Any]) -> str:
    known = sorted(value for value in values if value is not None)
    texts = list(map(str, known)) + [NOT_RECORDED] * (None in values)
    return ", ".join(texts)


def shared_contexts(run: Run) -> list[str]:
    """Name the tasks whose samples are not independent, and what is made of that."""
    by_counts: dict[tuple[int, int], list[str]] = {}
    for task, counts in run.sharing.items():
        by_counts.setdefault(counts, []).append(task)
    listed = "; ".join(
        f"{n} samples on {contexts} context{'s' * (contexts > 1)} in {', '.join(tasks)}"
        for (n, contexts), tasks in by_counts.items()
    )
    return (
        [
            f"Samples that share a context are not independent ({listed}): intervals resample whole "
            "contexts, and tests exchange them whole."
        ]
        if listed
        else []
    )


def gaps(run: Run) -> list[str]:
    """Name how cells came together, tasks whose samples share contexts, cells without records, tasks
    whose cells do not compare, and missed budgets.

    Those hold different samples, or were run otherwise.
    """
    by_tasks: dict[str, list[str]] = {}
    for cell in run.cells:
        missing = [task for task in run.tasks if (task, cell) not in run.records]
        if missing:
            by_tasks.setdefault(", ".join(missing), []).append(cell)
    notes = [*run.remarks, *shared_contexts(run), *ran_otherwise(run)]
    notes += [
        f"Blank, as there are no records: {', '.join(cells)} on {tasks}."
        for tasks, cells in by_tasks.items()
    ]
    for task in run.tasks:
        ids = [run.samples[task, cell].ids for cell in run.cells if (task, cell) in run.samples]
        if len(set(ids)) > 1:
            counts = span([len(names) for names in ids])
            notes.append(
                f"The cells of {task} hold different samples (n = {counts}), "
                "so their scores do not compare until the run is finished."
            )
    return [*notes, *missed_notes(missed_budgets(run))]
