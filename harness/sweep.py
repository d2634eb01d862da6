"""A sweep: what its points leave behind, and the report of all of them together.

Points may be processes of their own, so each leaves a file in a folder that the environment names.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from harness.settings import Settings
from kvmerge.errors import UserError

_VARIABLE = "KVMERGE_SWEEP"
_FAILED, _DONE = "failed", "done"
_PLAIN: Any = {"soft_wrap": True, "highlight": False, "markup": False}


class Failed(NamedTuple):
    """A point that failed."""

    line: str
    """Its settings, and why."""
    by_samples: bool = False
    """Whether it went to its end, and only some of its samples failed."""


@dataclass(frozen=True)
class Points:
    """What the points of a sweep left behind, in the order of their numbers."""

    folder: Path

    @property
    def failed(self) -> list[Failed]:
        """Those that failed."""
        noted = sorted(self.folder.glob(f"{_FAILED}-*"))
        return [Failed(*json.loads(path.read_text())) for path in noted]

    @property
    def compared(self) -> dict[Path, bool]:
        """The folders that comparisons wrote into, and whether each has its report already."""
        points = [json.loads(path.read_text()) for path in sorted(self.folder.glob(f"{_DONE}-*"))]
        return {Path(folder): reported for folder, reported in points}

    def note_failed(self, number: int, line: str, *, by_samples: bool = False) -> None:
        """Note that a point failed, and whether only for samples of it."""
        self._leave(f"{_FAILED}-{number:06d}", json.dumps(Failed(line, by_samples)))

    def note_done(self, number: int, settings: Settings) -> None:
        """Note where a comparison wrote; shards leave the report to whoever joins them."""
        if settings.kind == "comparison" and not settings.dry_run:
            point = str(settings.output_dir), settings.num_shards == 1
            self._leave(f"{_DONE}-{number:06d}", json.dumps(point))

    def _leave(self, name: str, word: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # who began the sweep has gone, and reads no more
            (self.folder / name).write_text(word)


def current_points() -> Points | None:
    """Return where this process, a point of a sweep, leaves word; None where it is no such point."""
    folder = os.environ.get(_VARIABLE)
    return Points(Path(folder)) if folder else None


@contextlib.contextmanager
def sweep(place: Path | None = None) -> Iterator[Points]:
    """Let what runs inside the block be points of one sweep.

    Args:
        place: folder that every point sees, where points run on other machines.
    """
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        place = place.absolute()
    with tempfile.TemporaryDirectory(prefix="kvmerge-sweep-", dir=place) as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield Points(Path(folder))
        finally:
            del os.environ[_VARIABLE]


def report_points(points: Points, console: Console) -> None:
    """Write one report of all that a sweep's points compared, and name its page.

    Cells of one model and benchmark share a table, unless they do not compare.
    """
    compared = points.compared
    if len(compared) == 1 and all(compared.values()):
        (folder,) = compared
        page: Path | None = folder / "report.html"  # the last point has reported what lies there
    else:
        page = _report_together(compared, console)
    if page:
        console.print(f"all points together: {page}", **_PLAIN)


def _report_together(compared: Mapping[Path, bool], console: Console) -> Path | None:
    from harness.report.joined import grouped, join
    from harness.report.page import write_report  # matplotlib and scipy are slow to import
    from harness.report.run import Run, load_run
    from harness.report.terminal import print_comparison

    loaded: list[Run] = []
    runs: list[Run] = []
    for folder in compared:
        try:
            loaded.append(load_run(folder))
        except UserError as error:  # as where not all shards were points
            console.print(f"not in the report of all points: {error}", style="yellow", **_PLAIN)
    for group in grouped(loaded):
        try:
            runs.append(join(group))
        except UserError as error:
            runs += group
            console.print(f"tables apart: {error}", style="yellow", **_PLAIN)
    for run in runs:
        if run.joined or not compared[run.output_dir]:
            print_comparison(run, console)
    return write_report(runs) if runs else None
