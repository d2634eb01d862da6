"""Look after the records of a results folder: say what is wrong with them, and take it out.

    python -m scripts.records check DIR     # everything that is wrong
    python -m scripts.records repair DIR    # take out lines that cannot count; their samples run again

The exit status is 0 where nothing is wrong, or all was mended; 1 where something is, or could not be; 2
after a mistake in the command.

Nothing is made up: what remains are lines as the run wrote them. A file that is changed is kept as it
was beside, as `<name>.jsonl.damaged`. DIR is an output_dir, sharded or not.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.columnar import sound_records
from harness.failures import scan_failures
from harness.foreign import foreign_records
from harness.lock import only_writer
from harness.prompts import scan_prompts
from harness.records import Scan, prediction_files, scan
from harness.report.run import load_run
from harness.results import Results
from kvmerge.command import exits, parser_of
from kvmerge.errors import UserError
from kvmerge.files import write_atomically


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; a user error prints one message."""
    parser = parser_of("python -m scripts.records", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("check", "say what is wrong"), ("repair", "take out what is wrong")):
        commands.add_parser(command, help=text).add_argument("output_dir", type=Path)
    options = parser.parse_args(argv)
    if options.command == "repair":
        for done in repair(options.output_dir):
            print(done)
    found = list(check(options.output_dir))
    for problem in found:
        print(f"wrong: {problem}", file=sys.stderr)
    if not found:
        print(f"{options.output_dir} is sound.")
    return 1 if found else 0


def check(output_dir: Path) -> Iterator[str]:
    """Yield everything that is wrong with an output_dir, a sentence's part each.

    Raises `UserError` where it is not the folder of a run.
    """
    sound = True
    for folder in _folders(output_dir):
        for problem in _problems(folder):
            sound = False
            yield problem
    if sound:
        try:
            _ = load_run(output_dir).samples  # what the parts make as a whole
        except UserError as error:
            yield str(error)


def repair(output_dir: Path) -> Iterator[str]:
    """Take the lines that cannot count out of every file; yields what was done.

    Raises `UserError` where it is not the folder of a run, or somebody writes into it.
    """
    for folder in _folders(output_dir):
        with only_writer(folder):
            foreign: dict[Path, set[int]] = defaultdict(set)
            for one in foreign_records(folder):
                if one.own is not None:
                    foreign[one.path].update(one.numbers)
            for path in prediction_files(folder):
                found = None if path not in foreign and sound_records(path) else scan(path)
                if found and (unfit := _unfit(found) | foreign[path]):
                    yield _take_out(found, unfit)
            for found in (*scan_prompts(folder), scan_failures(folder)):
                if unfit := _unfit(found):
                    yield _take_out(found, unfit)


def _folders(output_dir: Path) -> list[Path]:
    """Return the results folders of an output_dir: itself, or its shards."""
    shards = sorted(path for path in output_dir.glob("shards/*-of-*") if path.is_dir())
    own = (
        [output_dir]
        if any((output_dir / name).exists() for name in ("predictions", "run.json"))
        else []
    )
    if not own and not shards:
        raise UserError(
            f"{output_dir} holds no predictions/, run.json or shards/, so it is not an output_dir of a "
            "run. Give the folder that run.py printed."
        )
    return [*own, *shards]


def _problems(folder: Path) -> Iterator[str]:
    try:
        if not Results(folder).info:
            yield f"{folder} has no run.json"
    except UserError as error:
        yield str(error)
    odd = (scan(path) for path in prediction_files(folder) if not sound_records(path))
    for found in (*odd, *scan_prompts(folder), scan_failures(folder)):
        yield from itertools.chain(found.faults(), found.remarks())
    yield from map(str, foreign_records(folder))


def _unfit(found: Scan) -> set[int]:
    """Return the lines that cannot count; of lines that contradict each other, all."""
    contradicting = itertools.chain.from_iterable(found.differing)
    return {*found.torn, *found.malformed, *found.repeated, *contradicting}


def _take_out(found: Scan, unfit: set[int]) -> str:
    """Write a file without its unfit lines, keep it as it was beside, and say so."""
    kept = [line + b"\n" for number, line in found.lines.items() if number not in unfit]
    copy = _free_name(found.path.with_name(f"{found.path.name}.damaged"))
    write_atomically(copy, found.path.read_bytes())
    if kept:
        write_atomically(found.path, b"".join(kept))
    else:
        found.path.unlink()
    numbers = ", ".join(map(str, sorted(unfit)))
    return (
        f"{found.path}: took out lines {numbers}; kept {len(kept)} of {len(found.lines)}. "
        f"As it was: {copy}"
    )


def _free_name(path: Path) -> Path:
    """Return a path that is free: an earlier repair's copy stays."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())


if __name__ == "__main__":
    sys.exit(main())
