"""What a run would do and cost, as `dry_run=true` prints it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean

from rich.console import Console
from rich.table import Table

from benchmarks.source import NeedsDownload, no_downloads
from benchmarks.task import Task
from harness.lock import check_writer
from harness.observation import Observed
from harness.observing import pending_observations
from harness.plan.cost import Cost, Machine, Range, costs, machine_of
from harness.plan.estimate import entries
from harness.plan.sizes import Sizes, sizes_of
from harness.plan.tokens import Tokens, count_tokens, describe_count, error_of
from harness.ready import Ready, get_ready
from harness.runner import left
from harness.settings import Settings

_CALIBRATE = (
    "time and memory: not known, as this machine was not measured with this model. "
    "`make calibrate-speed` does it in about two minutes (ARGS='model=...' for another model); or name "
    "a card, e.g. plan.device=a100-80."
)


def print_plan(settings: Settings, console: Console, found: Ready | None = None) -> None:
    """Make the checks of a run, and print samples, answers and the estimated cost of what is left.

    Writes nothing.

    Args:
        settings: the run.
        console: where it is printed.
        found: what is left, where the checks were made already.

    Raises:
        UserError: where the run would end with it in its first seconds.
    """
    with told_of_downloads(settings, console):
        _print(settings, console, found or _checked(settings))


@contextmanager
def told_of_downloads(settings: Settings, console: Console) -> Iterator[None]:
    """Hold downloads back inside the block, and end it with a sentence where data would need one."""
    try:
        with no_downloads():
            yield
    except NeedsDownload as error:
        console.print(
            f"{error} A run fetches it first; `python scripts/data.py fetch "
            f"{settings.benchmark.name}` does only that. What the run costs is known then.",
            soft_wrap=True,
            highlight=False,
        )


def _checked(settings: Settings) -> Ready:
    """Return what is left to answer, or to observe. Raises `UserError` as a run does."""
    check_writer(settings.results_dir)
    if settings.observe is None:
        return left(settings)
    observed = Observed(settings.results_dir)
    return get_ready(
        settings, observed, lambda: pending_observations(settings, observed), downloads=False
    )


def _print(settings: Settings, console: Console, found: Ready) -> None:
    tokens = count_tokens(settings, found)
    sizes = sizes_of(settings.model, found.model) if found.jobs else None
    machine = None if sizes is None else machine_of(settings, sizes)
    cost = {} if sizes is None or machine is None else costs(settings, tokens, sizes, machine)
    console.print(_tasks(settings, tokens))
    if sizes is not None and settings.observe is None:
        console.print(_caches(settings, tokens, sizes))
    if cost:
        console.print(_times(settings, cost))
    lines = [describe_count(len(found.jobs), tokens)] if found.jobs else []
    if settings.observe is None:
        lines.append("cells: " + ", ".join(cell.name for cell in settings.cells))
    lines.append(f"output_dir: {settings.output_dir}")
    if found.model is not None and found.model.download:
        lines.append(f"a run downloads first: {found.model.download}")
    if not found.jobs:
        lines.append("nothing left to run: every line is there.")
    if sizes is not None:
        lines += _work(settings, tokens, sizes)
        lines += [_CALIBRATE] if machine is None else _in_all(settings, cost, machine)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _tasks(settings: Settings, tokens: Mapping[Task, Tokens]) -> Table:
    """Return what is left of every task, and of all of them."""
    answering = settings.observe is None
    table = Table(title=f"{settings.model.name} on {settings.benchmark.name}", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("samples to run", "answers", "prompt tokens, mean", "answer tokens up to"):
        if answering or "answer" not in column:
            table.add_column(column, justify="right")
    for name, of in _each_and_all(tokens):
        jobs = sum(tokens[task].jobs for task in of)
        mean = sum(tokens[task].total for task in of) / max(1, jobs)
        row = [name, f"{jobs:,}", f"{mean:,.0f}"]
        if answering:
            answers = sum(tokens[task].answers for task in of)
            longest = max(task.max_new_tokens for task in of)
            row = [*row[:2], f"{answers:,}", row[2], str(longest)]
        table.add_row(*row)
    return table


def _each_and_all(tasks: Iterable[Task]) -> Iterator[tuple[str, list[Task]]]:
    """Yield every task by its name, then all of them where there are several."""
    every = list(tasks)
    yield from ((task.name, [task]) for task in every)
    if len(every) > 1:
        yield "all", every


def _times(settings: Settings, cost: Mapping[Task, Cost]) -> Table:
    """Return what every task takes one worker, and all of them."""
    price = settings.plan.price
    table = Table(title="without loading the model, one worker", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in (
        "time",
        "at least",
        "at most",
        "memory up to",
        *(["cost"] if price is not None else []),
    ):
        table.add_column(column, justify="right")
    for name, of in _each_and_all(cost):
        time = Range.sum([cost[task].time for task in of])
        memory = size(max(cost[task].memory for task in of))
        money = [] if price is None else [_money(time * (price / 3600))]
        table.add_row(name, *map(duration, (time.likely, time.low, time.high)), memory, *money)
    return table


def _caches(settings: Settings, tokens: Mapping[Task, Tokens], sizes: Sizes) -> Table:
    """Return what the cache of a sample takes after its prompt, by task and cell: the mean."""
    table = Table(title="cache of a sample after its prompt, mean MiB", title_justify="left")
    table.add_column("task", no_wrap=True)
    for cell in settings.cells:
        table.add_column(cell.name.replace("@", "\n@"), justify="right")
    for task, of_task in tokens.items():
        if of_task.jobs:
            means = (
                fmean(entries(cell, length) for length in of_task.counted) for cell in settings.cells
            )
            table.add_row(task.name, *(f"{sizes.entry_bytes * mean / 2**20:,.1f}" for mean in means))
    return table


def _work(settings: Settings, tokens: Mapping[Task, Tokens], sizes: Sizes) -> list[str]:
    """Say what work there is, whatever does it."""
    total = sum(of_task.total for of_task in tokens.values())
    error = round(error_of(tokens))
    answering = settings.observe is None
    lines = [
        f"prefill: one per sample{' for all cells' * answering}, {total:,}"
        f"{f' ± {error:,}' * bool(error)} tokens, about "
        f"{2 * sizes.parameters * total / 1e12:,.1f} TFLOP in the weights"
    ]
    if not answering:
        return lines
    longest = max(max(of_task.counted, default=0) for of_task in tokens.values())
    steps = sum(task.max_new_tokens * of_task.jobs for task, of_task in tokens.items())
    return [
        *lines,
        f"decode: at most {steps:,} steps, each reading {size(sizes.weight_bytes)} of weights once for "
        "all cells",
        f"full cache: {size(sizes.entry_bytes)} a token, up to {size(sizes.entry_bytes * longest)} a "
        "sample",
    ]


def _in_all(settings: Settings, cost: Mapping[Task, Cost], machine: Machine) -> list[str]:
    """Say what the whole run takes, by what figures, and of what they say nothing."""
    workers = workers_of(settings)
    time = Range.sum([of_task.time for of_task in cost.values()]) * (1 / workers) + machine.loading
    memory = max(of_task.memory for of_task in cost.values())
    lines = [
        f"time: {duration(time.likely)}, from {duration(time.low)} to {duration(time.high)}, loading "
        "included"
        + f", on {workers} workers" * (workers > 1)
        + f"; memory: up to {size(memory)} of {size(machine.memory)}"
        + f" a worker{', which is too little' * (memory > machine.memory)}",
        f"by {machine.name}",
        "the range: from answers as long as the finished ones of a task, or else of one token, to the "
        "most tokens that they may have; reports are not counted",
    ]
    if settings.plan.price is not None:
        money = time * (settings.plan.price * workers / 3600)
        lines.insert(1, f"cost: {_money(money)} at {settings.plan.price:g} an hour and worker")
    if machine.unknown:
        lines.append(
            f"not measured: {', '.join(machine.unknown)}; compression is taken for {machine.instead}"
        )
    return lines


def workers_of(settings: Settings) -> int:
    """Return how many workers answer samples at once."""
    return int((settings.resolved.get("executor") or {}).get("workers") or 1)


def duration(seconds: float) -> str:
    """Write seconds in the unit that suits them."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} s"


def _money(money: Range) -> str:
    return f"{money.likely:,.2f} ({money.low:,.2f} to {money.high:,.2f})"


def size(count: float) -> str:
    """Write a number of bytes in the unit that suits it."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 2**10:,.1f} KiB"
