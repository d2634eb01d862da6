"""Folders, and hub files against a hub on localhost that breaks off, truncates and lies."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import source
from benchmarks.source import (
    Archive,
    Files,
    Folder,
    HubFile,
    Parquet,
    cached,
    fetch,
    load_rows,
    shown_size,
)
from kvmerge.errors import UserError
from tests import hub_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = HubFile("owner/name", "folder/data.bin", COMMIT, SHA256)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A hub that holds `FILE`, and an empty cache."""
    with hub_server.serve() as hub:
        hub.put(FILE.repo, COMMIT, FILE.filename, CONTENT)
        hub_server.use(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        yield hub


def finished_files(tmp_path: Path) -> list[str]:
    """What the cache holds as a finished file."""
    found = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return [path.name for path in found if path.name in (SHA256, "data.bin")]


# Fetching


def test_a_file_is_announced_fetched_and_kept(hub, caplog):
    caplog.set_level("INFO", logger="benchmarks")
    assert cached(FILE) is None
    path = fetch(FILE)
    assert path.read_bytes() == CONTENT
    assert cached(FILE) == path
    (message,) = caplog.messages
    assert message == (
        f"Fetching folder/data.bin of the hub's dataset owner/name (revision {COMMIT}), 10.2kB, "
        f"from {hub.url}/datasets/owner/name/resolve/{COMMIT}/folder/data.bin"
    )


def test_what_is_cached_is_neither_announced_nor_asked_for(hub, caplog):
    path = fetch(FILE)
    hub.requests.clear()
    caplog.set_level("INFO", logger="benchmarks")
    caplog.clear()
    assert fetch(FILE) == path
    assert caplog.messages == []
    assert hub.requests == []


def test_a_branch_is_taken_as_it_was_first_fetched(hub):
    hub.branches["main"] = COMMIT
    file = FILE.at("main")
    path = fetch(file)
    assert (path.read_bytes(), path.parts[-3]) == (CONTENT, COMMIT)
    hub.branches["main"] = "f" * 40
    hub.requests.clear()
    assert fetch(file) == path
    assert hub.requests == []


def test_another_revision_has_no_known_content():
    assert FILE.at(None) is FILE
    assert FILE.at(COMMIT) is FILE
    other = replace(FILE, size=5).at("main")
    assert (other.revision, other.sha256, other.size) == ("main", None, None)


def test_offline_the_cache_is_enough(hub, monkeypatch):
    path = fetch(FILE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(FILE) == path


def test_offline_without_cache(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"not whole in the cache.*HF_HUB_OFFLINE.*benchmark\.data_dir=DIR"
    ):
        fetch(FILE)
    assert hub.requests == []


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_large_files_come_from_another_host_which_never_sees_the_token(hub, monkeypatch, token):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.elsewhere = hub.url.replace("127.0.0.1", "localhost")
    assert fetch(FILE).read_bytes() == CONTENT
    sent = {(asked.path.startswith("/elsewhere"), asked.token) for asked in hub.requests}
    assert sent == {(False, token and f"Bearer {token}"), (True, None)}


# Networks


def test_a_dropped_download_is_an_error_and_the_next_run_gets_the_whole_file(hub, tmp_path):
    hub.reset_after = 4000
    with pytest.raises(
        UserError, match=r"cannot fetch folder/data\.bin.*Run the same command again.*data_dir=DIR"
    ):
        fetch(FILE)
    assert finished_files(tmp_path) == []
    assert cached(FILE) is None
    hub.reset_after = None
    assert fetch(FILE).read_bytes() == CONTENT


def test_a_connection_closed_early_is_opened_again(hub):
    hub.close_after = 4000
    assert fetch(FILE).read_bytes() == CONTENT
    assert [asked.method for asked in hub.requests].count("GET") == 2


def test_a_truncated_file_is_an_error_and_the_next_run_gets_the_whole_one(hub, tmp_path):
    hub.serve_instead = CONTENT[:5000]
    with pytest.raises(
        UserError, match=r"should be of size 10240 but has size 5000.*Run the same command again"
    ):
        fetch(FILE)
    assert finished_files(tmp_path) == []
    assert cached(FILE) is None
    hub.serve_instead = None
    assert fetch(FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["pinned", "as the hub states it"])
def test_other_content_is_refused_deleted_and_fetched_anew(hub, tmp_path, sha256):
    file = replace(FILE, sha256=sha256)
    wrong = CONTENT[::-1]
    hub.serve_instead = wrong
    found = hashlib.sha256(wrong).hexdigest()
    with pytest.raises(
        UserError, match=rf"data\.bin is damaged: its SHA-256 is {found}, expected {SHA256}"
    ):
        fetch(file)
    assert finished_files(tmp_path) == []
    hub.serve_instead = None
    assert fetch(file).read_bytes() == CONTENT


def test_a_file_that_the_hub_changed_is_refused(hub):
    hub.put(FILE.repo, COMMIT, FILE.filename, b"changed")
    with pytest.raises(UserError, match=rf"expected {SHA256}"):
        fetch(FILE)
    assert cached(FILE) is None


def test_damage_in_the_cache_is_found_although_the_file_was_right_before(hub):
    path = fetch(FILE)
    path.resolve().write_bytes(CONTENT + b"!")
    with pytest.raises(UserError, match="is damaged"):
        fetch(FILE)
    assert cached(FILE) is None
    assert fetch(FILE).read_bytes() == CONTENT


def test_damage_that_cannot_be_deleted_is_named_all_the_same(hub, monkeypatch):
    path = fetch(FILE)
    path.resolve().write_bytes(b"damaged")

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=rf"expected {SHA256}\. It cannot be deleted here \(Permission"):
        fetch(FILE)


def test_a_file_is_hashed_once(hub, monkeypatch):
    digests = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: digests.append(args) or real(*args))
    fetch(FILE)
    fetch(FILE)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (
            403,
            "GatedRepo",
            r"is gated\. Accept its terms at http.*/datasets/owner/name, .*hf auth login",
        ),
        (401, "RepoNotFound", r"shows no dataset owner/name .*private.*hf auth login"),
        (404, "RevisionNotFound", rf"has no revision '{COMMIT}'.*/commits/main"),
        (404, "EntryNotFound", rf"lacks a file that is needed.*/tree/{COMMIT} lists"),
        (500, "", "500"),
    ],
)
def test_refusals_are_told_apart(hub, status, code, words):
    hub.refuse = (status, code)
    with pytest.raises(UserError, match=rf"cannot fetch folder/data\.bin.*: .*{words}.*data_dir=DIR"):
        fetch(FILE)


