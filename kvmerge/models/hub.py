"""A checkpoint on the Hugging Face hub: what of it is in the cache, and a download announced first."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from kvmerge.errors import UserError
from kvmerge.models.folder import CONFIG, GENERATION, INDEX, SINGLE, weight_files

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0
"""Seconds to wait for the list of a repository's files."""
_COMMIT = re.compile("[0-9a-f]{40}")
_SMALL = (CONFIG, GENERATION, "tokenizer.json")
"""What a model needs beside its weights: which tokens end an answer is in the second."""


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
        OSError: what the hub's client raises (see `kvmerge.hub.explain`).
        HTTPError: likewise.
    """
    found = _look_up(repository, revision)
    if isinstance(found, bool):
        return found
    # A few hundred bytes; the list of files is public even where the files are gated.
    hf_hub_download(repository, CONFIG, revision=revision)
    logger.info("downloading %s", found)
    return False


def offered(repository: str, revision: str | None, folder: Path) -> str | None:
    """Say what `prepare` would announce, and put the model's configuration into a folder.

    Args:
        repository: hub id.
        revision: commit, tag or branch; None for the newest.
        folder: where the configuration is put, a few hundred bytes; the cache is left as it is.

    Returns:
        what would be downloaded, in words; None where the cache holds the model.

    Raises:
        OSError: as `prepare` does.
        HTTPError: likewise.
    """
    found = _look_up(repository, revision)
    if isinstance(found, bool):
        return None
    hf_hub_download(repository, CONFIG, revision=revision, local_dir=folder)
    return found


def _look_up(repository: str, revision: str | None) -> bool | str:
    """Return what `prepare` does where the cache holds a model; otherwise what there is to download."""
    if _COMMIT.fullmatch(revision or "") and _is_cached(repository, revision):
        return True
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except (HTTPError, OfflineModeIsEnabled) as error:
        answered = getattr(error, "response", None) is not None
        if not answered and _cached_file(repository, CONFIG, revision) is not None:
            return True
        raise
    if _is_cached(repository, info.sha):
        return False
    wanted = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if _is_loaded(file.rfilename) and _cached_file(repository, file.rfilename, info.sha) is None
    }
    size = f"{sum(wanted.values()) / 1e9:.2f} GB" if any(wanted.values()) else "size not stated"
    return (
        f"{repository} from {constants.ENDPOINT}/{repository} at {info.sha} ({size}, kept in "
        f"{constants.HF_HUB_CACHE})"
    )


def _is_loaded(file: str) -> bool:
    """Whether transformers fetches a file of a repository that has safetensors.

    Repositories often keep the same weights in other formats and folders beside.
    """
    if "/" in file or file.startswith("consolidated"):
        return False
    return file.endswith((".safetensors", ".json", ".jinja")) or file == "tokenizer.model"


def _cached_file(repository: str, file: str, revision: str | None) -> Path | None:
    path = try_to_load_from_cache(repository, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the folder in the hub's cache that holds a commit; None where there is none yet."""
    config = _cached_file(repository, CONFIG, revision)
    return None if config is None else config.parent


def _is_cached(repository: str, revision: str | None) -> bool:
    """Whether all that a model needs is in the hub's cache."""
    if any(_cached_file(repository, name, revision) is None for name in _SMALL):
        return False
    if _cached_file(repository, SINGLE, revision) is not None:
        return True
    index = _cached_file(repository, INDEX, revision)
    if index is None:
        return False
    try:
        names = weight_files(index)
    except UserError:
        return True  # the loader refuses it, and says which folder to delete
    return all(_cached_file(repository, name, revision) is not None for name in names)
