"""One line a sample: what is written as soon as a sample is finished, and read to resume or score.

A prediction file survives a kill at any moment: a line counts only once it ends in a newline and
parses, a half-written last line is ignored when read and cut off before the next append, and the
sample it belonged to simply runs again. What no kill explains is refused, all of a folder at once.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar, get_type_hints

from harness.typed import Count, Misfit, Positive, Share, parse_object, shape_of
from kvmerge.errors import UserError
from kvmerge.names import file_name

if TYPE_CHECKING:
    from datasets import Features

logger = logging.getLogger(__name__)

KL_DECIMALS = 4
"""Digits of `kl_to_full`: those that do not depend on which samples shared a batch.

Float32 products of other shapes differ by up to 3e-6 nats. So two runs of a sample, one of them
resumed, write the same number or, where it lies that close to a boundary, two numbers 1e-4 apart.
"""

CIRCUMSTANCES = (
    *("prefill_seconds", "decode_seconds"),
    *("batch_samples", "batch_rows", "threads", "kernel"),
)
"""Fields of `Record` that say how a sample was run, in which two runs of it may differ."""

_MOST_FAULTS = 20
"""Faults of a folder that one message lists."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished sample of one cell; each field is a key of the JSON line.

    Raises `ValueError` where a metric part in `extra` would hide a field.
    """

    id: str
    seed: int
    prediction: str
    answers: tuple[str, ...]
    score: float
    """0 to 1; the perplexity itself where that is the metric. NaN is written as null."""
    prompt_hash: str
    prompt_tokens: Count
    """Tokens of the prompt, its question among them."""
    generated_tokens: Count
    kept_entries: Positive
    """Mean over KV heads and the layers that a budget counts, after prefill: not those that are left
    to a window of their own."""
    budget_achieved: Positive
    """`kept_entries` divided by the tokens that were compressed (`compressed_tokens`)."""
    kv_bytes: Count
    """Bytes of K and V alone, after prefill, of all layers."""
    kl_to_full: Positive | None = None
    """KL(full || cell) in nats, mean over the compared positions, to `KL_DECIMALS`."""
    top1_agreement: Share | None = None
    """Fraction of compared positions where the most likely token is the full cache's."""
    fidelity_tokens: Count | None = None
    """Number of positions compared."""
    context_hash: str | None = None
    """Digest of the text before the question: equal for samples that share it, under either `question`.
    None where the benchmark does not say where its context ends."""
    context_tokens: Count | None = None
    """Tokens that were prefilled and compressed: the whole prompt, or under `question=after` its
    context."""
    question_tokens: Count | None = None
    """Tokens that were fed after the compression and stored whole; 0 where the question is inside."""
    requested_entries: Count | None = None
    """Entries per KV head that the budget stands for, before any method or policy divides them."""
    kept_entries_by_layer: list[Positive] | None = None
    """Mean over the KV heads of each layer, after prefill."""
    kept_entries_min: Count | None = None
    """Smallest count over layers and KV heads, after prefill."""
    kept_entries_max: Count | None = None
    read_entries: Positive | None = None
    """Entries of the prompt that attention read for the first token fed after it, a mean as
    `kept_entries` is: counted where it reads them, hidden ones left out. None where none was fed."""
    kv_bytes_full: Count | None = None
    """Bytes of K and V that the full cache holds of the tokens that were compressed."""
    size_bytes: Count | None = None
    """Bytes of the size vectors or logit biases kept beside K and V."""
    merged_tokens: float | None = None
    """Tokens that share another's entry, mean over layers and KV heads. With `kept_entries` and
    `evicted_tokens` they sum to those that were compressed. None where the method keeps no sizes."""
    evicted_tokens: float | None = None
    """Prompt tokens that no entry stands for, mean over layers and KV heads."""
    prefill_seconds: Positive | None = None
    decode_seconds: Positive | None = None
    finish_reason: Literal["stop", "length"] | None = None
    """Why the answer ended: an end token, or the most tokens that it may have. None where nothing was
    generated."""
    batch_samples: Count | None = None
    """Samples that decoded together, this one among them."""
    batch_rows: Count | None = None
    """Rows of that batch before any was finished: all cells and seeds of its samples."""
    threads: Count | None = None
    """Threads that torch worked with on the CPU."""
    kernel: str | None = None
    """What attended to the prompt, whether linear layers were packed, and the dtype:
    `tiled-onednn+packed/float32` (`kvmerge.kernels.attention.prompt_kernel`)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the metric (`rouge1`, `rouge2`, `rougel`; `nll`, `tokens`) and `groups`, what the scores
    are also reported by; keys of the line too."""

    def __post_init__(self) -> None:
        hidden = sorted(_FIELDS.intersection(self.extra))
        if hidden:
            raise ValueError(f"extra holds {hidden}, which are fields of Record")

    @property
    def compressed_tokens(self) -> int:
        """Tokens that the budget is a part of; earlier versions compressed whole prompts."""
        return self.prompt_tokens if self.context_tokens is None else self.context_tokens

    def to_json(self) -> str:
        """Return the record as one line of JSON, without newline; not-finite numbers become null."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        row = {name: _null_if_not_finite(value) for name, value in (row | dict(self.extra)).items()}
        return json.dumps(row, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """Read one line back; keys that are no field go to `extra`.

        Raises `ValueError` saying what is wrong: not JSON, not an object, or a missing field; and
        `Misfit`, which names every field whose value is not what its annotation says.
        """
        row = parse_object(line)
        missing = [name for name in REQUIRED if name not in row]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        wrong = [
            why
            for name, value in row.items()
            if not (shape := SHAPES.get(name, PART)).fits(value)
            for why in shape.misfits(name, value)
        ]
        if wrong:
            raise Misfit("; ".join(wrong))
        row["score"] = math.nan if row["score"] is None else row["score"]
        row["answers"] = tuple(row["answers"])
        known = {name: row.pop(name) for name in tuple(row) if name in _FIELDS}
        return cls(**known, extra=row)


_FIELDS = frozenset(f.name for f in fields(Record)) - {"extra"}
REQUIRED = tuple(
    f.name for f in fields(Record) if f.default is MISSING and f.default_factory is MISSING
)
SHAPES = {
    name: shape_of(hint)
    for name, hint in get_type_hints(Record, include_extras=True).items()
    if name != "extra"
} | {"score": shape_of(float | None), "groups": shape_of(Mapping[str, str | int])}
"""What each key of a line must be; a score that is not a number is written as null."""
PART = shape_of(float | None)
"""What any other key must be: a part of the metric."""


def _null_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prediction_path(output_dir: Path, task: str, cell_name: str) -> Path:
    """Return where the lines of one task and cell live.

    Raises `UserError` where a name would leave its folder.
    """
    cell = file_name(cell_name)
    for name in (task, cell):
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise UserError(
                f"{name!r} cannot name a results file: "
                "use a name without '/', '\\' and without a leading '.'."
            )
    return output_dir / "predictions" / task / f"{cell}.jsonl"


class Line(Protocol):
    """What a line of a records file is made of, and read back into."""

    @property
    def id(self) -> str:
        """The sample that it is of."""
        ...

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        ...

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read one line back. Raises `ValueError`: `Misfit` where the line was written whole."""
        ...


