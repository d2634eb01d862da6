"""Samples that could not be answered: one line each in failed.jsonl, until they are."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from harness.records import Scan, append_record, scan_lines
from harness.typed import Line
from kvmerge.errors import NotFinite, UserError, is_of_storage, summary
from kvmerge.files import write_atomically

if TYPE_CHECKING:
    from harness.answering import Job

logger = logging.getLogger(__name__)

FILE = "failed.jsonl"
_LISTED = 20
"""Failures that the end of a run lists."""


@dataclass(frozen=True, kw_only=True)
class Failure(Line):
    """One sample that could not be answered."""

    task: str
    id: str
    cells: list[str]
    """Those that it was to be answered with; none where it was to be observed."""
    error: str
    """The kind of the error, and the first line of what it says."""
    traceback: str
    time: str
    """When, in UTC."""

    @property
    def tokens(self) -> int:
        """Tokens that came of it."""
        return 0

    @classmethod
    def of(cls, job: Job, error: BaseException) -> Self:
        """Note with what a sample failed."""
        return cls(
            task=job.task.name,
            id=job.sample.id,
            cells=list(dict.fromkeys(cell.name for cell, _ in job.missing)),
            error=summary(error),
            traceback="".join(traceback.format_exception(error)),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def scan_failures(folder: Path) -> Scan:
    """Look at the failures of a results folder."""
    return scan_lines(folder / FILE, Failure)[0]


class SamplesFailed(RuntimeError):
    """All that was asked for was tried, and some samples could not be answered."""

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        """Say so, with the failures where they are of one run."""
        super().__init__(message)
        self.failures = failures


def is_of_run(error: Exception) -> bool:
    """Return whether an error would meet every other sample of a run too."""
    if isinstance(error, UserError):
        return not isinstance(error, NotFinite)
    # after an error of its own a CUDA device does nothing more for this process
    return is_of_storage(error) or "CUDA error" in str(error)


class Failures:
    """The failures of one results folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.new: list[Failure] = []
        """Those of this process."""

    @cached_property
    def _known(self) -> dict[tuple[str, str], Failure]:
        found, read = scan_lines(self.path, Failure)
        if problems := [*found.faults(), *found.remarks()]:
            logger.warning("%s; nothing depends on that line", problems[0])
        return {(each.task, each.id): each for each in read.values()}

    def __iter__(self) -> Iterator[Failure]:
        return iter(list(self._known.values()))

    def add(self, failure: Failure) -> None:
        """Note a failure, on the disk too, instead of an earlier one of the same sample."""
        key = failure.task, failure.id
        is_known = key in self._known
        self._known[key] = failure
        self.new.append(failure)
        if is_known:
            self._write()
        else:
            append_record(self.path, failure)

    def drop_sample(self, task: str, sample: str) -> None:
        """Take out the failure of a sample, where there is one."""
        self.drop(lambda each: (each.task, each.id) == (task, sample))

    def drop(self, is_over: Callable[[Failure], bool]) -> None:
        """Take out those that are over."""
        kept = {key: each for key, each in self._known.items() if not is_over(each)}
        if len(kept) < len(self._known):
            self._known.clear()
            self._known.update(kept)
            self._write()

    def check(self) -> None:
        """Raise `SamplesFailed`, listing them, if there are failures of this process."""
        if self.new:
            raise SamplesFailed(self._listed(), self.new)

    def _listed(self) -> str:
        """List the failures of this process, and say where they are told in full."""
        listed = [f"  {each.task}/{each.id}: {each.error}" for each in self.new[:_LISTED]]
        if len(self.new) > _LISTED:
            listed.append(f"  and {len(self.new) - _LISTED} more")
        count = "1 sample" if len(self.new) == 1 else f"{len(self.new)} samples"
        return "\n".join(
            [
                f"{count} failed; the others are done.",
                *listed,
                f"{self.path} has their tracebacks. The same command tries them again.",
            ]
        )

    def _write(self) -> None:
        if not self._known:
            self.path.unlink()
        else:
            lines = [each.to_json() + "\n" for each in self._known.values()]
            write_atomically(self.path, "".join(lines))
