"""Announced downloads, and what the cache holds. No request is made here."""

import json
import logging
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from kvmerge.models import hub
from kvmerge.models.folder import INDEX

COMMIT = "c" * 40


def answered(kind, message="refused"):
    """An error that the hub's answer caused."""
    return kind(message, response=SimpleNamespace(headers={}, request=None, status_code=403))


class Hub:
    """Stands in for the hub and its cache: what each file is, and what each call raises."""

    def __init__(self, monkeypatch, tmp_path):
        self.files = {}
        self.cached = set()
        self.listing: Exception | None = None
        self.config: Exception | None = None
        self.calls = []
        self.revisions = set()
        self.folders = []
        self.folder = tmp_path
        monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(model_info=self.model_info))
        monkeypatch.setattr(hub, "hf_hub_download", self.download)
        monkeypatch.setattr(hub, "try_to_load_from_cache", self.find)

    def model_info(self, repository, *, revision, files_metadata, timeout):
        assert files_metadata
        assert timeout
        self.calls.append("list")
        if self.listing is not None:
            raise self.listing
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.files.items()]
        return SimpleNamespace(siblings=siblings, sha=revision or COMMIT)

    def download(self, repository, file, *, revision, local_dir=None):
        self.calls.append(file)
        self.folders.append(local_dir)
        if self.config is not None:
            raise self.config

    def find(self, repository, file, revision):
        assert repository == "a/b"
        self.revisions.add(revision)
        return str(self.folder / file) if file in self.cached else None


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return Hub(monkeypatch, tmp_path)


# --- announcing


FILES = {
    "config.json": 600,
    "tokenizer.json": 2_000_000_000,
    "model-00001-of-00002.safetensors": 5_000_000_000,
    "model-00002-of-00002.safetensors": 4_000_000_000,
    "pytorch_model.bin": 9_000_000_000,
    "consolidated.safetensors": 9_000_000_000,
    "original/model.safetensors": 9_000_000_000,
    "README.md": 9_000_000_000,
}


def test_a_download_says_what_from_where_and_how_big(fake, caplog):
    """Of the files that are loaded; copies in other formats and what is cached are left out."""
    fake.files = FILES
    fake.cached = {"model-00002-of-00002.safetensors"}
    with caplog.at_level(logging.INFO, logger="kvmerge.models.hub"):
        hub.prepare("a/b", None)
    (line,) = caplog.messages
    assert line.startswith(
        f"downloading a/b from {constants.ENDPOINT}/a/b at {COMMIT} (7.00 GB, kept in "
    )
    assert fake.calls == ["list", "config.json"]


def test_sizes_that_the_hub_does_not_state(fake, caplog):
    fake.files = dict.fromkeys(FILES)
    with caplog.at_level(logging.INFO, logger="kvmerge.models.hub"):
        hub.prepare("a/b", "f00")
    (line,) = caplog.messages
    assert " at f00 (size not stated, " in line


SMALL = {"config.json", "generation_config.json", "tokenizer.json"}
SHARDS = ["model-1.safetensors", "model-2.safetensors"]


@pytest.fixture
def index(fake):
    weights = dict(zip("ab", SHARDS, strict=True))
    (fake.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("weights", [{"model.safetensors"}, {INDEX, *SHARDS}])
def test_a_cached_commit_is_loaded_without_a_request(fake, caplog, weights):
    fake.cached = SMALL | weights
    with caplog.at_level(logging.INFO, logger="kvmerge.models.hub"):
        assert hub.prepare("a/b", COMMIT)
    assert not caplog.messages
    assert not fake.calls
    assert fake.revisions == {COMMIT}


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_a_name_may_have_moved_so_the_hub_is_asked(fake, caplog, revision):
    fake.cached = SMALL | {"model.safetensors"}
    with caplog.at_level(logging.INFO, logger="kvmerge.models.hub"):
        assert not hub.prepare("a/b", revision)
    assert not caplog.messages
    assert fake.calls == ["list"]


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    "cached",
    [
        SMALL,
        {"model.safetensors"},
        SMALL - {"generation_config.json"} | {"model.safetensors"},
        SMALL | {INDEX},
        SMALL | {INDEX, SHARDS[0]},
    ],
)
def test_a_part_of_a_model_is_not_a_cached_one(fake, cached):
    fake.cached = cached
    assert not hub.prepare("a/b", COMMIT)
    assert fake.calls == ["list", "config.json"]


def test_a_broken_index_in_the_cache_is_left_to_the_loader(fake):
    (fake.folder / INDEX).write_text("")
    fake.cached = SMALL | {INDEX}
    assert hub.prepare("a/b", COMMIT)
    assert not fake.calls


def test_a_gated_model_is_refused_before_anything_is_announced(fake, caplog):
    fake.config = answered(GatedRepoError)
    with caplog.at_level(logging.INFO, logger="kvmerge.models.hub"), pytest.raises(GatedRepoError):
        hub.prepare("a/b", None)
    assert not caplog.messages


@pytest.mark.parametrize("error", [HTTPError("no route"), OfflineModeIsEnabled("offline")])
def test_an_unreachable_hub_leaves_the_cache_or_fails_at_once(fake, error):
    fake.listing = error
    with pytest.raises(type(error)):
        hub.prepare("a/b", None)
    fake.cached = {"config.json"}
    assert hub.prepare("a/b", None)
    assert fake.calls == ["list", "list"]


def test_a_refusal_counts_even_with_a_cached_configuration(fake):
    fake.listing = answered(RevisionNotFoundError)
    fake.cached = {"config.json"}
    with pytest.raises(RevisionNotFoundError):
        hub.prepare("a/b", "f00")


def test_an_offer_is_what_would_be_announced_and_fills_a_folder_instead_of_the_cache(fake, caplog):
    fake.files = FILES
    with caplog.at_level(logging.INFO, logger="kvmerge.models.hub"):
        offer = hub.offered("a/b", None, fake.folder)
        assert not caplog.messages
        hub.prepare("a/b", None)
    assert caplog.messages == [f"downloading {offer}"]
    assert fake.folders == [fake.folder, None]
    fake.cached = SMALL | {"model.safetensors"}
    assert hub.offered("a/b", COMMIT, fake.folder) is None


@pytest.mark.parametrize("error", [answered(GatedRepoError), answered(RevisionNotFoundError)])
def test_an_offer_fails_as_a_download_would(fake, error):
    fake.config = error
    with pytest.raises(type(error)):
        hub.offered("a/b", None, fake.folder)