L = TypeVar("L", bound=Line)


def append_record(path: Path, record: Line) -> None:
    """Add one line and have it on the disk before returning; a half-written last line goes first.

    Raises `UserError` when the disk is full; the file then ends after its last whole line.
    """
    line = (record.to_json() + "\n").encode()
    end = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that nothing is left to be flushed when a write has failed.
        with path.open("a+b", buffering=0) as file:
            end = _sound_end(file, type(record))
            if end < file.seek(0, os.SEEK_END):
                logger.warning("%s ends in a half-written line; it is cut off", path)
                file.truncate(end)
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = "nothing was written" if end is None else f"its {_count_lines(path)} lines are kept"
        raise UserError(
            f"the disk is full: sample {record.id!r} could not be added to {path}; {kept}. "
            "Free some space and run the same command again: it resumes with this sample."
        ) from error


@dataclass(frozen=True)
class Scan:
    """What the lines of a file are; they are counted from 1."""

    path: Path
    lines: Mapping[int, bytes] = field(default_factory=dict)
    """All of them, without newline."""
    records: Mapping[int, Record] = field(default_factory=dict)
    """Those that are records."""
    torn: tuple[int, ...] = ()
    """The last one, where a kill left it half-written."""
    malformed: Mapping[int, str] = field(default_factory=dict)
    """Why others are no records."""
    repeated: tuple[int, ...] = ()
    """Those that say what an earlier one says, `CIRCUMSTANCES` aside."""
    differing: tuple[tuple[int, ...], ...] = ()
    """Those that say different things of one sample and seed, together."""
    unreadable: str = ""
    """Why the file cannot be read; empty where it can."""

    def remarks(self) -> Iterator[str]:
        """Yield what is passed over, a sentence each."""
        if self.torn:
            yield f"{self.path}, line {self.torn[0]} is half-written; it is ignored"

    def faults(self) -> Iterator[str]:
        """Yield what the file is refused for, a sentence's part each."""
        if self.unreadable:
            yield f"cannot read {self.path}: {self.unreadable}; moved elsewhere, its samples run again"
        for number, why in self.malformed.items():
            yield f"{self.path}, line {number} is not a record: {why}"
        for number in self.repeated:
            one = self.records[number]
            yield (
                f"{self.path}, line {number} repeats an earlier one, of sample {one.id!r} with seed "
                f"{one.seed}"
            )
        for numbers in self.differing:
            first = self.records[numbers[0]]
            yield (
                f"{self.path}, lines {', '.join(map(str, numbers))} are all of sample {first.id!r} "
                f"with seed {first.seed}, and differ in {', '.join(self._differing_in(numbers))}"
            )

    def _differing_in(self, numbers: tuple[int, ...]) -> list[str]:
        first, *others = (_outcome(self.records[number]) for number in numbers)
        names = dict.fromkeys(name for row in (first, *others) for name in row)
        return [name for name in names if any(row.get(name) != first.get(name) for row in others)]


