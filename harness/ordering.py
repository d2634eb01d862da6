"""Lines of a file in an order that does not depend on which was written first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.records import L, scan_lines
from kvmerge.files import write_atomically


def put_in_order(path: Path, kind: type[L], place: Callable[[L], tuple[int, int]]) -> None:
    """Sort the lines of a file, each kept as it is, in one step; nothing is written if they are sorted.

    Lines that cannot be read come last; a half-written one is dropped, as the next line would do.

    Args:
        path: the file, which may be missing.
        kind: what its lines are.
        place: where a line belongs; those that share a place keep their order.
    """
    found, read = scan_lines(path, kind)
    numbers = [number for number in found.lines if number not in found.torn]
    wanted = sorted(
        numbers, key=lambda number: (0, place(read[number])) if number in read else (1, (0, 0))
    )
    if wanted != list(found.lines):
        write_atomically(path, b"".join(found.lines[number] + b"\n" for number in wanted))
