"""The benchmarks' files on the Hugging Face hub: list them, fetch them beforehand, verify them.

    python scripts/data.py list                  # what each benchmark reads, and whether it is here
    python scripts/data.py fetch longbench       # download into the hub's cache
    python scripts/data.py verify [longbench]    # hash the files again and check every row

A benchmark is a file of `configs/benchmark/`. What it reads from the hub stands in `FILES` of the
module that the file names, and what its tasks officially hold in `ROWS`, where it is known.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the project is not on the path, the folder of this file is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hydra.utils import get_class

from benchmarks.source import HubFile, cached, check, fetch, shown_size
from benchmarks.task import Benchmark
from kvmerge.command import exits, parser_of
from kvmerge.errors import UserError
from kvmerge.places import choices
from kvmerge.resolve import settings_of

BUILT = "reads nothing from the hub by default: it is built on this machine"


@dataclass(frozen=True)
class Data:
    """What a benchmark reads."""

    name: str
    target: str
    """Its class, as its configuration names it."""
    options: Mapping[str, Any]
    """Its default settings."""
    files: tuple[HubFile, ...]
    """Its files on the hub."""
    rows: Mapping[str, int]
    """How many rows its tasks officially have, by task, as far as known."""

    def benchmark(self) -> Benchmark:
        """Build it with its default settings."""
        built: Benchmark = get_class(self.target)(**self.options)
        return built


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status.

    0: done; 1: `verify` found something wrong; 2: a user error, printed as one message.
    """
    parser = parser_of("python scripts/data.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what each benchmark reads, and whether it is in the cache")
    for command, count, text in (
        ("fetch", "+", "download what benchmarks read, as far as it is not in the cache"),
        ("verify", "*", "hash the cached files again and check every row; all benchmarks by default"),
    ):
        commands.add_parser(command, help=text).add_argument(
            "benchmark", nargs=count, help="as in benchmark=NAME of run.py"
        )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    if options.command == "list":
        print_list()
        return 0
    if options.command == "fetch":
        fetch_all(options.benchmark)
        return 0
    problems = list(verify_all(options.benchmark))
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if problems else 0


def find(name: str) -> Data:
    """Return what the benchmark `name` reads. Raises UserError if there is no such benchmark."""
    options = settings_of("benchmark", name)
    target = str(options.pop("_target_"))
    module = importlib.import_module(target.rpartition(".")[0])
    return Data(
        name=name,
        target=target,
        options=options,
        files=getattr(module, "FILES", ()),
        rows=getattr(module, "ROWS", {}),
    )


def print_list() -> None:
    """Print every benchmark's files: revision, size, SHA-256, licence, and whether they are cached."""
    from huggingface_hub import constants

    print(f"hub: {constants.ENDPOINT}\ncache: {constants.HF_HUB_CACHE}")
    for name in choices("benchmark"):
        data = find(name)
        print(f"\n{name}" if data.files else f"\n{name}: {BUILT}")
        for (repo, revision, licence), files in groupby(data.files, key=_origin):
            print(f"  {repo}, revision {revision}\n  licence: {licence or 'not stated'}")
            for file in files:
                print(
                    f"    {file.filename}: {shown_size(file.size)}, "
                    f"{'cached' if cached(file) else 'not cached'}, "
                    f"SHA-256 {file.sha256 or 'not known beforehand'}"
                )


def _origin(file: HubFile) -> tuple[str, str, str | None]:
    return file.repo, file.revision, file.licence


def fetch_all(names: Sequence[str]) -> None:
    """Bring the files of benchmarks into the hub's cache and name their places.

    Raises UserError for an unknown name before anything is fetched, and what `fetch` raises.
    """
    for data in [find(name) for name in names]:
        if not data.files:
            print(f"{data.name} {BUILT}.")
        for file in data.files:
            print(fetch(file))


def verify_all(names: Sequence[str]) -> Iterator[str]:
    """Check files and rows, printing what is right; gives what is wrong, one sentence each.

    No names: all benchmarks that read from the hub, those without cached files left out. Downloads
    nothing. Raises UserError for an unknown name before anything is checked.
    """
    if names:
        chosen = [find(name) for name in names]
    else:
        chosen = [data for data in map(find, choices("benchmark")) if any(map(cached, data.files))]
        if not chosen:
            print("no benchmark has files in the hub's cache")
    for data in chosen:
        print(data.name)
        wrong = list(_verify_files(data.files))
        # Rows of files that are missing or damaged would be fetched.
        yield from wrong or _verify_rows(data)


def _verify_files(files: Sequence[HubFile]) -> Iterator[str]:
    for file in files:
        path = cached(file)
        if path is None:
            yield f"{file} is not in the cache. `python scripts/data.py fetch` brings it there."
            continue
        try:
            digest = check(file, path)
        except UserError as error:
            yield str(error)
        else:
            size = shown_size(path.stat().st_size)
            found = f"SHA-256 {digest} as expected" if digest else "no SHA-256 to compare with"
            print(f"  {file.filename}: {size}, {found}")


def _verify_rows(data: Data) -> Iterator[str]:
    benchmark = data.benchmark()
    for task in benchmark.tasks:
        try:
            count = len(benchmark.samples(task))
        except UserError as error:
            yield str(error)
            continue
        official = data.rows.get(task.name, count)
        print(f"  {task.name}: {count} rows")
        if count != official:
            yield f"{data.name}, task {task.name}: {count} rows, officially {official}."


if __name__ == "__main__":
    sys.exit(main())
