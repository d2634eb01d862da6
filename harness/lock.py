"""One writer a results folder: two would write each line twice.

The lock is the kernel's, on a file in the folder that says who holds it. It goes with the process,
however that ends, so there is nothing to clean up after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from kvmerge.errors import UserError
from kvmerge.files import try_to_write

logger = logging.getLogger(__name__)

FILE = ".writer"
_HELD = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def only_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a results folder inside the block; it is made if it is not there.

    Args:
        folder: the results folder.
        wait: whether to wait for another process that holds it, as the points of a sweep do.

    Raises:
        UserError: if another process holds it and is not waited for, naming its host and number and
            since when.
    """
    path = folder / FILE
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        file = _take(path, wait)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        # While it is held: nobody can be waiting for this very file, see `_take`.
        path.unlink(missing_ok=True)
        os.close(file)
        with contextlib.suppress(OSError):  # one holds something, and so those around it
            for place in made:
                place.rmdir()


def check_writer(folder: Path) -> None:
    """Refuse what `only_writer` would refuse, and leave the folder as it is.

    Raises:
        UserError: as `only_writer` does.
    """
    path = folder / FILE
    try:
        try_to_write(folder)
        file = os.open(path, os.O_RDONLY) if path.exists() else None
    except OSError as error:
        raise _unwritable(folder, error) from error
    if file is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            raise _unwritable(folder, error) from error
        raise UserError(_hint(folder, os.pread(file, 4096, 0))) from None
    finally:
        os.close(file)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"nothing can be written to {folder}: {error.strerror}. Choose another output_dir."
    )


def _take(path: Path, wait: bool) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # again: a holder takes an empty folder away
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(file, 4096, 0)
            if error.errno in _HELD and wait:
                logger.info("waiting: %s", _held_by(path.parent, holder))
                fcntl.flock(file, fcntl.LOCK_EX)
            else:
                os.close(file)
                if error.errno in _HELD:
                    raise UserError(_hint(path.parent, holder)) from None
                raise
        # A holder that has ended meanwhile took its file away: then this lock is on no file.
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
            break
        os.close(file)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(who).encode(), 0)
    return file


def _hint(folder: Path, holder: bytes) -> str:
    return f"{_held_by(folder, holder)} Wait for it, stop it, or choose another output_dir."


def _held_by(folder: Path, holder: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        who = json.loads(holder)
        return (
            f"{folder} is being written by process {who['pid']} on {who['host']} since {who['since']}."
        )
    return f"{folder} is being written by another process."
