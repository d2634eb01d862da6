"""Published numbers, each with where it was read; what was not found stays empty."""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kvmerge.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_COLUMNS = [
    "benchmark",
    "model",
    "method",
    "budget",
    "task",
    "score",
    "samples",
    "tolerance",
    "over",
    "source",
    "provenance",
    "note",
]


class Source(StrEnum):
    """Where a published number was read, the best evidence first."""

    OFFICIAL = "official"
    FIGURE = "figure"
    REVIEW = "review"
    SECONDARY = "secondary"

    @property
    def words(self) -> str:
        """How a sentence says it."""
        return _WORDS[self]

    @property
    def is_quoted(self) -> bool:
        """Whether somebody else was read instead of the authors: such a number is marked."""
        return self in (Source.REVIEW, Source.SECONDARY)

    @property
    def rank(self) -> int:
        """Position among the sources, 0 for the best evidence."""
        return list(Source).index(self)


_WORDS = {
    Source.OFFICIAL: "read in the authors' repository",
    Source.FIGURE: "seen in a figure of the paper",
    Source.REVIEW: "quoted in a review of the paper",
    Source.SECONDARY: "quoted by a secondary public source",
}
QUOTED = "‡"
"""Stands behind every number that was not read where its authors published it."""


@dataclass(frozen=True)
class Reference:
    """One published number; sources that disagree give one each."""

    benchmark: str
    """Empty where the source does not say; so are model and budget."""
    model: str
    method: str
    budget: str
    task: str
    """A task of the benchmark, or the name of an aggregate."""
    published: str
    """The number as printed in the source, 0 to 100; empty where it was not found."""
    samples: int | None
    """Samples that the number is over; None where the source does not say."""
    tolerance: float | None
    """Points by which a full cache may differ and still reproduce the number; None: no band."""
    over: tuple[str, ...]
    """An aggregate's members (tasks or aggregates), whose plain mean it is; empty if unknown."""
    source: Source
    provenance: str
    note: str

    @property
    def score(self) -> float | None:
        """The number; None where it was not found."""
        return float(self.published) if self.published else None

    @property
    def text(self) -> str:
        """The number as printed, marked where it was quoted; empty where it was not found."""
        return self.published + QUOTED * bool(self.published and self.source.is_quoted)

    def fits(self, model: str) -> bool:
        """Return whether a model is the one named, or a version of it where the source states none.

        `mistral-7b-instruct` fits `mistral-7b-instruct-v0.1` and `-v0.2`.
        """
        return bool(re.fullmatch(rf"{re.escape(self.model)}(-v[\d.]+)?", model))

    @property
    def cell(self) -> str:
        """The cell this number is for, named as runs name theirs; the method if no budget is said."""
        return f"{self.method}@{self.budget}" if self.budget else self.method

    @property
    def is_aggregate(self) -> bool:
        """Whether the number is an average over tasks rather than one task's score."""
        return bool(self.over) or self.task.startswith(("average", "category"))


def folder() -> Path:
    """Return where the published numbers lie: inside an installed wheel, in results/ of a checkout.

    Raises `UserError` if they are in neither place: without them a run would have no gates.
    """
    for place in (_PACKAGE / "reference", _PACKAGE.parents[1] / "results" / "reference"):
        if place.is_dir():
            return place
    raise UserError(f"the published numbers are missing beside {_PACKAGE}: install kvmerge again.")


@functools.cache
def load_references(source: Path | None = None) -> tuple[Reference, ...]:
    """Read every CSV file of a folder, in name order, once; None reads `folder()`.

    Raises `UserError` naming file and line where a row does not fit, and for a folder without a file.
    """
    source = source or folder()
    references = []
    for path in sorted(source.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != _COLUMNS:
                raise UserError(f"{path} must have the columns {','.join(_COLUMNS)}.")
            for row in reader:
                try:
                    references.append(_reference(row))
                except ValueError as error:
                    raise UserError(f"{path}, line {reader.line_num}: {error}.") from error
    if not references:
        raise UserError(f"{source} holds no published numbers: install kvmerge again.")
    return tuple(references)


def _reference(row: Mapping[str, str]) -> Reference:
    if len(row) != len(_COLUMNS) or None in row.values():
        raise ValueError(f"{len(_COLUMNS)} columns are needed")
    if row["source"] not in list(Source) or not row["provenance"]:
        raise ValueError(f"source must be one of {', '.join(Source)}, and provenance not empty")
    if row["score"]:
        float(row["score"])
    samples = int(row["samples"]) if row["samples"] else None
    tolerance = float(row["tolerance"]) if row["tolerance"] else None
    if tolerance is not None and not (row["score"] and samples and 0 < tolerance < math.inf):
        raise ValueError("a tolerance must be above 0, and needs score and samples")
    source = Source(row["source"])
    if tolerance is not None and source.is_quoted:
        raise ValueError(f"a {source} source cannot carry a tolerance: nobody is held to a quotation")
    parsed = ("score", "samples", "tolerance", "over", "source")
    return Reference(
        **{name: text for name, text in row.items() if name not in parsed},
        published=row["score"],
        samples=samples,
        tolerance=tolerance,
        over=tuple(row["over"].split()),
        source=source,
    )


def for_benchmark(references: Iterable[Reference], benchmark: str, model: str) -> list[Reference]:
    """Return those of a benchmark: that fit this model if there are any, otherwise for every model.

    The best evidence comes first.
    """
    found = [reference for reference in references if reference.benchmark == benchmark]
    found = [reference for reference in found if reference.fits(model)] or found
    return sorted(found, key=lambda reference: reference.source.rank)


def members(name: str, over: Mapping[str, Iterable[str]]) -> set[str]:
    """Name the tasks that an aggregate goes back to, through other aggregates; for a task, itself."""
    if name not in over:
        return {name}
    return {task for member in over[name] for task in members(member, over)}
