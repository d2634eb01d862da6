"""Text of the locked packages: prose from docstrings, and source lines.

Files are read and parsed, never imported, so what is returned depends on the installed package
versions alone. `ast` hands docstrings over as they are written (Python 3.13 strips their
indentation later, in the compiler) and white space is collapsed here, so every supported Python
reads the same text.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmerge.errors import UserError

FOLDERS = (
    "networkx/algorithms",
    "networkx/generators",
    "sympy/combinatorics",
    "sympy/geometry",
    "sympy/physics",
    "sympy/stats",
)
"""Where prose and code come from: two packages that torch requires, and that change rarely."""

_SENTENCE = r"[A-Z](?:[a-zA-Z ,;'()]|-(?!-))+\."
_PROSE = re.compile(f"{_SENTENCE}(?: {_SENTENCE})*")
"""Plain sentences: no markup, section rules, formulas, numbers or doctest lines."""

_TRIPLE_QUOTED = re.compile(r"\w?(\"\"\"|''')(?:.|\n)*?\1\n?")

_PIECE = re.compile(r"[A-Za-z]+|\d|[^\w\s]+|_|\n\s*")


@dataclass(frozen=True)
class Docstring:
    """One docstring, reduced to its plain prose."""

    file: str
    """Path inside the package, with `/`."""
    name: str
    """Name of the function, method or class."""
    paragraphs: tuple[str, ...]
    """Paragraphs of plain prose, white space collapsed."""


def size(text: str) -> int:
    """Estimate the tokens of `text` without a tokenizer.

    For the prompts built here, SmolLM2's tokenizer gives 0.96 to 1.19 times as many.
    """
    return sum(
        1 + max(0, len(piece) - 3) // 7 if piece.isalpha() else 1 for piece in _PIECE.findall(text)
    )


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph of plain prose into its sentences."""
    return [f"{part}." for part in paragraph.removesuffix(".").split(". ")]


@functools.cache
def docstrings(*folders: str) -> tuple[Docstring, ...]:
    """Return the docstrings below `folders` (`package/sub/folder`) that hold plain prose.

    In file order. Raises UserError if a package is not installed.
    """
    return tuple(
        doc
        for folder in folders
        for name, text in _sources(folder)
        for doc in _docstrings_of(name, text)
    )


@functools.cache
def paragraphs(*folders: str) -> tuple[str, ...]:
    """Return the different paragraphs of the docstrings below `folders`, one-liners left out."""
    found = (text for doc in docstrings(*folders) for text in doc.paragraphs if len(text) >= 90)
    return tuple(dict.fromkeys(found))


@functools.cache
def code(*folders: str) -> tuple[tuple[str, ...], ...]:
    """Return the code lines of each file below `folders`, in file order.

    Without docstrings, comments, imports and blank lines, and without trailing white space.
    """
    return tuple(tuple(_code_lines(text)) for folder in folders for _, text in _sources(folder))


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the mini benchmark takes its text from the package {package}, which is not "
            f"installed. Install the locked requirements (make setup)."
        )
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _sources(folder: str) -> tuple[tuple[str, str], ...]:
    """Return path and text of the Python files below `folder`, tests left out."""
    package, _, inside = folder.partition("/")
    root = _package_dir(package)
    files = {path.relative_to(root).as_posix(): path for path in (root / inside).rglob("*.py")}
    return tuple(
        (name, files[name].read_text(encoding="utf-8"))
        for name in sorted(files)
        if "tests" not in name.split("/")
    )


def _docstrings_of(file: str, text: str) -> Iterator[Docstring]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in the packages' own strings
        tree = ast.parse(text)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        blocks = re.split(r"\n\s*\n", ast.get_docstring(node, clean=False) or "")
        collapsed = (" ".join(block.split()) for block in blocks)
        prose = tuple(block for block in collapsed if _PROSE.fullmatch(block))
        if prose:
            yield Docstring(file, node.name, prose)


def _code_lines(text: str) -> Iterator[str]:
    for line in _TRIPLE_QUOTED.sub("", text).split("\n"):
        words = line.split()
        if words and not words[0].startswith("#") and words[0] not in ("from", "import"):
            yield line.rstrip()
