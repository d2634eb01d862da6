"""Long plain prose for benchmarks that need a text and no questions: haystacks, perplexity.

The default comes with Python, so that nothing is downloaded. A text is part of what a score means:
benchmarks put its SHA-256 in their fingerprint and its notes in the results.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.package_text import FOLDERS, paragraphs
from benchmarks.rows import TEXT, parse_rows, read_bytes, sha256
from benchmarks.source import HubFile, Parquet
from kvmerge.errors import UserError

PACKAGES_SHA256 = "888cf64e8e7be22edd53991c7ddd4f78f9d1b9e6d037b6b770c1f40800371d7a"
"""SHA-256 of `source=packages` where the locked packages are installed."""

_HUB_KEYS = ("repo", "filename", "revision", "column")
_GAP = "\n\n"


@dataclass(frozen=True)
class Text:
    """A text and where it is from."""

    content: str
    place: str
    """How messages name it."""
    notes: tuple[str, ...] = ()
    """What a reader of results made from it must know, one sentence each."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the content as UTF-8."""
        return sha256(self.content.encode("utf-8"))

    def paragraph_at(self, position: int) -> int:
        """Return where the first paragraph at or after `position` begins; `position` if none does."""
        if position == 0:
            return 0
        found = self.content.find(_GAP, max(0, position - len(_GAP)))
        return position if found < 0 else found + len(_GAP)


def read_text(source: str, hub: Mapping[str, Any] | None = None) -> Text:
    """Return the text that `source` names.

    `stdlib`: the language documentation in Python's own library (the topics of `help()`, in sorted
    order), which differs between Python releases. `packages`: prose from the docstrings of locked
    packages, the same on every machine. `hub`: one column of a parquet file of a hub dataset, its
    rows with a blank line between them; `hub` then holds `repo`, `filename`, `revision`, `column`.
    Anything else: the path of a UTF-8 text file.

    Raises UserError if the text cannot be had, is not UTF-8, or is blank.
    """
    if hub and source != "hub":
        raise UserError(
            f"benchmark.hub names a dataset, and benchmark.source={source} another text. Give "
            "benchmark.source=hub, or leave benchmark.hub out."
        )
    if source == "hub":
        text = _hub(hub or {})
    elif source in _BUILT_IN:
        text = _BUILT_IN[source]()
    else:
        text = _file(source)
    if not text.content.strip():
        raise UserError(f"there is no text in {text.place}. Give a source with prose in it.")
    return text


def _stdlib() -> Text:
    try:
        topics: Mapping[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise UserError(
            "this Python lacks pydoc_data.topics, the text of source=stdlib. Install Python's whole "
            "standard library, or take source=packages or the path of a text file."
        ) from error
    version = platform.python_version()
    return Text(
        content=_GAP.join(topics[name] for name in sorted(topics)),
        place=f"the documentation topics of Python {version}",
        notes=(
            f"The text is the documentation that comes with Python {version}. It differs between "
            "Python releases; scores on another text do not compare.",
        ),
    )


def _packages() -> Text:
    text = Text(_GAP.join(paragraphs(*FOLDERS)), "the text of the locked packages")
    if text.sha256 == PACKAGES_SHA256:
        return text
    note = (
        f"{text.place} is not what the locked requirements give: its SHA-256 differs. Do not compare "
        "these scores with others. To compare, install the locked requirements (make setup)."
    )
    return Text(text.content, text.place, (note,))


def _hub(hub: Mapping[str, Any]) -> Text:
    lacking = [key for key in _HUB_KEYS if not hub.get(key)]
    unknown_keys = [key for key in hub if key not in _HUB_KEYS]
    if lacking or unknown_keys:
        raise UserError(
            f"source=hub needs {', '.join(_HUB_KEYS)} under hub and nothing else; "
            f"missing: {', '.join(lacking) or 'none'}; unknown: {', '.join(unknown_keys) or 'none'}."
        )
    file = HubFile(
        str(hub["repo"]),
        str(hub["filename"]),
        str(hub["revision"]),
        instead="Without the hub: give benchmark.source=PATH, a UTF-8 text file.",
    )
    column = str(hub["column"])
    lines, path = Parquet({"text": file}).read("text")
    rows = parse_rows(lines, path, {column: TEXT}, id_field=None)
    return Text(_GAP.join(row[column] for _, row in rows), f"column {column} of {file}")


def _file(source: str) -> Text:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(
            f"benchmark.source={source} is no text file, and no text of that name is known. Give the "
            f"path of a UTF-8 text file, or one of {', '.join((*_BUILT_IN, 'hub'))}."
        )
    try:
        return Text(read_bytes(path).decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Convert it first."
        ) from error


_BUILT_IN: dict[str, Callable[[], Text]] = {"stdlib": _stdlib, "packages": _packages}
