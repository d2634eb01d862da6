"""The questions of `make bench`: what each compares, and what its figures mean, by a clock that is set.

Time passes only where a test lets it: from that follows what the tables must say.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvmerge.cache import LayerCache
from kvmerge.engine import Decoder
from kvmerge.errors import UserError
from kvmerge.kernels import choice, tiled
from kvmerge.kvmerger import KVMerger
from kvmerge.proof import LayerProof
from scripts.bench import __main__ as bench
from scripts.bench import cpu_path as paths
from scripts.bench import kvpress_prefills, measure, peer, prefill, scaling
from scripts.bench import memory as resident
from scripts.bench.comparison import comparison
from scripts.bench.compression import compression
from scripts.bench.decode import decode
from scripts.bench.measure import Bench, LiveBytes, Report, ratio, weight_bytes
from scripts.bench.profile import stages
from scripts.bench.proof import proof

SEVEN = [
    "full@1",
    *(f"{name}@{budget}" for budget in (0.5, 0.35) for name in ("kvmerger", "h2o", "cam")),
]
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
ENTRY = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
"""Bytes of one token's keys and values in the tiny model."""


@pytest.fixture(scope="module")
def tiny() -> Bench:
    return Bench(["model=tiny-random"], repeats=1)


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr("gc.collect", lambda: 0)  # no reading to keep it out of, and it takes long

    def spend(self, owner: object, name: str, seconds: Callable[..., float]) -> None:
        """Let a function take as long as its arguments say."""
        function = getattr(owner, name)

        def slow(*given: Any, **named: Any) -> Any:
            self.now += seconds(*given, **named)
            return function(*given, **named)

        self._monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def column(report: Report, name: str) -> dict[str, Any]:
    """One column of a table, by the first."""
    first = next(iter(report.rows[0]))
    return {str(row[first]): row[name] for row in report.rows}


# --- measuring


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio([2, 30, 4], [1, 10, 4]) == 2


def test_actions_run_in_turn_and_the_first_round_does_not_count(clock: Clock) -> None:
    ran: list[str] = []

    def action(name: str) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            clock.now += len(ran)

        return run

    seconds = measure.in_turn({"a": action("a"), "b": action("b")}, repeats=2)
    assert "".join(ran) == "ababab"
    assert seconds == {"a": [3, 5], "b": [4, 6]}


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


def test_prompts_are_different_pieces_of_prose_of_the_asked_length(tiny: Bench) -> None:
    first, second = tiny.prompt(90), tiny.prompt(90, 1)
    assert first.shape == second.shape == (1, 90)
    assert torch.equal(torch.cat([first, second], dim=1), tiny.prompt(180))


def test_answers_have_the_asked_length_however_many_run_at_once(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tiny.prompt(20, number) for number in range(3)]
    answers, batches, generated = [], [], []
    run_samples, generate = measure.run_samples, tiny.plain.generate

    def recorded(model: Any, requests: Any, stop: Any) -> Any:
        batches.append(len(requests))
        results = run_samples(model, requests, stop)
        answers.extend(len(row.token_ids) for rows, _ in results for row in rows)
        return results

    monkeypatch.setattr(measure, "run_samples", recorded)
    tiny.run(prompts, tiny.rows(["full@1", "h2o@0.5"]), 3, batch=2)
    assert batches == [2, 1]
    assert answers == [3] * 6
    monkeypatch.setattr(
        tiny.plain,
        "generate",
        lambda *given, **named: generated.append(generate(*given, **named).shape),
    )
    tiny.generate(tiny.plain, prompts, 3)
    assert generated == [(1, 23)] * 3


# --- the questions


