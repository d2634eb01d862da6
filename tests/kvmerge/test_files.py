"""Where copies and measurements are kept, and files that are replaced whole."""

from __future__ import annotations

import os

import pytest

from kvmerge.files import cache_dir, remove_leftovers, write_atomically


def test_the_cache_is_in_the_users_folder_and_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KVMERGE_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "kvmerge"
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(monkeypatch, tmp_path, step):
    path = tmp_path / "a" / "file.txt"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_what_killed_processes_had_begun_is_removed_and_nothing_else(tmp_path):
    dead, alive = 2**22 + 1, os.getpid()  # above the largest number of a process
    (tmp_path / "tables").mkdir()
    left = [tmp_path / f".run.json.{dead}", tmp_path / "tables" / f".scores.md.{dead}"]
    kept = [
        tmp_path / f".run.json.{alive}",
        tmp_path / "run.json",
        tmp_path / ".writer",
        tmp_path / ".notes.v2",
    ]
    for path in (*left, *kept):
        path.touch()
    assert sorted(remove_leftovers(tmp_path)) == sorted(left)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)
