"""The Hugging Face hub: a download is announced before it starts, and a failure says what to do.

transformers reports most failures as one OSError with several causes in a chain; what went wrong
decides what the user can do about it, so the causes are told apart here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,  # of the HTTP client, whose package is not the same in all versions
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from kvmerge.errors import first_line
from kvmerge.models.checkpoints import INDEX, weight_files

log = logging.getLogger(__name__)

_TIMEOUT = 10.0
"""Seconds to wait for the list of a repository's files."""
_COMMIT = re.compile("[0-9a-f]{40}")
_SINGLE = "model.safetensors"
_SMALL = ("config.json", "generation_config.json", "tokenizer.json")
"""What a model needs beside its weights: which tokens end an answer is in the second."""
_LOCAL = "or give the folder of a local copy with model.path=DIR."


def prepare(repository: str, revision: str | None) -> bool:
    """Announce the download of a model that is not in the local cache; nothing where it is.

    What cannot be downloaded fails here, before any large file is asked for and without the minutes
    of retries that the hub's client spends on an unreachable server.

    Args:
        repository: hub id.
        revision: commit, tag or branch; None for the newest.

    Returns:
        whether to load from the cache without asking the hub; it holds the commit, or the hub cannot be
        reached.

    Raises:
        OSError: what the hub's client raises (see `explain`).
        HTTPError: likewise.
    """
    if _COMMIT.fullmatch(revision or "") and _is_cached(repository, revision):
        return True
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except (HTTPError, OfflineModeIsEnabled) as error:
        answered = getattr(error, "response", None) is not None
        if not answered and _cached_file(repository, "config.json", revision) is not None:
            return True
        raise
    if _is_cached(repository, info.sha):
        return False
    # A few hundred bytes; the list of files is public even where the files are gated.
    hf_hub_download(repository, "config.json", revision=revision)
    wanted = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if _is_loaded(file.rfilename) and _cached_file(repository, file.rfilename, info.sha) is None
    }
    log.info(
        "downloading %s from %s/%s at %s (%s, kept in %s)",
        repository,
        constants.ENDPOINT,
        repository,
        info.sha,
        f"{sum(wanted.values()) / 1e9:.2f} GB" if any(wanted.values()) else "size not stated",
        constants.HF_HUB_CACHE,
    )
    return False


def explain(error: BaseException, repository: str, revision: str | None) -> str | None:
    """Say what went wrong at the hub and what to do; None if the error came from elsewhere.

    Args:
        error: what loading raised; its causes are looked at too.
    """
    page = f"{constants.ENDPOINT}/{repository}"
    causes = list(_chain(error))

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(GatedRepoError):
        return (
            f"{repository} is gated. Accept its licence at {page}, then run `hf auth login` with a "
            f"token of that account (or set HF_TOKEN), {_LOCAL}"
        )
    if caused_by(RevisionNotFoundError):
        return (
            f"{repository} has no revision {revision!r}. model.revision=null takes the newest; "
            f"the commits are listed at {page}/commits/main."
        )
    if caused_by(RepositoryNotFoundError):
        return (
            f"the hub shows no model {repository} to this account ({page}). Correct the name; if "
            f"it is private, run `hf auth login`, {_LOCAL}"
        )
    if caused_by(OfflineModeIsEnabled) or (
        caused_by(LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return (
            f"{repository} is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids "
            f"to download it. Unset HF_HUB_OFFLINE once, {_LOCAL}"
        )
    if caused_by(EntryNotFoundError) and not caused_by(LocalEntryNotFoundError):
        return f"{repository} at {page} lacks a file of a checkpoint: {first_line(error)}"
    if caused_by(SafetensorError):
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        return f"a weight file of {repository} is damaged. Delete {folder} to download it again."
    if caused_by(LocalEntryNotFoundError, HTTPError):
        return (
            f"{repository} is not whole in the cache {constants.HF_HUB_CACHE}, and "
            f"{constants.ENDPOINT} did not send it ({first_line(causes[-1])}). Run again where the "
            f"hub can be reached, {_LOCAL}"
        )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_loaded(file: str) -> bool:
    """Whether transformers fetches a file of a repository that has safetensors.

    Repositories often keep the same weights in other formats and folders beside.
    """
    if "/" in file or file.startswith("consolidated"):
        return False
    return file.endswith((".safetensors", ".json", ".jinja")) or file == "tokenizer.model"


def _cached_file(repository: str, file: str, revision: str | None) -> Path | None:
    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _is_cached(repository: str, revision: str | None) -> bool:
    """Whether all that a model needs is in the hub's cache."""
    if any(_cached_file(repository, name, revision) is None for name in _SMALL):
        return False
    if _cached_file(repository, _SINGLE, revision) is not None:
        return True
    index = _cached_file(repository, INDEX, revision)
    return index is not None and all(
        _cached_file(repository, name, revision) is not None for name in weight_files(index)
    )
