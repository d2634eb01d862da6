"""Look after the records of a results folder: say what is wrong with them, and take it out.

    python -m scripts.records check DIR     # everything that is wrong; exit status 2 if anything is
    python -m scripts.records repair DIR    # take out lines that cannot count; their samples run again

Nothing is made up: what remains are lines as the run wrote them. A file that is changed is kept as it
was beside, as `<name>.jsonl.damaged`. DIR is an output_dir, sharded or not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.lock import only_writer
from harness.prompts import scan_prompts
from harness.records import Scan, scan_folder
from harness.report.run import load_run
from harness.results import Results
from kvmerge.errors import UserError
from kvmerge.files import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status.

    0: sound, or repaired; 2: something is wrong, or a user error, printed as one message.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.records",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("check", "say what is wrong"), ("repair", "take out what is wrong")):
        commands.add_parser(command, help=text).add_argument("output_dir", type=Path)
    options = parser.parse_args(argv)
    try:
        if options.command == "repair":
            for done in repair(options.output_dir):
                print(done)
        found = list(check(options.output_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in found:
        print(f"wrong: {problem}", file=sys.stderr)
    if not found:
        print(f"{options.output_dir} is sound.")
    return 2 if found else 0


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
            for found in (*scan_folder(folder), *scan_prompts(folder)):
                if _unfit(found):
                    yield _take_out(found)


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
    for found in (*scan_folder(folder), *scan_prompts(folder)):
        yield from itertools.chain(found.faults(), found.remarks())


def _unfit(found: Scan) -> set[int]:
    """Return the lines that cannot count; of lines that contradict each other, all."""
    contradicting = itertools.chain.from_iterable(found.differing)
    return {*found.torn, *found.malformed, *found.repeated, *contradicting}


def _take_out(found: Scan) -> str:
    """Write a file without its unfit lines, keep it as it was beside, and say so."""
    unfit = _unfit(found)
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
