"""One line a sample: what is written as soon as a sample is finished, and read to resume or score.

A prediction file survives a kill at any moment: a line counts only once it ends in a newline and
parses, a half-written last line is ignored when read and cut off before the next append, and the
sample it belonged to simply runs again.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmerge.cells import file_name
from kvmerge.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

logger = logging.getLogger(__name__)


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
    prompt_tokens: int
    """Tokens really fed to prefill (T)."""
    generated_tokens: int
    kept_entries: float
    """Mean over layers and KV heads, after prefill."""
    budget_achieved: float
    """`kept_entries` divided by `prompt_tokens`."""
    kv_bytes: int
    """Bytes of K and V alone, after prefill."""
    kl_to_full: float | None = None
    """KL(full || cell) in nats, mean over the compared positions."""
    top1_agreement: float | None = None
    """Fraction of compared positions where the most likely token is the full cache's."""
    fidelity_tokens: int | None = None
    """Number of positions compared."""
    requested_entries: int | None = None
    """Entries per KV head that the budget stands for, before any method or policy divides them."""
    kept_entries_by_layer: list[float] | None = None
    """Mean over the KV heads of each layer, after prefill."""
    kept_entries_min: int | None = None
    """Smallest count over layers and KV heads, after prefill."""
    kept_entries_max: int | None = None
    kv_bytes_full: int | None = None
    """Bytes of K and V that the full cache holds for the same prompt."""
    size_bytes: int | None = None
    """Bytes of the size vectors or logit biases kept beside K and V."""
    merged_tokens: float | None = None
    """Prompt tokens that share another's entry, mean over layers and KV heads. With `kept_entries` and
    `evicted_tokens` they sum to `prompt_tokens`. None where the method keeps no set sizes."""
    evicted_tokens: float | None = None
    """Prompt tokens that no entry stands for, mean over layers and KV heads."""
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the metric (`rouge1`, `rouge2`, `rougel`; `nll`, `tokens`) and `groups`, what the scores
    are also reported by; keys of the line too."""

    def __post_init__(self) -> None:
        hidden = sorted(_FIELDS.intersection(self.extra))
        if hidden:
            raise ValueError(f"extra holds {hidden}, which are fields of Record")

    def to_json(self) -> str:
        """Return the record as one line of JSON, without newline; not-finite numbers become null."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        row = {name: _null_if_not_finite(value) for name, value in (row | dict(self.extra)).items()}
        return json.dumps(row, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read one line back; keys that are no field go to `extra`.

        Raises `ValueError` saying what is wrong: not JSON, not an object, or a missing field.
        """
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"an object is needed, not {type(row).__name__}")
        missing = [name for name in _REQUIRED if name not in row]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        if not isinstance(row["answers"], list):
            raise ValueError("answers must be a list")
        row["score"] = math.nan if row["score"] is None else row["score"]
        for name in _NUMBERS:
            if isinstance(row[name], bool) or not isinstance(row[name], int | float):
                raise ValueError(f"{name} must be a number, not {row[name]!r}")
        row["answers"] = tuple(row["answers"])
        known = {name: row.pop(name) for name in tuple(row) if name in _FIELDS}
        return cls(**known, extra=row)


_FIELDS = frozenset(f.name for f in fields(Record)) - {"extra"}
_REQUIRED = tuple(
    f.name for f in fields(Record) if f.default is MISSING and f.default_factory is MISSING
)
_NUMBERS = frozenset(_REQUIRED) - {"id", "prediction", "answers", "prompt_hash"}


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


def append_record(path: Path, record: Record) -> None:
    """Add one line and have it on the disk before returning; a half-written last line goes first.

    Raises `UserError` when the disk is full; the file then ends after its last whole line.
    """
    line = (record.to_json() + "\n").encode()
    end = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that nothing is left to be flushed when a write has failed.
        with path.open("a+b", buffering=0) as file:
            end = _sound_end(file)
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


def read_records(path: Path) -> list[Record]:
    """Read all whole lines of a prediction file, in file order; a missing file has none.

    A half-written last line (no newline, or not a record) is reported to the log and left out.
    Raises `UserError` naming file and line where any other line is malformed.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        logger.warning("%s ends in a half-written line; it is ignored", path)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(Record.from_json(line.decode()))
        except ValueError as error:
            if number == len(lines) and not rest:
                logger.warning("%s, line %d is half-written; it is ignored", path, number)
                break
            raise UserError(
                f"{path}, line {number} is not a record: {error}. "
                "Delete that line; the sample runs again."
            ) from error
    return records


def _sound_end(file: FileIO) -> int:
    """Find the offset after the last line that `read_records` would accept."""
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
        Record.from_json(tail[before + 1 : last].decode())
    except ValueError:
        return start + before + 1
    return size


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def features(output_dir: Path) -> Features:
    """Return the types of all keys of a run's lines, for `datasets.load_dataset("json", features=…)`.

    Lines of different tasks and methods hold different keys, and a key that is null in a whole file has
    no type there. With these types every line loads, and what it lacks is null.
    """
    from datasets import Features, List, Value  # takes half a second

    def typed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: typed(each) for name, each in value.items()}
        return Value({str: "string", int: "int64"}.get(type(value), "float64"))

    types: dict[str, Any] = {}
    for field_ in fields(Record):
        text = "str" in str(field_.type)
        value = Value("string" if text else "float64" if "float" in str(field_.type) else "int64")
        types[field_.name] = List(value) if re.match("tuple|list", str(field_.type)) else value
    del types["extra"]
    for path in sorted(output_dir.glob("predictions/*/*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for name, value in Record.from_json(next(lines)).extra.items():
                types[name] = typed(value)
    return Features(types)
