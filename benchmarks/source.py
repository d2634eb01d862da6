"""Where a benchmark's rows come from: a folder, or files of the Hugging Face hub kept in its cache.

All benchmarks read through here, so that each of them works from a folder and offline, says before
a download what comes from where and how big it is, and never uses a file whose SHA-256 is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks.rows import read_bytes
from kvmerge.errors import UserError, first_line, unknown
from kvmerge.files import is_folder
from kvmerge.hub import Repository, explain

logger = logging.getLogger(__name__)

LARGEST_MEMBER = 2**30
"""Most bytes that a zip member may unpack to; the largest official one is below a tenth of it."""

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset on the hub."""

    repo: str
    """`owner/name` of the dataset."""
    filename: str
    """Path inside it."""
    revision: str
    """A commit, 40 hex digits, where results are to be reproduced; a branch or tag also works and
    is then taken as it was when it was first fetched."""
    sha256: str | None = None
    """What the content must hash to; None: what the hub itself says, if it does."""
    size: int | None = None
    """Bytes; None: not known beforehand."""
    licence: str | None = None
    """Terms of the data, for people to read."""
    instead: str = "Without the hub: pass benchmark.data_dir=DIR, a folder with <task>.jsonl."
    """What to do where the file cannot be had, for messages."""

    def at(self, revision: str | None) -> HubFile:
        """Return the file at another revision, of whose content nothing is known; None: this one."""
        if revision in (None, self.revision):
            return self
        return replace(self, revision=str(revision), sha256=None, size=None)

    def notes(self, revision: str | None) -> list[str]:
        """Return what a reader of results made from another revision must know."""
        if revision in (None, self.revision):
            return []
        return [
            f"The data are those of revision {revision} of {self.repo}, whose SHA-256 is not known "
            "here."
        ]

    def __str__(self) -> str:
        return f"{self.filename} of the hub's dataset {self.repo} (revision {self.revision})"


class Source(Protocol):
    """Where the rows of named tasks are read from."""

    def read(self, name: str) -> tuple[bytes, str]:
        """Return the JSON lines called `name`, and how to name their place in messages.

        Raises UserError if they cannot be had.
        """
        ...


@dataclass(frozen=True)
class Folder:
    """A folder with one file a name."""

    folder: Path
    suffix: str = ".jsonl"

    def require(self, names: Sequence[str], known: Sequence[str] | None = None) -> None:
        """Raise UserError saying what is missing, and what is there, before anything runs.

        `known`: all names that exist, if `names` are not all of them.
        """
        if not is_folder(self.folder):
            raise UserError(
                f"benchmark.data_dir {self.folder} is not a folder. "
                f"It must hold one <task>{self.suffix} a task."
            )
        missing = [f"{name}{self.suffix}" for name in names if not self._path(name).is_file()]
        if not missing:
            return
        there = [name for name in known or names if self._path(name).is_file()]
        if there:
            hint = f"To run what is there: benchmark.tasks=[{','.join(there)}]."
        else:
            hint = f"It holds {_listed(path.name for path in sorted(self.folder.iterdir()))}."
        raise UserError(f"benchmark.data_dir {self.folder} has no {', '.join(missing)}. {hint}")

    def read(self, name: str) -> tuple[bytes, str]:
        """Return the content and the path of a name's file. Raises UserError if it is unreadable."""
        path = self._path(name)
        return read_bytes(path), str(path)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{self.suffix}"


def folder_or_hub(
    data_dir: str | None,
    revision: str | None,
    hub: Callable[[], Source],
    names: Sequence[str],
    *,
    known: Sequence[str] | None = None,
    suffix: str = ".jsonl",
) -> Source:
    """Return the source that a benchmark's settings ask for.

    Args:
        data_dir: the folder to read; None takes the hub.
        revision: of the hub; None is the pinned one.
        hub: gives the hub's source.
        names: what must be in the folder.
        known: all names that exist, if `names` are not all of them.
        suffix: what follows a name in the folder's files.

    Raises UserError for a revision of a folder, and for a missing folder or file.
    """
    if data_dir is None:
        return hub()
    if revision is not None:
        raise UserError(
            f"benchmark.revision={revision} is of the hub and benchmark.data_dir={data_dir} is a "
            "folder. Give one of the two."
        )
    folder = Folder(Path(data_dir).expanduser(), suffix)
    folder.require(names, known)
    return folder