def scan(path: Path) -> Scan:
    """Look at every line of a prediction file; one that is missing has none."""
    found, records = scan_lines(path, Record)
    repeated, differing = _repetitions(records)
    return replace(found, records=records, repeated=repeated, differing=differing)


def scan_lines(path: Path, kind: type[L]) -> tuple[Scan, dict[int, L]]:
    """Look at every line of a file, and return those that are of a kind by number, counted from 1."""
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Scan(path), {}
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        return Scan(path, unreadable=getattr(error, "strerror", None) or str(error)), {}
    lines = dict(enumerate([*whole, rest] if rest else whole, start=1))
    read: dict[int, L] = {}
    malformed: dict[int, str] = {}
    torn = [len(lines)] if rest else []
    for number, line in enumerate(whole, start=1):
        try:
            read[number] = kind.from_json(line)
        except ValueError as error:
            # A kill leaves no line with all its keys.
            if number == len(lines) and not isinstance(error, Misfit):
                torn.append(number)
            else:
                malformed[number] = str(error)
    return Scan(path, lines, torn=tuple(torn), malformed=malformed), read


def _repetitions(
    records: Mapping[int, Record],
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return the lines that repeat an earlier one, and those that contradict each other."""
    by_sample: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number, record in records.items():
        by_sample[record.id, record.seed].append(number)
    repeated: list[int] = []
    differing = []
    for numbers in by_sample.values():
        if len(numbers) == 1:
            continue
        first, *others = (_outcome(records[number]) for number in numbers)
        if any(other != first for other in others):
            differing.append(tuple(numbers))
        else:
            repeated += numbers[1:]
    return tuple(repeated), tuple(differing)


def _outcome(record: Record) -> dict[str, Any]:
    """Return the keys of a record's line, without how the sample was run."""
    unknown: dict[str, Any] = dict.fromkeys(CIRCUMSTANCES)
    outcome = replace(record, **unknown)
    return parse_object(outcome.to_json())  # as JSON, where not a number equals itself


def prediction_files(folder: Path) -> list[Path]:
    """Return every prediction file of a results folder, in order."""
    return sorted(folder.glob("predictions/*/*.jsonl"))


def scan_folder(folder: Path) -> Iterator[Scan]:
    """Look at every prediction file of a results folder, one at a time."""
    return map(scan, prediction_files(folder))


def read_records(path: Path) -> list[Record]:
    """Read all whole lines of a prediction file, in file order; a missing file has none.

    A half-written last line (no newline, or no object with a record's keys) is reported to the log and
    left out.

    Raises:
        UserError: naming file, line and field, where the file is damaged otherwise, or holds a sample
            and seed twice; it lists what is wrong in all files of the results folder, and says how to
            repair them.
    """
    found = scan(path)
    for remark in found.remarks():
        logger.warning(remark)
    faults = list(found.faults())
    if faults:
        folder = path.parents[2]
        others = (other for other in scan_folder(folder) if other.path != path)
        faults += (fault for other in others for fault in other.faults())
        mends = (
            "takes lines like these out and keeps each file as it was beside; their samples run again."
        )
        raise UserError(listed(folder, faults, mends))
    return list(found.records.values())


def listed(folder: Path, faults: Sequence[str], mends: str) -> str:
    """List the first faults of a results folder, and say what the command does that mends them."""
    shown = list(faults[:_MOST_FAULTS])
    command = f"python -m scripts.records %s {shlex.quote(str(folder))}"
    if len(faults) > len(shown):
        shown.append(f"and {len(faults) - len(shown)} more: `{command % 'check'}` lists all")
    return "\n".join([*shown, f"`{command % 'repair'}` {mends}"])


def _sound_end(file: FileIO, kind: type[Line]) -> int:
    """Find the offset after the last line that is not half-written."""
    size = file.seek(0, os.SEEK_END)
    block = 1 << 16
    while True:
        start = max(0, size - block)
        file.seek(start)
        tail = file.read(size - start)
        last = tail.rfind(b"\n")
        before = tail.rfind(b"\n", 0, max(last, 0))
        if start == 0 or before >= 0:
            break
        block *= 2
    if last != len(tail) - 1 or last < 0:
        return start + last + 1
    try:
        kind.from_json(tail[before + 1 : last])
    except Misfit:
        return size
    except ValueError:
        return start + before + 1
    return size


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def features(output_dir: Path) -> Features:
    """Return the types of all keys of a run's lines, for `datasets.load_dataset("json", features=…)`.

    Lines of different tasks and methods hold different keys, and a key that is null in a whole file has
    no type there. With these types every line loads, and what it lacks is null.

    Raises `UserError` as `read_records` does.
    """
    from datasets import Features, List, Value  # takes half a second

    def typed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: typed(each) for name, each in value.items()}
        return Value({str: "string", int: "int64"}.get(type(value), "float64"))

    types: dict[str, Any] = {}
    for name, hint in get_type_hints(Record).items():
        text = str(hint)
        value = Value(
            "string" if re.search("str|Literal", text) else "float64" if "float" in text else "int64"
        )
        types[name] = List(value) if re.match("tuple|list", text) else value
    del types["extra"]
    for path in prediction_files(output_dir):
        for record in read_records(path)[:1]:
            for name, value in record.extra.items():
                types[name] = typed(value)
    return Features(types)
