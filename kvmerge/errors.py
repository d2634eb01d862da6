"""The one exception that is shown to a person as a message, without a traceback."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message says what was given, what is allowed and what to do; the command line prints it
    alone and exits with status 2.
    """


class Infeasible(UserError):
    """What was asked for is sound, but memory ran out here, or numbers overflow in this dtype."""


class NotFinite(Infeasible):
    """Keys, values, scores or logits of a prompt are not finite: nothing follows from them."""

    def __init__(self, found: str, why: str = "") -> None:
        """Say what is not finite and where, and why that may be so for a whole model."""
        super().__init__(f"{found}; {why}" if why else found)
        self.found = found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def summary(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it, the first cause last."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [error, *(causes(before) if before else [])]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or on the CPU."""
    import torch  # late: most of what imports this needs none of it

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def is_of_storage(error: BaseException) -> bool:
    """Return whether an error is one of the disk, which only its owner can mend."""
    return isinstance(error, OSError) and error.errno in _STORAGE


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist: what exists, and the nearest to it."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {given!r}.{hint} Available: {', '.join(names)}.")