def test_a_comparison_is_seven_cells_against_generate_on_the_same_prompts(
    tiny: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def generate(model: Any, prompts: Any, tokens: int) -> None:
        asked.append((len(prompts), tokens))
        clock.now += 8 if model is tiny.plain else 6

    def run(prompts: Any, rows: Any, tokens: int, batch: int = 1) -> None:
        asked.append((len(prompts), tokens))
        clock.now += 3 + len(rows) / batch

    monkeypatch.setattr(tiny, "generate", generate)
    monkeypatch.setattr(tiny, "run", run)
    report = comparison(tiny, samples=2, length=30, tokens=5)
    assert set(asked) == {(2, 5)}
    assert column(report, "ratio to generate") == {
        "generate": 1,
        "generate, packed weights": 0.75,
        "full cache alone": 0.5,
        "7 cells": 1.25,
        "7 cells, 2 samples at once": 0.812,
    }
    assert column(report, "median s")["7 cells"] == 10
    assert sorted(report.raw["cells"]) == sorted(SEVEN)


def test_a_prefill_without_scores_computes_none(tiny: Bench, clock: Clock) -> None:
    clock.spend(tiny.plain, "forward", lambda *_, **__: 8)
    clock.spend(tiny.model, "forward", lambda *_, **__: 4)
    clock.spend(tiled, "attend", lambda *_, scored, **__: float(scored))
    clock.spend(KVMerger, "compress", lambda *_: 0.5)
    report = prefill.prefill(tiny, 40)
    assert column(report, "median s") == {
        "plain SDPA": 8,
        "plain SDPA, packed weights": 4,
        "engine, no scores (full cache)": 4,
        "engine, scores and H2O at 35%": 4 + LAYERS,
        "engine, scores and KVMerger at 35%": 4 + 1.5 * LAYERS,
    }
    assert column(report, "ratio to plain SDPA")["engine, no scores (full cache)"] == 0.5


def test_the_error_of_scores_is_that_against_the_whole_map(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prefill.score_error(tiny, 300) < 1e-5
    attend = tiled.attend

    def wrong(*given: Any, **named: Any) -> Any:
        out, sums = attend(*given, **named)
        sums[0, 1, 7] *= 1.01
        return out, sums

    monkeypatch.setattr(tiled, "attend", wrong)
    assert prefill.score_error(tiny, 300) == pytest.approx(0.01, rel=1e-2)


def test_decoding_is_held_against_the_bytes_that_a_step_reads(tiny: Bench, clock: Clock) -> None:
    weights = weight_bytes(tiny.plain)

    def step(decoder: Decoder, *_: object) -> float:
        (comparison,) = decoder.comparisons
        return (weights + sum(row.kv_bytes for row in comparison.stats)) / 1e6

    clock.spend(Decoder, "feed", step)
    report = decode(tiny, 40, steps=2)
    cells = ["full@1", "kvmerger@0.35", "h2o@0.35", "cam@0.35"]
    assert list(column(report, "KV MiB")) == [*cells, "seven rows"]
    # A step that takes as long as its bytes need reaches the bound, whatever the cache.
    assert set(column(report, "share of the bound").values()) == {1}
    bounds = column(report, "bound by bytes")
    assert bounds["full@1"] == 1
    kept = 14  # 35% of 40 tokens
    assert bounds["h2o@0.35"] == round((weights + 40 * ENTRY) / (weights + kept * ENTRY), 3)
    assert column(report, "speed-up over full") == bounds
    assert column(report, "ms a step")["full@1"] == round((weights + 40 * ENTRY) / 1e3, 1)


def test_compression_is_the_time_inside_the_method_as_a_share_of_the_prefill(
    tiny: Bench, clock: Clock
) -> None:
    clock.spend(tiny.model, "forward", lambda *_, **__: 8)
    clock.spend(KVMerger, "compress", lambda *_: 1)
    report = compression(tiny, length=40)
    shares = column(report, "share of the prefill %")
    merging = {cell for cell in shares if cell.startswith("kvmerger")}
    assert len(merging) == 4
    assert {cell: share for cell, share in shares.items() if share} == dict.fromkeys(merging, 20)
    assert column(report, "compress s")["kvmerger@0.35"] == LAYERS
    assert column(report, "prefill s")["kvmerger@0.35"] == 8 + LAYERS


def test_a_profile_puts_every_second_into_one_stage(tiny: Bench, clock: Clock) -> None:
    tokens = 4
    clock.spend(tiny.model, "forward", lambda *_, **__: 1)
    clock.spend(tiled, "attend", lambda *_, **__: 10)
    clock.spend(KVMerger, "compress", lambda *_: 2)
    clock.spend(LayerCache, "attend", lambda *_: 3)
    report = stages(tiny, length=40, tokens=tokens)
    assert column(report, "s") == {
        "prefill: attention with scores": 10 * LAYERS,
        "prefill: compressing": 2 * 2 * LAYERS,  # KVMerger at two budgets
        "prefill: the rest of the model": 1,
        "decode: attention over the caches": 3 * LAYERS * (tokens - 1),
        "decode: the rest of the model": tokens - 1,  # the first comes from the prefill
    }
    assert sum(column(report, "share %").values()) == pytest.approx(100, abs=0.3)


# --- memory


def test_memory_is_the_peak_above_the_loaded_model(
    tiny: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the process that answers for one way prints it."""
    resident_bytes = iter([700 * 2**20, 900 * 2**20])

    def memory_info() -> SimpleNamespace:
        return SimpleNamespace(rss=next(resident_bytes, 750 * 2**20))

    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=memory_info))
    monkeypatch.setattr(measure, "Bench", lambda overrides, repeats: tiny)
    monkeypatch.setattr(sys, "argv", ["memory", "seven cells", "60", "model=tiny-random"])
    monkeypatch.delitem(sys.modules, "scripts.bench.memory")
    runpy.run_module("scripts.bench.memory", run_name="__main__")
    assert json.loads(capsys.readouterr().out) == {"peak above the model MiB": 200}


def test_every_way_has_its_memory_measured_in_a_process_of_its_own(
    tiny: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(stdout=f'a warning\n{{"peak above the model MiB": {len(started)}}}\n')

    monkeypatch.setattr("subprocess.run", run)
    peaks = column(resident.memory(tiny, length=200), "peak above the model MiB")
    assert list(peaks.values()) == [1, 2, 3, 4, 5]
    for way, command in zip(peaks, started, strict=True):
        assert command == [
            sys.executable,
            "-m",
            "scripts.bench.memory",
            way,
            "200",
            "model=tiny-random",
        ]


# --- ways through the attention, and scaling


@pytest.mark.parametrize(("taken", "share"), [("torch", 1.5), ("onednn", 1)])
def test_the_way_taken_is_held_against_the_best(
    tiny: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch, taken: str, share: float
) -> None:
    seconds = {"torch": 0.003, "onednn": 0.002}
    monkeypatch.setenv(choice.VARIABLE, taken)
    monkeypatch.setattr(paths, "LENGTHS", (512,))
    monkeypatch.setattr(paths.packed_linear, "available", lambda _: True)
    monkeypatch.setattr(
        tiled, "attend", lambda *_, products, **__: setattr(clock, "now", clock.now + seconds[products])
    )
    clock.spend(paths, "column_sums", lambda *_, **__: 0.004)
    (row,) = paths.cpu_path(tiny).rows
    assert row == {
        "tokens": 512,
        "blocks, torch ms": 3,
        "blocks, oneDNN ms": 2,
        "torch's kernel, then sums ms": 4,
        "torch's kernel, no sums ms": 0,
        "taken": {"torch": "blocks, torch", "onednn": "blocks, oneDNN"}[taken],
        "its time : the best's": share,
    }


@pytest.mark.usefixtures("clock")
def test_without_onednn_torch_is_the_way_taken(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "LENGTHS", (8,))
    monkeypatch.setattr(paths.packed_linear, "available", lambda _: False)
    monkeypatch.setattr(paths, "ratio", lambda *_: 1)  # no time passes
    (row,) = paths.cpu_path(tiny).rows
    assert row["taken"] == "blocks, torch"
    assert "blocks, oneDNN ms" not in row


def test_scaling_uses_the_heads_of_the_model_and_counts_linear_memory(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "LENGTHS", (128, 256))
    monkeypatch.setattr(scaling, "SCORES_ONLY", 512)
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, head_dim=32)
    clock.spend(scaling, "prefill_attention", lambda *_: 2)
    clock.spend(scaling, "attention_and_scores", lambda *_, **__: 3)
    report = scaling.by_length(SimpleNamespace(model=SimpleNamespace(config=config), repeats=2))
    assert "4 query and 2 KV heads of 32" in report.setting
    assert column(report, "with sums : torch's") == {"128": 1.5, "256": 1.5, "512": 1.5}
    assert column(report, "the map MiB") == {"128": 0.2, "256": 1.0, "512": 4.0}
    assert [len(report.raw[length]["column sums alone"]) for length in ("128", "256", "512")] == [
        2,
        2,
        1,
    ]
    memory = column(report, "its memory MiB")
    assert memory["512"] < 4 * memory["128"] + 0.5


def test_cells_are_added_to_one_sample_until_there_are_fourteen(
    tiny: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(prompts: Any, rows: Any, tokens: int) -> None:
        clock.now += 9 + len(rows)

    monkeypatch.setattr(tiny, "run", run)
    report = scaling.by_cells(tiny, length=20, tokens=2)
    assert column(report, "median s") == {"1": 10, "2": 11, "4": 13, "7": 16, "10": 19, "14": 23}
    assert column(report, "ratio to one cell")["14"] == 2.3
    assert len(set(report.raw["cells"])) == 14


def test_the_picture_of_scaling_is_drawn_in_two_formats() -> None:
    timed = {
        f"{name} s": 0.1 for name in ("torch's attention", "column sums alone", "attention with sums")
    }
    by_length = Report("scaling_length", "", "", [{"tokens": 8} | timed, {"tokens": 16} | timed])
    by_cells = Report("scaling_cells", "", "", [{"cells": 1, "ratio to one cell": 1.0}])
    files = scaling.picture([by_length, by_cells])
    assert files["scaling.png"].startswith(b"\x89PNG")
    assert files["scaling.pdf"].startswith(b"%PDF")


# --- the command


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Answer `comparison` with given rows."""

    def answer(*rows: dict[str, Any], **more: Any) -> None:
        report = Report("comparison", "Title", "Setting.", list(rows), "a goal", **more)
        monkeypatch.setitem(bench.QUESTIONS, "comparison", lambda _: [report])

    return answer


def command(tmp_path: Path, *given: str) -> int:
    return bench.main([*given, "--set", "model=tiny-random", "--out", str(tmp_path)])


def test_an_answer_is_written_as_a_table_and_as_json(
    canned: Callable[..., None], tmp_path: Path
) -> None:
    canned(
        {"run": "a|b", "s": 1.5, "GiB": ""}, {"run": "c", "s": 2, "GiB": 0.5}, raw={"seconds": [1.5]}
    )
    assert command(tmp_path, "comparison", "--repeats", "1") == 0
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["rows"][1] == {"run": "c", "s": 2, "GiB": 0.5}
    assert written["raw"] == {"seconds": [1.5]}
    assert (written["model"], written["dtype"], written["repeats"]) == ("tiny-random", "float32", 1)
    assert written["hardware"]["threads"] == torch.get_num_threads()
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith(
        "### Title\n\n| run | s | GiB |\n| --- | ---: | ---: |\n| a\\|b | 1.5 |  |\n| c | 2 | 0.5 |\n"
        "\nSetting. "
    )
    assert re.search(
        r"tiny-random, float32, .* threads, torch .*, median of 1 rounds\. Target: a goal\.", text
    )


def test_a_wrong_result_gives_status_1_and_is_written(
    canned: Callable[..., None], tmp_path: Path
) -> None:
    canned({"check": "sums", "error": 1}, wrong=True, model="another model", dtype="bfloat16")
    assert command(tmp_path, "comparison") == 1
    assert "another model, bfloat16" in (tmp_path / "comparison.md").read_text()


def test_an_answer_without_a_line_says_that_nothing_was_measured(
    canned: Callable[..., None], tmp_path: Path
) -> None:
    canned()
    assert command(tmp_path, "comparison") == 0
    assert "| nothing was measured |" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["compare"], "Did you mean 'comparison'?"),
        (["comparison", "--repeats", "0"], "--repeats 0 must be 1 or more"),
        (["peer"], "needs --peer PYTHON"),
    ],
)
def test_a_mistake_prints_one_message_and_gives_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert command(tmp_path, *given) == 2
    assert message in capsys.readouterr().err


