"""Failures at the hub, told apart by their cause, for both kinds of repository. No request is made."""

import re
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvmerge.hub import Repository, explain

MODEL = Repository("model", "a/b", "f00", "Without the hub: model.path=DIR.")
DATASET = Repository("dataset", "a/b", "f00", "Without the hub: benchmark.data_dir=DIR.")


def answered(kind, message="refused"):
    """An error that the hub's answer caused."""
    return kind(message, response=SimpleNamespace(headers={}, request=None, status_code=403))


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            answered(GatedRepoError),
            r"^a/b is gated\. Accept its terms at PAGE, then run `hf auth login` .*HF_TOKEN",
        ),
        (
            answered(RepositoryNotFoundError),
            r"shows no KIND a/b to this account \(PAGE\)\. .*private, run `hf auth login` .*HF_TOKEN",
        ),
        (answered(RevisionNotFoundError), r"^a/b has no revision 'f00'\. .*PAGE/commits/main"),
        (
            LocalEntryNotFoundError("not found"),
            r"^a/b is not whole in the cache /.*https://huggingface\.co did not send it \(not found\)",
        ),
        (HTTPError("no route"), r"not whole in the cache .*\(no route\)\. Run the same command again"),
        (answered(HfHubHTTPError, "503 busy"), r"not whole in the cache .*\(503 busy\)"),
        (
            OfflineModeIsEnabled("offline"),
            r"^a/b is not whole in the cache /.*HF_HUB_OFFLINE forbids.*Unset HF_HUB_OFFLINE once",
        ),
        (
            answered(RemoteEntryNotFoundError, "404 config.json"),
            r"^a/b lacks a file that is needed: 404 config\.json\. PAGE/tree/f00 lists",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("repository", "page"),
    [
        (MODEL, "https://huggingface.co/a/b"),
        (DATASET, "https://huggingface.co/datasets/a/b"),
    ],
    ids=["model", "dataset"],
)
def test_each_failure_says_what_to_do(cause, message, wrapped, repository, page):
    error = cause
    if wrapped:  # as transformers reports it
        error = OSError(str(cause))
        error.__cause__ = cause
    why = explain(error, repository)
    assert why is not None
    expected = message.replace("PAGE", re.escape(page)).replace("KIND", repository.kind)
    assert re.search(expected, why), why
    assert why.endswith(f". {repository.instead}")


def test_a_model_without_the_revision_may_be_had_at_the_newest():
    error = answered(RevisionNotFoundError)
    assert "model.revision=null takes the newest" in str(explain(error, MODEL))
    assert "model." not in str(explain(error, DATASET))


def test_a_file_missing_offline_is_the_setting_s_fault(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in str(explain(LocalEntryNotFoundError("not found"), MODEL))


@pytest.mark.parametrize("error", [ValueError("bad config"), OSError("no space left")])
def test_other_failures_are_not_the_hub_s(error):
    assert explain(error, MODEL) is None


def test_the_cache_is_the_hub_s(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/cache")
    assert str(MODEL.cache) == "/cache/models--a--b"
    assert str(DATASET.cache) == "/cache/datasets--a--b"
