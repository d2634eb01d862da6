"""What a local checkpoint holds, as digests: a copy elsewhere is the same, a changed file is not."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvmerge.errors import UserError
from kvmerge.models.folder import check_folder, small_files, weight_paths

_WHOLE = 2**30
"""Bytes of weights up to which all of them are read: a second on any disk."""
_BLOCKS = 64
_BLOCK = 2**16


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file of a checkpoint that decides what the model does, by its name.

    Of more than 1 GiB of weights, 4 MiB a file are read beside its size: what trains or negates weights
    changes all of them. Neither time nor path counts: copying a checkpoint makes no other model of it.

    Raises:
        UserError: naming the files that cannot be read.
    """
    check_folder(folder)
    weights = weight_paths(folder)
    try:
        whole = sum(path.stat().st_size for path in weights) <= _WHOLE
        found = {str(path.relative_to(folder)): _digest(path) for path in small_files(folder)}
        return found | {path.name: _digest(path) if whole else _sampled(path) for path in weights}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}.") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled(path: Path) -> str:
    """Digest a file's size and blocks at even distances, the first (a header) and the last included."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return f"sampled:{digest.hexdigest()}"