def test_the_proof_is_timed_beside_the_same_work_without_it(tiny: Bench) -> None:
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        honest = LayerProof.read
        patch.setattr(LayerProof, "read", lambda self, *of: read.append(1) or honest(self, *of))
        report = proof(tiny, length=60, steps=2)
    # a round that does not count and one that does; three lengths of cache in each of two layers
    assert len(read) == 2 * 2 * LAYERS * 3
    assert [row["part"] for row in report.rows] == ["prefill", "2 steps"]


def test_everything_leaves_out_what_needs_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(bench, "run", lambda names, *_: asked.extend(names) or True)
    assert command(tmp_path) == 0
    assert asked == list(bench.QUESTIONS)
    assert not {"gpu", "gpu_rehearsal"} & set(asked)


# --- beside kvpress

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
def kvpress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stand in for kvpress, which needs another transformers: its presses keep the first entries."""

    def install(kept: int) -> None:
        package = tmp_path / "kvpress"
        package.mkdir()
        (package / "__init__.py").write_text(KVPRESS.replace("KEPT", str(kept)))
        metadata = tmp_path / "kvpress-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 1.2\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "kvpress", raising=False)

    return install


def test_a_peer_runs_in_another_environment(tiny: Bench, kvpress: Callable[[int], None]) -> None:
    kvpress(20)
    report = peer.peer(tiny, sys.executable, 64)
    assert report.title.endswith("kvpress 1.2")
    assert [row["run"] for row in report.rows if row["in"] == "kvpress"] == [
        "plain SDPA",
        "ObservedAttentionPress, 35%",
        "SnapKVPress, 35%",
    ]
    assert {len(readings) for readings in report.raw["kvpress"]["seconds"].values()} == {1}


def test_each_side_is_held_against_its_own_plain_prefill(
    tiny: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"kvpress": "1", "transformers": "2", "torch": "3"}
    theirs = {"plain SDPA": [4.0], "SnapKVPress, 35%": [5.0]}
    monkeypatch.setattr(peer, "_pressed", lambda *_: {"seconds": theirs, "versions": versions})
    clock.spend(tiny.plain, "forward", lambda *_, **__: 2)
    monkeypatch.setattr(
        tiny, "run", lambda _, rows, __: setattr(clock, "now", clock.now + 2 + len(rows))
    )
    report = peer.peer(tiny, "python", 64)
    ratios = [(row["in"], row["run"], row["ratio to plain SDPA"]) for row in report.rows]
    assert ratios == [
        ("kvpress", "plain SDPA", 1),
        ("kvpress", "SnapKVPress, 35%", 1.25),
        ("here", "plain SDPA", 1),
        ("here", "H2O, 35%", 1.5),
        ("here", "KVMerger, 35%", 1.5),
        ("here", "seven cells", 4.5),
    ]


@pytest.mark.filterwarnings("ignore:.past_key_values")
def test_a_peer_that_compresses_nothing_is_an_error(
    tiny: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kvpress: Callable[[int], None]
) -> None:
    kvpress(64)
    tiny.plain.save_pretrained(tmp_path / "model")
    question = {"model": str(tmp_path / "model"), "ids": tiny.prompt(64).tolist(), "repeats": 1}
    question |= {"threads": torch.get_num_threads(), "plain": "plain SDPA"}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(question)))
    with pytest.raises(SystemExit, match="ObservedAttentionPress, 35% left the cache whole"):
        kvpress_prefills.main()


def test_a_peer_that_fails_says_why_and_what_to_do(tiny: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No module named 'kvpress'.*make bench PEER=1"):
        peer.peer(tiny, sys.executable, 64)
    with pytest.raises(UserError, match="cannot be started"):
        peer.peer(tiny, str(tmp_path / "python"), 64)
