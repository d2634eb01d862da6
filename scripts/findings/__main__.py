"""Run what docs/findings.md stands on, and write its tables and figures.

    python -m scripts.findings run                       # every run, hours; again: what is left
    python -m scripts.findings run --longbench DIR       # LongBench's rows from a folder, not the hub
    python -m scripts.findings run --setting needle-after  # one setting alone; may be given again
    python -m scripts.findings report                    # results/findings/ from the runs' folders
    python -m scripts.findings page                      # the tables of docs/findings.md from those

A run's folder is `results/runs/findings/<experiment>/<benchmark>-<question>`. `--limit N` takes N
samples of each task, whatever the committed results have.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.report.joined import join, on_common_samples
from harness.report.run import Run, load_run
from kvmerge.command import exits, parser_of
from kvmerge.errors import UserError
from scripts.findings.effects import Effect, of_folding, of_methods, pooled
from scripts.findings.figures import draw
from scripts.findings.page import write_page
from scripts.findings.runs import EXPERIMENTS, SETTINGS, Setting
from scripts.findings.tables import write_cells, write_effects

_RUNS = Path("results/runs/findings")
_RESULTS = Path("results/findings")
_PAGE = Path("docs/findings.md")


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    parser = parser_of("python -m scripts.findings", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make every run that is not finished")
    run.add_argument("--longbench", metavar="DIR", help="folder with LongBench's <task>.jsonl")
    run.add_argument("--limit", type=int, help="samples of each task; default: as committed")
    names = [setting.name for setting in SETTINGS]
    run.add_argument(
        "--setting", action="append", choices=names, help="this one alone; may be repeated"
    )
    report = commands.add_parser("report", help="write tables and figures of the runs")
    page = commands.add_parser("page", help="write the tables of a page anew")
    page.add_argument("page", type=Path, nargs="?", default=_PAGE)
    for command in (report, page):
        command.add_argument("--results", type=Path, default=_RESULTS, help="folder of the tables")
    for command in (run, report):
        command.add_argument("--runs", type=Path, default=_RUNS, help="folder of the runs")
    options = parser.parse_args(argv)
    if options.command == "report":
        write(options.runs, options.results)
        return 0
    if options.command == "page":
        write_page(options.results, options.page)
        return 0
    chosen = [each for each in SETTINGS if each.name in (options.setting or names)]
    return make(chosen, options.runs, options.longbench, options.limit)


def make(settings: Sequence[Setting], runs: Path, longbench: str | None, limit: int | None) -> int:
    """Make runs by the command that a user would give; return the first failure's status."""
    for setting in settings:
        for experiment in EXPERIMENTS:
            words = [
                *setting.words(experiment),
                f"limit={setting.samples(experiment) if limit is None else limit}",
                f"output_dir={runs / experiment / setting.name}",
            ]
            if longbench and setting.benchmark == "longbench":
                words.append(f"benchmark.data_dir={longbench}")
            print(f"{experiment} on {setting.name}", flush=True)
            status = subprocess.run([sys.executable, "run.py", *words], check=False).returncode
            if status:
                return status
    return 0


def write(runs: Path, out: Path) -> None:
    """Write what the runs say into a folder.

    Raises:
        UserError: where there is no run.
    """
    found = dict(_finished(runs))
    if not found:
        raise UserError(f"{runs} holds no run. Make them first: python -m scripts.findings run.")
    out.mkdir(parents=True, exist_ok=True)
    effects: dict[tuple[str, str], list[Effect]] = {}
    for (experiment, name), run in found.items():
        made = of_folding if experiment == "merging" else of_methods
        effects[experiment, name] = made(pooled(run), run.judgement.margin)
    write_cells(found, out)
    write_effects(effects, out)
    draw(effects, out)
    print(f"{len(found)} runs: {out}")


def _finished(runs: Path) -> Iterator[tuple[tuple[str, str], Run]]:
    """Yield the runs that there are: the factorial by itself, the methods and ours as one."""
    for name, experiments in (("merging", ["merging"]), ("methods", ["field", "ours"])):
        for setting in SETTINGS:
            folders = [runs / experiment / setting.name for experiment in experiments]
            parts = [load_run(folder) for folder in folders if (folder / "run.json").is_file()]
            if parts:
                run = join(parts)
                yield (name, setting.name), on_common_samples(run, run.cells)


if __name__ == "__main__":
    sys.exit(main())
