"""The GPU benchmark, rehearsed without a card: what it writes, and when it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.bench import gpu, gpu_checks
from scripts.bench.gpu_checks import Check
from scripts.bench.measure import weight_bytes

REHEARSAL = ["--small", "--device", "cpu", "--repeats", "1"]
SHAPE = (4, 2, 19, 16)


@pytest.fixture
def rehearse(tmp_path):
    """Run it on the CPU with a prompt of 40 tokens; gives the exit status, the figures and the text."""

    def run():
        status = gpu.main([*REHEARSAL, "--lengths", "40", "--out", str(tmp_path / "out")])
        figures = json.loads((tmp_path / "out" / "gpu_small.json").read_text())
        return status, figures, (tmp_path / "out" / "gpu_small.md").read_text()

    return run


def test_a_rehearsal_checks_and_measures_everything(rehearse):
    status, figures, text = rehearse()
    assert status == 0
    assert not figures["on_a_card"]
    assert "A rehearsal without a card" in text
    assert {check["what"].split(",")[0] for check in figures["checks"]} == {
        "attention",
        "log-sum-exp",
        "column sums",
        "full cache against generate (tokens that differ)",
    }
    assert all(check["passed"] for check in figures["checks"])
    assert text.count("| ok |") == 4
    [of_length] = figures["lengths"]
    ways = of_length["ways"]
    assert of_length["tokens"] == 40
    assert all(way["prefill"] > 0 for way in ways.values())
    assert ways["full@1"]["step"] > 0
    assert ways["kvmerger@0.35"]["step"] > 0
    # layers, KV heads, entries, head size, keys and values, bytes
    assert ways["full@1"]["kv_bytes"] == 2 * 2 * 40 * 16 * 2 * 4
    assert ways["kvmerger@0.35"]["kv_bytes"] == 2 * 2 * 14 * 16 * 2 * 4
    for title in ("Correctness", "Prefill", "Decoding", "Memory"):
        assert f"## {title}" in text


def test_a_step_reads_all_weights_but_the_embedding():
    model = gpu.random_model(gpu.SMALL, "cpu")
    attention, mlp, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96, 2 * 64
    read = 2 * (attention + mlp + norms) + 64 + 128 * 64  # layers, final norm, output
    assert weight_bytes(model) == 4 * read


def test_a_wrong_kernel_stops_it(rehearse, monkeypatch):
    wrong = Check("column sums, Triton (relative)", "float16", 0.01, 1e-4)
    monkeypatch.setattr(gpu, "check_kernels", lambda *_: [wrong])
    status, figures, text = rehearse()
    assert status == 1
    assert figures["lengths"] == []
    assert "| column sums, Triton (relative) | 1 | float16 | 1.0e-02 | 1.0e-04 | WRONG |" in text


def test_a_length_that_does_not_fit_is_skipped_and_named(rehearse, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(gpu, "_engine", full)
    status, figures, text = rehearse()
    assert status == 0
    assert "skipped" in figures["lengths"][0]
    assert "- 40 tokens skipped: out of memory: CUDA out of memory. Tried to allocate 20 GiB\n" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "needs a CUDA card" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --small"),
        ([*REHEARSAL, "--repeats", "0"], "1 or more"),
        ([*REHEARSAL, "--lengths", "0"], "1 or more"),
    ],
)
def test_options_that_cannot_be_used(capsys, arguments, message):
    assert gpu.main(arguments) == 2
    assert message in capsys.readouterr().err


# --- the checks themselves


def failed():
    return {
        check.what.split(",")[0]
        for check in gpu_checks.check_kernels([SHAPE], "cpu")
        if not check.passed
    }


def test_right_kernels_pass():
    assert failed() == set()


def test_wrong_column_sums_are_found(monkeypatch):
    right = gpu_checks.column_sums
    monkeypatch.setattr(gpu_checks, "column_sums", lambda *given: right(*given) * 1.0002)
    assert failed() == {"column sums"}


@pytest.mark.parametrize(("part", "name"), [(0, "attention"), (1, "log-sum-exp")])
def test_wrong_attention_is_found(monkeypatch, part, name):
    right = gpu_checks.prefill_attention

    def wrong(*given):
        result = list(right(*given))
        result[part] = result[part] + 0.03
        return result

    monkeypatch.setattr(gpu_checks, "prefill_attention", wrong)
    assert failed() == {name}


def test_sums_that_are_not_numbers_are_found(monkeypatch):
    monkeypatch.setattr(gpu_checks, "column_sums", lambda queries, keys: keys[..., 0] * torch.nan)
    assert failed() == {"column sums"}


def test_other_tokens_than_generate_are_found(monkeypatch):
    model = gpu.random_model(gpu.SMALL, "cpu")
    ids = torch.arange(3, 30)[None]
    assert gpu_checks.check_engine(model, ids, tokens=6).passed
    right = gpu_checks.run_sample

    def wrong(*given):
        rows, timing = right(*given)
        rows[0].token_ids[-1] += 1
        return rows, timing

    monkeypatch.setattr(gpu_checks, "run_sample", wrong)
    check = gpu_checks.check_engine(model, ids, tokens=6)
    assert (check.error, check.passed) == (1, False)