def test_a_hub_that_does_not_answer_is_named(hub, monkeypatch, tmp_path):
    with hub_server.serve() as gone:
        pass
    hub_server.use(gone, tmp_path / "cache", monkeypatch)
    with pytest.raises(UserError, match=rf"from {gone.url}/.*refused.*Run the same command again"):
        fetch(FILE)


@pytest.mark.parametrize("file", [replace(FILE, repo="a b"), replace(FILE, filename="../x")])
def test_a_name_that_no_dataset_can_have_is_refused_without_a_request(hub, file):
    with pytest.raises(UserError, match="there cannot be a"):
        fetch(file)
    assert hub.requests == []


def test_what_to_do_instead_is_the_file_s_own(hub):
    file = replace(FILE, filename="other", instead="Give a text.")
    with pytest.raises(UserError, match=r"lacks a file.* Give a text\."):
        fetch(file)


@pytest.mark.parametrize(
    ("size", "shown"), [(None, "size unknown"), (113_932_529, "114MB"), (0, "0.00B")]
)
def test_sizes_are_shown_as_people_read_them(size, shown):
    assert shown_size(size) == shown


# Folders


def test_a_folder_is_read_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"one\r\n")
    folder = Folder(tmp_path)
    folder.require(["a"])
    assert folder.read("a") == (b"one\r\n", str(tmp_path / "a.jsonl"))


