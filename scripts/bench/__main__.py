"""Measure speed and memory, and write the tables to results/bench/.

    python -m scripts.bench                          # everything, on the default model
    python -m scripts.bench comparison decode        # some questions
    python -m scripts.bench --peer VENV/bin/python   # everything, and kvpress in that environment

One command gives every figure of docs/performance.md. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from harness.provenance import git_state, hardware, package_versions
from kvmerge.errors import UserError, unknown
from kvmerge.files import write_atomically
from scripts.bench.comparison import comparison
from scripts.bench.compression import compression
from scripts.bench.decode import decode
from scripts.bench.measure import Bench, Report
from scripts.bench.memory import memory
from scripts.bench.peer import peer
from scripts.bench.prefill import prefill
from scripts.bench.profile import stages
from scripts.bench.scaling import by_cells, by_length, picture

QUESTIONS: dict[str, Callable[[Bench], list[Report]]] = {
    "comparison": lambda bench: [comparison(bench)],
    "prefill": lambda bench: [prefill(bench, 4096), prefill(bench, 8000)],
    "decode": lambda bench: [decode(bench, 1000), decode(bench, 4000), decode(bench, 8000)],
    "memory": lambda bench: [memory(bench)],
    "compression": lambda bench: [compression(bench)],
    "scaling": lambda bench: [by_length(bench), by_cells(bench)],
    "profile": lambda bench: [stages(bench)],
}
"""What `python -m scripts.bench` answers; `--peer` adds another."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user error prints one message and gives exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("questions", nargs="*", help=f"some of {', '.join((*QUESTIONS, 'peer'))}")
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
    try:
        run(names, Bench(options.set, options.repeats), options.out, options.peer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(names: Sequence[str], bench: Bench, out: Path, python: str | None = None) -> None:
    """Answer questions one after the other, printing and writing each as it is done.

    Raises UserError for a question that does not exist, and for `peer` without the Python to run it.
    """

    def peers(bench: Bench) -> list[Report]:
        return [peer(bench, str(python), length) for length in (2048, 4096)]

    known = {**QUESTIONS, "peer": peers}
    for name in names:
        if name not in known:
            raise unknown("benchmark", name, known)
    if "peer" in names and python is None:
        raise UserError(
            "peer needs --peer PYTHON, of an environment with kvpress; `make bench PEER=1` makes one."
        )
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name in names:
        reports = known[name](bench)
        for report in reports:
            _print(report, console)
            write_atomically(out / f"{report.name}.json", _json(report, bench))
            write_atomically(out / f"{report.name}.md", _markdown(report, bench))
        if name == "scaling":
            for file, content in picture(reports).items():
                write_atomically(out / file, content)
    console.print(_machine(bench), style="dim", highlight=False)


def _machine(bench: Bench) -> str:
    machine, packages = hardware(), package_versions()
    where = ", ".join(machine["gpus"]) or machine["cpu"]
    return (
        f"{bench.settings.model.name}, {bench.settings.model.dtype}, {where}, {machine['threads']} "
        f"threads, torch {packages['torch']}, transformers {packages['transformers']}, median of "
        f"{bench.repeats} rounds"
    )


def _json(report: Report, bench: Bench) -> str:
    content = {
        "name": report.name,
        "title": report.title,
        "setting": report.setting,
        "target": report.target,
        "rows": report.rows,
        "raw": report.raw,
        "repeats": bench.repeats,
        "model": bench.settings.model.name,
        "dtype": bench.settings.model.dtype,
        "hardware": hardware(),
        "packages": package_versions(),
        "git": git_state(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _markdown(report: Report, bench: Bench) -> str:
    header = list(report.rows[0])
    lines = [
        f"### {report.title}",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(str(row[key]) for key in header) + " |" for row in report.rows),
        "",
        f"{report.setting} {_machine(bench)}." + (f" Target: {report.target}." * bool(report.target)),
        "",
    ]
    return "\n".join(lines)


def _print(report: Report, console: Console) -> None:
    table = Table(title=report.title, title_justify="left")
    for position, key in enumerate(report.rows[0]):
        table.add_column(key, justify="right" if position else "left")
    for row in report.rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    console.print(report.setting, style="dim", highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
