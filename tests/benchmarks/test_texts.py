from __future__ import annotations

import importlib
import io
import platform
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import texts
from benchmarks.mini.tasks import FOLDERS
from benchmarks.package_text import paragraphs
from benchmarks.rows import sha256
from benchmarks.texts import PACKAGES_SHA256, Text, read_text
from kvmerge.errors import UserError
from tests import hub_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {"repo": "owner/books", "filename": "books.parquet", "revision": COMMIT, "column": "text"}


def test_stdlib_is_every_topic_in_sorted_order():
    topics = importlib.import_module("pydoc_data.topics").topics
    rest = read_text("stdlib").content
    for name in sorted(topics):
        assert rest.startswith(topics[name])
        rest = rest[len(topics[name]) :].removeprefix("\n\n")
    assert rest == ""


def test_the_order_of_topics_is_not_that_of_the_module(monkeypatch):
    module = importlib.import_module("pydoc_data.topics")
    monkeypatch.setattr(module, "topics", {"b": "Second.", "a": "First."})
    assert read_text("stdlib").content == "First.\n\nSecond."


def test_stdlib_says_which_python_it_is_of():
    text = read_text("stdlib")
    assert platform.python_version() in text.place
    (note,) = text.notes
    assert platform.python_version() in note
    assert "do not compare" in note


def test_a_python_without_the_topics_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"lacks pydoc_data\.topics.*source=packages"):
        read_text("stdlib")


def test_packages_is_every_paragraph_and_the_same_on_every_machine():
    text = read_text("packages")
    assert text.content.split("\n\n") == list(paragraphs(*FOLDERS))
    assert text.sha256 == PACKAGES_SHA256
    assert text.notes == ()


def test_text_of_other_packages_is_reported(monkeypatch):
    monkeypatch.setattr(texts, "paragraphs", lambda *_: ("Something else.",))
    (note,) = read_text("packages").notes
    assert "SHA-256 differs" in note


@pytest.mark.parametrize("content", ["one\r\ntwo\n", "长 é \u2028 end"])
def test_a_file_comes_as_it_is(tmp_path, content):
    path = tmp_path / "book.txt"
    path.write_bytes(content.encode("utf-8"))
    text = read_text(str(path))
    assert (text.content, text.place) == (content, str(path))
    assert text.sha256 == sha256(content.encode("utf-8"))


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "book.txt").write_text("A book.")
    assert read_text("~/book.txt").content == "A book."


def test_a_source_that_is_nothing_is_an_error_that_names_the_others(tmp_path):
    for source in ("stdlb", str(tmp_path)):
        with pytest.raises(UserError, match=f"{source} is no text file.*stdlib, packages, hub"):
            read_text(source)


def test_bytes_that_are_not_utf_8_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 \(.* at byte 3\)"):
        read_text(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize("content", ["", " \n\n\t"])
def test_a_blank_text_is_refused(tmp_path, content):
    (tmp_path / "blank.txt").write_text(content)
    with pytest.raises(UserError, match=r"no text in .*blank\.txt"):
        read_text(str(tmp_path / "blank.txt"))


# The hub


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub with one parquet file of two books."""
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"text": "Älter.\n\nB.", "year": 1}, {"text": "C.\u2028", "year": 2}]
    file = io.BytesIO()
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)
    with hub_server.serve() as hub:
        hub.put("owner/books", COMMIT, "books.parquet", file.getvalue())
        hub_server.use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_the_hubs_rows_are_joined_by_blank_lines(books):
    text = read_text("hub", HUB)
    assert text.content == "Älter.\n\nB.\n\nC.\u2028"
    for part in ("column text", "books.parquet", "owner/books", COMMIT):
        assert part in text.place


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("year", r"books\.parquet, line 1: field year must be a string"),
        ("body", "missing field body.*found: text, year"),
    ],
)
def test_a_column_without_text_is_refused(books, column, message):
    with pytest.raises(UserError, match=message):
        read_text("hub", HUB | {"column": column})


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (None, "missing: repo, filename, revision, column; unknown: none"),
        ({**HUB, "revision": None}, "missing: revision; unknown: none"),
        ({**HUB, "split": "test"}, "missing: none; unknown: split"),
    ],
)
def test_what_the_hub_needs_is_said(hub, message):
    with pytest.raises(UserError, match=message):
        read_text("hub", hub)


# Paragraphs


@given(st.text("a\n", max_size=30), st.data())
def test_a_paragraph_begins_behind_a_blank_line(content, data):
    position = data.draw(st.integers(0, len(content)))
    starts = [
        place
        for place in range(position, len(content) + 1)
        if place == 0 or (place > 1 and content[place - 2 : place] == "\n\n")
    ]
    assert Text(content, "here").paragraph_at(position) == (starts[0] if starts else position)


def test_a_dataset_that_would_be_passed_over_is_refused():
    hub = {"repo": "a/b", "filename": "c.parquet", "revision": "main", "column": "text"}
    with pytest.raises(UserError, match=r"benchmark\.source=stdlib another text"):
        read_text("stdlib", hub)