def test_a_folder_says_what_is_missing_and_what_is_there(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    folder = Folder(tmp_path, suffix=".txt")
    with pytest.raises(UserError, match=r"has no c\.txt, d\.txt\. .*benchmark\.tasks=\[a,b\]"):
        folder.require(["a", "c", "b", "d"])
    with pytest.raises(UserError, match=r"has no c\.txt\. .*benchmark\.tasks=\[b\]"):
        folder.require(["c"], known=["b", "c"])
    with pytest.raises(UserError, match=r"has no c\.txt\. It holds a\.txt, b\.txt\."):
        folder.require(["c"])
    with pytest.raises(UserError, match=r"nowhere is not a folder\. It must hold one <task>\.jsonl"):
        Folder(tmp_path / "nowhere").require(["a"])
    with pytest.raises(UserError, match=r"cannot read .*c\.txt"):
        folder.read("c")


# Archives


def zipped(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Make an archive of a zip file's content, as if it had been fetched."""
    path = tmp_path / "data.zip"
    monkeypatch.setattr(source, "fetch", lambda file: path)

    def make(content: bytes, suffix: str = "") -> Archive:
        path.write_bytes(content)
        return Archive(HubFile("owner/name", "data.zip", COMMIT), suffix)

    return make


def test_a_member_is_found_by_the_end_of_its_path(archive, tmp_path):
    members = {"data/t.jsonl": b"one", "data/t_e.jsonl": b"two", "u/v.jsonl": b"three"}
    read = archive(zipped(members)).read
    assert read("t.jsonl") == (b"one", f"{tmp_path / 'data.zip'}, data/t.jsonl")
    assert read("data/t.jsonl")[0] == b"one"
    assert archive(zipped(members), ".jsonl").read("u/v")[0] == b"three"


def test_a_missing_member_is_named_with_what_is_there(archive):
    members = {f"data/{number:02d}.jsonl": b"" for number in range(12)} | {"data/": b""}
    with pytest.raises(
        UserError, match=r"data\.zip holds no 0\.jsonl\. It holds data/00\.jsonl, .* and 2 more\."
    ):
        archive(zipped(members)).read("0.jsonl")


def test_two_members_of_one_name_are_refused(archive):
    with pytest.raises(UserError, match=r"more than one t\.jsonl: a/t\.jsonl, b/t\.jsonl"):
        archive(zipped({"a/t.jsonl": b"", "b/t.jsonl": b""})).read("t.jsonl")


@pytest.mark.parametrize(
    "name", ["../t.jsonl", "a/../../t.jsonl", "/etc/t.jsonl", "C:/t.jsonl", "..\\a/t.jsonl"]
)
def test_a_member_that_points_out_of_the_archive_is_refused_by_name(archive, name, tmp_path):
    content = zipped({name: b"x", "good.jsonl": b"y"})
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(UserError) as caught:
        archive(content).read("t.jsonl")
    assert f"member {name!r} points out of the archive" in str(caught.value)
    assert archive(content).read("good.jsonl")[0] == b"y"
    assert sorted(tmp_path.parent.iterdir()) == before


def test_an_absurd_size_is_refused_before_anything_is_unpacked(archive, monkeypatch):
    monkeypatch.setattr(source, "LARGEST_MEMBER", 1000)
    content = zipped({"t.jsonl": b"x" * 1001, "u.jsonl": b"x" * 1000})
    assert len(archive(content).read("u.jsonl")[0]) == 1000
    with pytest.raises(UserError, match=r"t\.jsonl would unpack to 1\.00kB, more than"):
        archive(content).read("t.jsonl")


def test_a_size_that_lies_is_an_error(archive, monkeypatch):
    content = bytearray(zipped({"t.jsonl": b"x" * 5000}))
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 10)
    with pytest.raises(UserError, match=r"cannot read .* as a zip archive: Bad CRC-32"):
        archive(bytes(content)).read("t.jsonl")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>no</html>", zipped({"t.jsonl": b"x" * 99})[:-30]],
    ids=["empty", "a page", "cut short"],  # a zip holds the time it was made at
)
def test_what_is_no_zip_file_is_an_error(archive, content):
    with pytest.raises(
        UserError, match=r"cannot read .*data\.zip as a zip archive: File is not a zip file\. Delete it"
    ):
        archive(content).read("t.jsonl")


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_damage_gives_the_content_or_a_user_error(tmp_path_factory, position, value):
    data = json.dumps({"t": list(range(300))}).encode()
    content = bytearray(zipped({"data/t.jsonl": data}))
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "fetch", lambda file: path)
        with contextlib.suppress(UserError):
            assert Archive(FILE).read("t.jsonl")[0] == data