@dataclass(frozen=True)
class Archive:
    """A zip file of the hub. Members are read in memory; nothing is ever unpacked to disk."""

    file: HubFile
    suffix: str = ""

    def read(self, name: str) -> tuple[bytes, str]:
        """Return the content of a member and how to name it.

        The member is the one whose path is, or ends with a slash and then, `name` and the suffix.
        Raises UserError if there is none or more than one, if its path leaves the archive's folder
        or its size is absurd, if the archive is damaged, and what `fetch` raises.
        """
        path = fetch(self.file)
        try:
            with zipfile.ZipFile(path) as archive:
                member = _member(archive, f"{name}{self.suffix}", path)
                return archive.read(member), f"{path}, {member.filename}"
        except UserError:
            raise
        except Exception as error:
            # Damage shows as errors of zipfile, of each compression, of struct or of the codec.
            raise UserError(
                f"cannot read {path} as a zip archive: {error or type(error).__name__}. "
                f"Delete it to have it fetched again. {self.file.instead}"
            ) from error


@dataclass(frozen=True)
class Files:
    """Files of the hub, one a name, holding JSON lines."""

    files: Mapping[str, HubFile]

    def read(self, name: str) -> tuple[bytes, str]:
        """Return the content and the path of a name's file.

        Raises UserError for a name without a file, and what `fetch` raises.
        """
        path = self._fetch(name)
        return read_bytes(path), str(path)

    def _fetch(self, name: str) -> Path:
        if name not in self.files:
            raise unknown("file of the hub", name, self.files)
        return fetch(self.files[name])


class Parquet(Files):
    """Parquet files of the hub, one a name, read as JSON lines."""

    def read(self, name: str) -> tuple[bytes, str]:
        """Return a name's rows as JSON lines, and the path of their file.

        Raises UserError for a name without a file, for a file that is not parquet or holds values
        that JSON lacks, and what `fetch` raises.
        """
        path = self._fetch(name)
        try:
            lines = [f"{json.dumps(row, ensure_ascii=False)}\n" for row in load_rows(path)]
        except (UserError, TypeError) as error:
            raise UserError(
                f"cannot read {path} as rows of parquet: {error}. {self.files[name].instead}"
            ) from error
        return "".join(lines).encode("utf-8"), str(path)


