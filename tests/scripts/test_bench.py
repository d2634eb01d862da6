from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from kvmerge.errors import UserError
from scripts.bench import __main__ as bench
from scripts.bench.comparison import comparison
from scripts.bench.compression import compression
from scripts.bench.decode import decode
from scripts.bench.measure import Bench, LiveBytes, ratio
from scripts.bench.memory import memory
from scripts.bench.peer import peer
from scripts.bench.prefill import prefill
from scripts.bench.profile import stages


@pytest.fixture(scope="module")
def tiny() -> Bench:
    return Bench(["model=tiny-random"], repeats=2)


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([2, 30, 4], [1, 10, 4]) == 2


def test_live_bytes_are_those_alive_together() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        second = first + 1
        del second
        third = first * 2
        view = third.view(10, 100)
        del first
    assert live.peak == 8000
    assert live.live == view.untyped_storage().nbytes() == 4000


@pytest.mark.parametrize(
    ("question", "lines"),
    [
        (lambda b: comparison(b, samples=2, length=64, tokens=3), 5),
        (lambda b: prefill(b, 64), 5),
        (lambda b: decode(b, 64, steps=2), 5),
        (lambda b: compression(b, length=64), 6),
        (lambda b: stages(b, length=64, tokens=3), 3),
    ],
    ids=["comparison", "prefill", "decode", "compression", "profile"],
)
def test_every_question_is_answered(tiny: Bench, question, lines: int) -> None:
    report = question(tiny)
    assert len(report.rows) >= lines
    assert len({tuple(row) for row in report.rows}) == 1
    numbers = [value for row in report.rows for value in row.values() if not isinstance(value, str)]
    assert all(value >= 0 for value in numbers)
    assert report.raw


def test_the_base_of_a_ratio_is_one(tiny: Bench) -> None:
    rows = comparison(tiny, samples=1, length=48, tokens=2).rows
    assert rows[0]["run"] == "generate"
    assert rows[0]["ratio to generate"] == 1


def test_memory_is_measured_in_a_process_of_its_own(tiny: Bench, monkeypatch) -> None:
    monkeypatch.setattr("scripts.bench.memory._WAYS", ("seven cells",))
    (row,) = memory(tiny, length=200).rows
    assert row["run"] == "seven cells"
    assert row["peak above the model MiB"] > 0


def test_tables_are_written_and_unknown_questions_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        bench.QUESTIONS, "comparison", lambda b: [comparison(b, samples=1, length=32, tokens=2)]
    )
    given = ["comparison", "--repeats", "1", "--set", "model=tiny-random", "--out", str(tmp_path)]
    assert bench.main(given) == 0
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["model"] == "tiny-random"
    assert written["hardware"]["threads"] == torch.get_num_threads()
    table = (tmp_path / "comparison.md").read_text()
    assert table.count("\n|") == 2 + len(written["rows"])
    assert re.search(r"tiny-random, float32, .* threads, torch .*, median of 1 rounds", table)
    assert bench.main(["compare"]) == 2
    assert "Did you mean 'comparison'?" in capsys.readouterr().err


KVPRESS = """
import contextlib

class ObservedAttentionPress:
    def __init__(self, compression_ratio):
        assert compression_ratio == 0.65

    @contextlib.contextmanager
    def __call__(self, model):
        attended = model.config._attn_implementation
        assert attended == ("eager" if type(self) is ObservedAttentionPress else "sdpa")
        hook = model.register_forward_hook(self.cut, with_kwargs=True)
        yield
        hook.remove()

    def cut(self, model, args, kwargs, output):
        for layer in kwargs["past_key_values"].layers:
            layer.keys, layer.values = layer.keys[:, :, :KEPT], layer.values[:, :, :KEPT]

class SnapKVPress(ObservedAttentionPress):
    pass
"""


@pytest.fixture
def kvpress(tmp_path, monkeypatch):
    """Stand in for kvpress, which needs another transformers: its presses keep the first entries."""

    def install(kept: int) -> None:
        package = tmp_path / "kvpress"
        package.mkdir()
        (package / "__init__.py").write_text(KVPRESS.replace("KEPT", str(kept)))
        metadata = tmp_path / "kvpress-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 1.2\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


def test_a_peer_runs_in_another_environment(tiny: Bench, kvpress) -> None:
    kvpress(kept=20)
    report = peer(tiny, sys.executable, 64)
    assert [row["in"] for row in report.rows] == ["kvpress"] * 3 + ["here"] * 4
    assert [row["ratio to plain SDPA"] for row in report.rows if row["run"] == "plain SDPA"] == [1, 1]
    assert report.title.endswith("kvpress 1.2")
    assert {len(readings) for readings in report.raw["kvpress"]["seconds"].values()} == {2}


def test_a_peer_that_compresses_nothing_is_an_error(tiny: Bench, kvpress) -> None:
    kvpress(kept=64)
    with pytest.raises(UserError, match="ObservedAttentionPress, 35% left the cache whole"):
        peer(tiny, sys.executable, 64)


def test_a_peer_that_is_not_there(tiny: Bench, tmp_path, capsys) -> None:
    with pytest.raises(UserError, match=r"No module named 'kvpress'.*make bench PEER=1"):
        peer(tiny, sys.executable, 64)
    with pytest.raises(UserError, match="cannot be started"):
        peer(tiny, str(tmp_path / "python"), 64)
    assert bench.main(["peer", "--out", str(tmp_path)]) == 2
    assert "needs --peer PYTHON" in capsys.readouterr().err