# Files of the hub, one a name


def test_json_lines_are_read_as_they_are(hub):
    content, place = Files({"t": FILE}).read("t")
    assert content == CONTENT
    assert place.endswith("folder/data.bin")


def test_parquet_rows_come_through_as_json_lines(hub, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    context = "x\r\ny\u2028\ufffd" + "长" * 200_000
    rows = [
        {"_id": "a", "context": context, "answers": ["p", ""], "all": None},
        {"_id": "b", "context": "", "answers": [], "all": ["c"]},
    ]
    path = tmp_path / "rows.parquet"
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    hub.put("owner/name", COMMIT, "rows.parquet", path.read_bytes())
    data, place = Parquet({"t": HubFile("owner/name", "rows.parquet", COMMIT)}).read("t")
    assert [json.loads(line) for line in data.decode().split("\n")[:-1]] == rows
    assert place.endswith("rows.parquet")


def test_parquet_is_read_without_a_request_or_a_trace_in_the_cache_of_datasets(tmp_path, monkeypatch):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"a": "x"}]).to_parquet(path)
    cache = tmp_path / "cache of datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr("datasets.load.increase_load_count", lambda name: pytest.fail(name))
    assert list(source.load_rows(path)) == [{"a": "x"}]
    assert not cache.exists()


def test_what_is_no_parquet_is_an_error(hub):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r"cannot read .* as rows of parquet: .*data_dir=DIR"):
        Parquet({"t": FILE}).read("t")


@pytest.mark.parametrize("kind", [Files, Parquet])
def test_a_name_without_a_file(kind):
    with pytest.raises(UserError, match=r"unknown file of the hub 'u'\..* Available: t"):
        kind({"t": FILE}).read("u")


# Datasets of the hub


@pytest.fixture
def datasets_hub(hub, tmp_path, monkeypatch):
    """The hub, asked by the `datasets` library too."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return hub


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", r"owner/name is gated\. Accept its terms at http.*/datasets/owner/name, "),
        (401, "RepoNotFound", r"shows no dataset owner/name .*private.*hf auth login"),
        (404, "RevisionNotFound", r"owner/name has no revision 'v2'.*/commits/main"),
    ],
)
def test_a_dataset_that_the_hub_refuses_says_why(datasets_hub, status, code, words):
    datasets_hub.refuse = (status, code)
    with pytest.raises(
        UserError, match=rf"^cannot read owner/name: .*{words}.*benchmark\.dataset=FILE"
    ):
        next(load_rows("owner/name", split="test", revision="v2"))


def test_a_dataset_that_is_not_cached_says_that_the_hub_is_off(datasets_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^cannot read owner/name: .*HF_HUB_OFFLINE forbids.*=FILE"):
        next(load_rows("owner/name", split="test"))
    assert datasets_hub.requests == []


def test_a_dataset_of_an_unreachable_hub(datasets_hub, monkeypatch, tmp_path):
    with hub_server.serve() as gone:
        pass
    hub_server.use(gone, tmp_path / "cache", monkeypatch)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", gone.url)
    with pytest.raises(UserError, match=r"did not send it .*refused.*Run the same command again"):
        next(load_rows("owner/name", split="test"))


def test_what_datasets_itself_refuses_keeps_its_words(datasets_hub, monkeypatch):
    def refuse(*_, **__):
        raise ValueError('Unknown split "tset". Should be one of ["test"].\nsecond line')

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        UserError, match=r'^cannot read owner/name: Unknown split "tset"\. .* \["test"\]\.$'
    ):
        next(load_rows("owner/name", split="tset"))
    assert datasets_hub.requests == []