def load_rows(
    dataset: str | Path,
    subset: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Return rows as the `datasets` library reads them, one at a time.

    Args:
        dataset: a parquet file, which is streamed, or the id of a dataset on the hub, which is kept in
            the library's cache.
        subset: of a hub's dataset.
        split: of a hub's dataset.
        revision: of a hub's dataset.

    Raises UserError if they cannot be had or read, and NeedsDownload inside `no_downloads`.
    """
    import datasets  # late: it takes half a second

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no request but for what is read
    try:
        if isinstance(dataset, Path):
            # Not load_dataset, which reports each use over the network, even of a local file.
            with tempfile.TemporaryDirectory(prefix="kvmerge-") as locks:
                yield from datasets.IterableDataset.from_parquet(str(dataset), cache_dir=locks)
        else:
            if not _held_back.get():
                logger.info("Reading %s of the hub; what its cache lacks is downloaded", dataset)
            yield from datasets.load_dataset(
                dataset,
                subset,
                split=split,
                revision=revision,
                download_config=datasets.DownloadConfig(local_files_only=_held_back.get()),
            )
    except UserError:
        raise
    except Exception as error:
        # Each reader has errors of its own, wrapped or not.
        why = None if isinstance(dataset, Path) else _refusal(error, dataset, revision)
        if why is None and _held_back.get() and not isinstance(dataset, Path):
            raise NeedsDownload(f"{dataset} is not in the cache of datasets yet.") from error
        why = why or f"{first_line(error.__cause__ or error).rstrip('.')}."
        raise UserError(f"cannot read {dataset}: {why}") from error


def _refusal(error: Exception, dataset: str, revision: str | None) -> str | None:
    """Return why the hub did not give a dataset and what to do, None if the hub is not the cause.

    `datasets` drops the hub's own error, so the hub is asked once more, as `datasets` asks first.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if isinstance(error, (FileNotFoundError, ConnectionError)):
        try:
            get_hf_file_metadata(
                hf_hub_url(dataset, "README.md", repo_type="dataset", revision=revision)
            )
        except EntryNotFoundError:
            pass  # not every dataset has one
        except Exception as refusal:
            error = refusal
    instead = "Without the hub: give a JSONL, CSV or parquet file with benchmark.dataset=FILE."
    return explain(error, Repository("dataset", dataset, revision, instead))


def _member(archive: zipfile.ZipFile, wanted: str, path: Path) -> zipfile.ZipInfo:
    """Find the one member to read."""
    found = [member for member in archive.infolist() if f"/{member.filename}".endswith(f"/{wanted}")]
    if not found:
        names = _listed(name for name in archive.namelist() if not name.endswith("/"))
        raise UserError(f"{path} holds no {wanted}. It holds {names}.")
    for member in found:
        parts = re.split(r"[/\\]", member.orig_filename)
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise UserError(
                f"{path} is refused: its member {member.orig_filename!r} points out of the archive."
            )
    if len(found) > 1:
        names = _listed(member.filename for member in found)
        raise UserError(f"{path} holds more than one {wanted}: {names}.")
    if found[0].file_size > LARGEST_MEMBER:
        raise UserError(
            f"{path} is refused: its member {found[0].filename} would unpack to "
            f"{shown_size(found[0].file_size)}, more than {shown_size(LARGEST_MEMBER)}."
        )
    return found[0]


def _listed(names: Iterator[str] | Sequence[str], most: int = 10) -> str:
    """Return names as a message may show them."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return f"{', '.join(listed[:most]) or 'nothing'}{more}"


def shown_size(size: int | None) -> str:
    """Return a number of bytes as people read it."""
    return "size unknown" if size is None else tqdm.format_sizeof(size, "B")


class NeedsDownload(UserError):
    """A file that is not in the cache, while downloads are held back."""


_held_back: ContextVar[bool] = ContextVar("held_back", default=False)


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Hold downloads back inside the block: `fetch` raises `NeedsDownload` instead.

    The hub is asked all the same, so that what could not be downloaded is refused as without the block.
    """
    token = _held_back.set(True)
    try:
        yield
    finally:
        _held_back.reset(token)


def fetch(file: HubFile) -> Path:
    """Return the path of a file in the hub's cache, downloaded only if it is not there.

    A download is announced: what, from where, how big. The SHA-256 is checked, once for each state of
    the file; a wrong file is deleted.

    Raises UserError if the file can be had neither from the cache nor from the hub, or is wrong, and
    NeedsDownload inside `no_downloads`.
    """
    path = cached(file) or _download(file)
    check(file, path)
    return path


def cached(file: HubFile) -> Path | None:
    """Return the path of a file in the hub's cache, None if it is not there. Asks no network.

    Raises UserError for names that no dataset or file can have.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(
            file.repo, file.filename, revision=file.revision, repo_type="dataset"
        )
    except ValueError as error:
        raise UserError(f"there cannot be a {file}: {error}") from error
    return Path(path) if isinstance(path, str) else None


def check(file: HubFile, path: Path) -> str | None:
    """Return the SHA-256 of a cached file, which is what it must be; None if nothing says what.

    Raises UserError with both if they differ, after deleting the file.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    # The hub names large files in its cache by the SHA-256 that it has for them.
    expected = file.sha256 or (blob.name if _SHA256.fullmatch(blob.name) else None)
    if expected is None:
        return None
    stat = path.stat()
    found = _digest(path, stat.st_size, stat.st_mtime_ns)
    if found == expected:
        return found
    try:
        for link in (path.resolve(), blob, path):
            link.unlink(missing_ok=True)
        done = "It was deleted; the same command fetches it again."
    except OSError as error:
        done = f"It cannot be deleted here ({error.strerror}): delete it, then run again."
    raise UserError(
        f"{path} is damaged: its SHA-256 is {found}, expected {expected}. {done} {file.instead}"
    )


@functools.cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Hash a file once; a size or time of change that differs makes it another one."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _download(file: HubFile) -> Path:
    """Bring a file into the hub's cache, announcing it first; if downloads are held back, only ask."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(file.repo, file.filename, repo_type="dataset", revision=file.revision)
    try:
        size = shown_size(get_hf_file_metadata(url).size)
        if _held_back.get():
            raise NeedsDownload(f"{file}, {size}, is not in the hub's cache yet.")
        logger.info("Fetching %s, %s, from %s", file, size, url)
        return Path(
            hf_hub_download(file.repo, file.filename, repo_type="dataset", revision=file.revision)
        )
    except NeedsDownload:
        raise
    except Exception as error:
        # A broken download arrives as an OSError, or as the HTTP client's own error.
        repository = Repository("dataset", file.repo, file.revision, file.instead)
        why = explain(error, repository) or (
            f"{first_line(error).rstrip('.')}. Run the same command again. {file.instead}"
        )
        raise UserError(f"cannot fetch {file} from {url}: {why}") from error
