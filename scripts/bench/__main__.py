"""Measure speed and memory, and write the tables to results/bench/.

    python -m scripts.bench                          # everything, on the default model
    python -m scripts.bench comparison decode        # some questions
    python -m scripts.bench --peer VENV/bin/python   # everything, and kvpress in that environment
    python -m scripts.bench gpu                      # on a CUDA card: check the kernels, then time them

Everything is what a CPU can answer: every figure of docs/performance.md. Ratios are medians over the
rounds. The exit status is 1 where a kernel is wrong, 2 after a mistake in the command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.provenance import git_state, hardware, package_versions
from harness.report.export.markdown import markdown_table
from kvmerge.command import exits, parser_of
from kvmerge.errors import UserError, unknown
from kvmerge.files import write_atomically
from scripts.bench.comparison import comparison
from scripts.bench.compression import compression
from scripts.bench.cpu_path import cpu_path
from scripts.bench.decode import decode
from scripts.bench.gpu import ON_A_CARD, REHEARSAL, gpu
from scripts.bench.measure import Bench, Report
from scripts.bench.memory import memory
from scripts.bench.peer import peer
from scripts.bench.prefill import prefill
from scripts.bench.profile import stages
from scripts.bench.proof import proof
from scripts.bench.records import records
from scripts.bench.scaling import by_cells, by_length, picture

QUESTIONS: dict[str, Callable[[Bench], list[Report]]] = {
    "comparison": lambda bench: [comparison(bench)],
    "prefill": lambda bench: [prefill(bench, 4096), prefill(bench, 8000)],
    "decode": lambda bench: [decode(bench, 1000), decode(bench, 4000), decode(bench, 8000)],
    "memory": lambda bench: [memory(bench)],
    "compression": lambda bench: [compression(bench)],
    "scaling": lambda bench: [by_length(bench), by_cells(bench)],
    "profile": lambda bench: [stages(bench)],
    "cpu_path": lambda bench: [cpu_path(bench)],
    "proof": lambda bench: [proof(bench)],
}
"""What `python -m scripts.bench` answers; `--peer` adds another."""
ON_REQUEST: dict[str, Callable[[Bench], list[Report]]] = {
    "records": lambda bench: [records(bench)],
    "gpu": lambda bench: gpu(ON_A_CARD, bench.repeats),
    "gpu_rehearsal": lambda bench: gpu(REHEARSAL, bench.repeats),
}
"""What it answers only where it is asked: it needs a card, or says nothing of the model."""


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; a user error prints one message."""
    parser = parser_of("python -m scripts.bench", __doc__)
    known = ", ".join((*QUESTIONS, *ON_REQUEST, "peer"))
    parser.add_argument("questions", nargs="*", help=f"some of {known}")
    parser.add_argument(
        "--peer", metavar="PYTHON", help="add peer: kvpress, in the environment of this Python"
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--set", nargs="*", default=[], help="settings, e.g. model=tiny-random")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder to write")
    options = parser.parse_args(argv)
    names = options.questions or list(QUESTIONS)
    if options.peer and "peer" not in names:
        names = [*names, "peer"]
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats} must be 1 or more.")
    right = run(names, Bench(options.set, options.repeats), options.out, options.peer)
    return 0 if right else 1


def run(names: Sequence[str], bench: Bench, out: Path, python: str | None = None) -> bool:
    """Answer questions one after the other, printing and writing each as it is done.

    Args:
        names: the questions.
        bench: the model under test.
        out: the folder for the tables, made where it is missing.
        python: of an environment with kvpress, for `peer`.

    Returns:
        whether no result was wrong.

    Raises:
        UserError: for a question that does not exist or that this machine cannot answer, and for
            `peer` without the Python to run it.
    """

    def peers(bench: Bench) -> list[Report]:
        return [peer(bench, str(python), length) for length in (2048, 4096)]

    known = {**QUESTIONS, **ON_REQUEST, "peer": peers}
    for name in names:
        if name not in known:
            raise unknown("benchmark", name, known)
    if "peer" in names and python is None:
        raise UserError(
            "peer needs --peer PYTHON, of an environment with kvpress; `make bench PEER=1` makes one."
        )
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    right = True
    for name in names:
        reports = known[name](bench)
        for report in reports:
            right = right and not report.wrong
            _print(report, bench, console)
            write_atomically(out / f"{report.name}.json", _json(report, bench))
            write_atomically(out / f"{report.name}.md", _markdown(report, bench))
        if name == "scaling":
            for file, content in picture(reports).items():
                write_atomically(out / file, content)
    return right


def _machine(report: Report, bench: Bench) -> str:
    machine, packages = hardware(), package_versions()
    where = ", ".join(machine["gpus"]) or machine["cpu"]
    return (
        f"{_model(report, bench)}, {_dtype(report, bench)}, {where}, {machine['threads']} threads, "
        f"torch {packages['torch']}, transformers {packages['transformers']}, median of "
        f"{bench.repeats} rounds"
    )


def _model(report: Report, bench: Bench) -> str:
    return report.model or bench.settings.model.name


def _dtype(report: Report, bench: Bench) -> str:
    return report.dtype or bench.settings.model.dtype


def _json(report: Report, bench: Bench) -> str:
    content = {
        "name": report.name,
        "title": report.title,
        "setting": report.setting,
        "target": report.target,
        "rows": report.rows,
        "raw": report.raw,
        "repeats": bench.repeats,
        "model": _model(report, bench),
        "dtype": _dtype(report, bench),
        "hardware": hardware(),
        "packages": package_versions(),
        "git": git_state(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _markdown(report: Report, bench: Bench) -> str:
    target = f" Target: {report.target}." if report.target else ""
    return (
        f"### {report.title}\n\n{markdown_table(*_cells(report), _numeric(report))}\n"
        f"{report.setting} {_machine(report, bench)}.{target}\n"
    )


def _print(report: Report, bench: Bench, console: Console) -> None:
    header, rows = _cells(report)
    table = Table(title=report.title, title_justify="left")
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position in _numeric(report) else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"{report.setting} {_machine(report, bench)}.", style="dim", highlight=False)


def _cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the header and the lines of a report's table."""
    header = list(report.rows[0]) if report.rows else ["nothing was measured"]
    return header, [[str(value) for value in row.values()] for row in report.rows]


def _numeric(report: Report) -> list[int]:
    """Return the columns without text, blanks aside."""
    columns = zip(*(row.values() for row in report.rows), strict=True)
    return [
        position
        for position, values in enumerate(columns)
        if not any(isinstance(value, str) and value for value in values)
    ]


if __name__ == "__main__":
    raise SystemExit(main())
