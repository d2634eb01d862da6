"""What the commands beside `run.py` have in common: how they ask, and how they end."""

from __future__ import annotations

import functools
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import ParamSpec

from kvmerge.errors import UserError

USER_ERROR = 2
"""Exit status after a `UserError`; what argparse refuses ends with it too."""

_Given = ParamSpec("_Given")


def parser_of(prog: str, description: str | None) -> ArgumentParser:
    """Return a parser whose help shows a text, mostly a module's docstring, as it is laid out."""
    return ArgumentParser(prog, description=description, formatter_class=RawDescriptionHelpFormatter)


def exits(main: Callable[_Given, int]) -> Callable[_Given, int]:
    """Let a function that gives an exit status print a `UserError` as one message, and give 2."""

    @functools.wraps(main)
    def told(*args: _Given.args, **kwargs: _Given.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return USER_ERROR

    return told
