"""Failures at the Hugging Face hub, for models and datasets alike: what went wrong, and what to do.

Libraries report most of them as one error with several causes in a chain; which cause it was decides
what the user can do about it, so they are told apart here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvmerge.errors import causes, first_line


@dataclass(frozen=True)
class Repository:
    """A model or a dataset on the hub."""

    kind: Literal["model", "dataset"]
    name: str
    """`owner/name`."""
    revision: str | None
    """Commit, tag or branch; None for the newest."""
    instead: str
    """What to do without the hub, a sentence for messages."""

    @property
    def page(self) -> str:
        """Address for people to read."""
        from huggingface_hub import constants  # late: most of what imports this asks no hub

        folder = "datasets/" if self.kind == "dataset" else ""
        return f"{constants.ENDPOINT}/{folder}{self.name}"

    @property
    def cache(self) -> Path:
        """Folder of its files in the hub's cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"{self.kind}s--{self.name.replace('/', '--')}"


def explain(error: BaseException, repository: Repository) -> str | None:
    """Return what went wrong at the hub and what to do; None if the error came from elsewhere.

    Args:
        error: what a library raised; its causes are looked at too.
        repository: what was asked for.
    """
    why = _explain(error, repository)
    return None if why is None else f"{why} {repository.instead}"


def _explain(error: BaseException, repository: Repository) -> str | None:
    from huggingface_hub import constants, errors

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes(error))

    name, page = repository.name, repository.page
    login = "run `hf auth login` with a token of an account that may read it, or set HF_TOKEN."
    if caused_by(errors.GatedRepoError):
        return f"{name} is gated. Accept its terms at {page}, then {login}"
    if caused_by(errors.RevisionNotFoundError):
        newest = "model.revision=null takes the newest; " if repository.kind == "model" else ""
        return (
            f"{name} has no revision {repository.revision!r}. {newest}{page}/commits/main lists the "
            "commits."
        )
    if caused_by(errors.RepositoryNotFoundError):
        return (
            f"the hub shows no {repository.kind} {name} to this account ({page}). Correct the name; "
            f"if it is private, {login}"
        )
    missing = f"{name} is not whole in the cache {constants.HF_HUB_CACHE}, and"
    local = caused_by(errors.LocalEntryNotFoundError)
    if caused_by(errors.OfflineModeIsEnabled) or (local and constants.HF_HUB_OFFLINE):
        return f"{missing} HF_HUB_OFFLINE forbids to download it. Unset HF_HUB_OFFLINE once."
    if caused_by(errors.EntryNotFoundError) and not local:
        return (
            f"{name} lacks a file that is needed: {first_line(error).rstrip('.')}. "
            f"{page}/tree/{repository.revision or 'main'} lists what it has."
        )
    if local or caused_by(errors.HTTPError):  # of the HTTP client, which depends on the version
        return (
            f"{missing} {constants.ENDPOINT} did not send it ({first_line(causes(error)[-1])}). Run "
            "the same command again where the hub can be reached."
        )
    return None
