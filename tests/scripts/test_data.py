"""`scripts/data.py` on its real command line, against a hub on localhost."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.longbench import benchmark
from benchmarks.longbench.benchmark import ARCHIVE
from benchmarks.longbench.tasks import TASKS
from benchmarks.source import HubFile, cached
from kvmerge.places import choices
from scripts import data
from tests import hub_server

ROOT = Path(__file__).resolve().parents[2]


def row(task: str, number: int) -> dict[str, object]:
    answers = ["Paragraph 1", "段落1"] if "retrieval" in task else ["1"]
    classes = ["1"] if task in ("trec", "lsht") else None
    return {
        "input": "",
        "context": f"text {number}",
        "answers": answers[:1] if task.endswith("en") else answers[-1:],
        "length": 2,
        "dataset": task,
        "language": "en",
        "all_classes": classes,
        "_id": str(number),
    }


def lines(task: str, count: int) -> bytes:
    return "".join(f"{json.dumps(row(task, number))}\n" for number in range(count)).encode()


def zipped(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return content.getvalue()


OFFICIAL = {f"data/{task.name}.jsonl": lines(task.name, 2) for task in TASKS}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A hub, an empty cache, and two benchmarks: mini, and LongBench with two rows a task."""
    monkeypatch.setattr(data, "choices", lambda group: ["longbench", "mini"])
    monkeypatch.setattr(benchmark, "ROWS", {task.name: 2 for task in TASKS})
    with hub_server.serve() as hub:
        hub_server.use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def publish(hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch, content: bytes) -> HubFile:
    """Make `content` the official archive."""
    file = HubFile(
        ARCHIVE.repo, ARCHIVE.filename, ARCHIVE.revision, hashlib.sha256(content).hexdigest()
    )
    hub.put(file.repo, file.revision, file.filename, content)
    monkeypatch.setattr(benchmark, "ARCHIVE", file)
    monkeypatch.setattr(benchmark, "FILES", (file,))
    return file


@pytest.mark.parametrize("name", choices("benchmark"))
def test_every_benchmark_is_found(name):
    found = data.find(name)
    assert found.name == name
    assert all(isinstance(file, HubFile) for file in found.files)


def test_list_says_what_each_benchmark_reads(hub, monkeypatch, capsys):
    file = publish(hub, monkeypatch, zipped(OFFICIAL))
    assert data.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "mini: reads nothing from the hub by default" in out
    assert f"  THUDM/LongBench, revision {file.revision}\n  licence: not stated\n" in out
    assert f"    data.zip: size unknown, not cached, SHA-256 {file.sha256}\n" in out
    assert hub.requests == []
    data.main(["fetch", "longbench"])
    capsys.readouterr()
    data.main(["list"])
    assert "data.zip: size unknown, cached, SHA-256" in capsys.readouterr().out


def test_fetch_names_the_place(hub, monkeypatch, capsys):
    file = publish(hub, monkeypatch, zipped(OFFICIAL))
    assert data.main(["fetch", "mini", "longbench"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "mini reads nothing from the hub by default: it is built on this machine.",
        str(cached(file)),
    ]


def test_an_unknown_benchmark_is_a_user_error_before_anything_is_fetched(hub, capsys):
    for command in ("fetch", "verify"):
        assert data.main([command, "longbench", "longbnch"]) == 2
        assert "unknown benchmark 'longbnch'. Did you mean 'longbench'?" in capsys.readouterr().err
    assert hub.requests == []


def test_verify_counts_the_rows_of_every_task(hub, monkeypatch, capsys):
    publish(hub, monkeypatch, zipped(OFFICIAL))
    data.main(["fetch", "longbench"])
    capsys.readouterr()
    hub.requests.clear()
    assert data.main(["verify"]) == 0
    captured = capsys.readouterr()
    assert [f"  {task.name}: 2 rows" in captured.out.splitlines() for task in TASKS] == [True] * 21
    assert captured.err == ""
    assert hub.requests == []


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        ("trec", lines("trec", 1), "longbench, task trec: 1 rows, officially 2."),
        ("lcc", lines("lcc", 1) + b"{}\n", "data/lcc.jsonl, line 2: missing field"),
        ("lcc", lines("lcc", 1) * 2, "data/lcc.jsonl, line 2: _id '0' is already"),
    ],
)
def test_verify_names_wrong_rows_and_goes_on(hub, monkeypatch, capsys, task, content, words):
    members = OFFICIAL | {f"data/{task}.jsonl": content, "data/vcsum.jsonl": b""}
    publish(hub, monkeypatch, zipped(members))
    data.main(["fetch", "longbench"])
    capsys.readouterr()
    assert data.main(["verify", "longbench"]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "data/vcsum.jsonl holds no rows" in captured.err
    assert "repobench-p: 2 rows" in captured.out


def test_verify_finds_a_damaged_file(hub, monkeypatch, capsys):
    file = publish(hub, monkeypatch, zipped(OFFICIAL))
    data.main(["fetch", "longbench"])
    cached(file).resolve().write_bytes(b"damaged")
    capsys.readouterr()
    hub.requests.clear()
    assert data.main(["verify"]) == 1
    captured = capsys.readouterr()
    assert f"expected {file.sha256}" in captured.err
    assert "rows" not in captured.out
    assert hub.requests == []


def test_verify_downloads_nothing(hub, monkeypatch, capsys):
    publish(hub, monkeypatch, zipped(OFFICIAL))
    assert data.main(["verify"]) == 0
    assert "no benchmark has files in the hub's cache" in capsys.readouterr().out
    assert data.main(["verify", "longbench"]) == 1
    assert "is not in the cache" in capsys.readouterr().err
    assert hub.requests == []


def test_verify_checks_rows_that_are_not_from_the_hub(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "trec.jsonl").write_bytes(lines("trec", 3))
    options = {"data_dir": str(tmp_path), "tasks": ["trec"]}
    local = data.Data("local", "benchmarks.longbench.benchmark.LongBench", options, files=(), rows={})
    monkeypatch.setattr(data, "find", lambda name: local)
    assert data.main(["verify", "local"]) == 0
    assert "  trec: 3 rows" in capsys.readouterr().out.splitlines()


REVISION = "a" * 40


def test_a_run_announces_its_download_says_that_it_broke_off_and_starts_it_anew_the_next_time(
    hub, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's keep a run from adding its own
    hub.put(ARCHIVE.repo, REVISION, ARCHIVE.filename, zipped({"data/trec.jsonl": lines("trec", 3)}))
    settings = ("benchmark=longbench", "benchmark.tasks=[trec]", f"benchmark.revision={REVISION}")
    given = (*settings, "model=tiny-random", "method=full", "limit=1", f"output_dir={tmp_path / 'out'}")

    plan = command(*given, "dry_run=true")
    assert plan.status == 0, plan.err
    assert "is not in the hub's cache yet. A run fetches it first" in plan.out
    assert [request.method for request in hub.requests] == ["HEAD"]  # could it be had?
    hub.refuse = (404, "RepoNotFound")
    gone = command(*given)
    assert gone.status == 2
    assert gone.err == command(*given, "dry_run=true").err
    hub.refuse = None

    hub.reset_after = 100
    dropped = command(*given)
    assert dropped.status == 2
    assert "Fetching data.zip of the hub's dataset THUDM/LongBench" in dropped.err
    assert f"error: cannot fetch {ARCHIVE.at(REVISION)}" in dropped.err.splitlines()[-1]

    hub.reset_after = None
    again = command(*given)
    assert again.status == 0, again.err
    assert "trec" in again.out


# In processes of their own, with the hub's real environment variables

READ = f"""
import logging
from benchmarks.longbench.benchmark import LongBench
logging.basicConfig(level="INFO")
print(LongBench(tasks=["trec"], revision="{REVISION}").fingerprint())
"""


def run(
    hub: hub_server.Hub, home: Path, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=keep | own | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_what_was_fetched_once_needs_no_network(tmp_path):
    rows = lines("trec", 3)
    with hub_server.serve() as hub:
        hub.put(ARCHIVE.repo, REVISION, ARCHIVE.filename, zipped({"data/trec.jsonl": rows}))
        offline = run(hub, tmp_path, "-c", READ, HF_HUB_OFFLINE="1")
        assert "UserError: cannot fetch data.zip" in offline.stderr
        assert hub.requests == []
        fetched = run(hub, tmp_path, "-c", READ)
        assert "Fetching data.zip of the hub's dataset THUDM/LongBench" in fetched.stderr

    again = run(hub, tmp_path, "-c", READ)
    assert hashlib.sha256(rows).hexdigest() in again.stdout
    assert "Fetching" not in again.stderr


def test_the_script_runs_as_a_file(tmp_path):
    with hub_server.serve() as hub:
        listed = run(hub, tmp_path, "scripts/data.py", "list")
        assert listed.returncode == 0, listed.stderr
        assert listed.stdout.startswith(f"hub: {hub.url}\ncache: {tmp_path}")
