"""The GPU benchmark, rehearsed without a card: what it answers, and when it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvmerge.errors import UserError
from scripts.bench import __main__ as bench
from scripts.bench import gpu, gpu_checks
from scripts.bench.gpu_checks import Check
from scripts.bench.measure import weight_bytes

SHAPE = (4, 2, 19, 16)


@pytest.fixture
def rehearse(monkeypatch):
    """Answer on the CPU with a prompt of 40 tokens; gives the reports by name."""
    monkeypatch.setattr("gc.collect", lambda: 0)
    monkeypatch.setattr(gpu, "REHEARSAL", replace(gpu.REHEARSAL, lengths=(40,)))

    def run(repeats=1):
        return {report.name: report for report in gpu.gpu(gpu.REHEARSAL, repeats)}

    return run


def test_a_rehearsal_checks_and_measures_everything(rehearse):
    reports = rehearse(repeats=2)
    names = ["checks", "prefill", "decode", "memory"]
    assert list(reports) == [f"gpu_rehearsal_{name}" for name in names]
    checks, prefill, decode, memory = reports.values()
    for report in reports.values():
        assert report.setting.startswith("A rehearsal without a card")
        assert (report.model, report.dtype) == ("a tiny Llama, random weights", "float32")
        assert not report.wrong
    assert [(row["check"].split(",")[0], row["verdict"]) for row in checks.rows] == [
        ("attention", "ok"),
        ("log-sum-exp", "ok"),
        ("column sums", "ok"),
        ("full cache against generate (tokens that differ)", "ok"),
    ]
    assert all(check["passed"] for check in checks.raw["checks"])
    [length] = prefill.raw["lengths"]
    assert {way: len(readings) for way, readings in length["readings"].items()} == {
        "transformers": 2,
        "full@1": 2,
        "kvmerger@0.35": 2,
    }
    ways = length["ways"]
    assert prefill.rows[0]["full@1 ratio"] == round(
        ways["full@1"]["prefill"] / ways["transformers"]["prefill"], 3
    )
    # layers, KV heads, entries, head size, keys and values, bytes
    full, compressed = (2 * 2 * entries * 16 * 2 * 4 for entries in (40, 14))
    assert ways["full@1"]["kv_bytes"] == full
    assert ways["kvmerger@0.35"]["kv_bytes"] == compressed
    weights = prefill.raw["weights_bytes"]
    assert decode.rows[0]["bound by bytes"] == round((weights + full) / (weights + compressed), 3)
    assert memory.rows[0]["full@1 peak"] == ""  # only a card counts it


def test_a_step_reads_all_weights_but_the_embedding():
    model = gpu.random_model(gpu.REHEARSAL, "cpu")
    attention, mlp, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96, 2 * 64
    read = 2 * (attention + mlp + norms) + 64 + 128 * 64  # layers, final norm, output
    assert weight_bytes(model) == 4 * read


def test_nothing_is_timed_after_a_wrong_kernel(rehearse, monkeypatch):
    wrong = Check("column sums, Triton (relative)", "float16", 0.01, 1e-4)
    monkeypatch.setattr(gpu, "check_kernels", lambda *_: [wrong])
    monkeypatch.setattr(gpu, "measure", lambda *_: pytest.fail("nothing is to be timed"))
    [report] = rehearse().values()
    assert report.wrong
    assert report.rows[0] == {
        "check": "column sums, Triton (relative)",
        "inputs": 1,
        "worst": "float16",
        "error": "1.0e-02",
        "allowed": "1.0e-04",
        "verdict": "WRONG",
    }


def test_a_length_that_does_not_fit_is_skipped_and_named(rehearse, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    monkeypatch.setattr(gpu, "_engine", full)
    prefill = rehearse()["gpu_rehearsal_prefill"]
    assert prefill.rows == []
    assert "skipped" in prefill.raw["lengths"][0]
    reason = "40 tokens skipped: out of memory: CUDA out of memory. Tried to allocate 20 GiB."
    assert reason in prefill.setting


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_command_says_so(capsys, tmp_path):
    assert bench.main(["gpu", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA card" in capsys.readouterr().err


def test_weights_that_do_not_fit_the_card_are_a_user_error(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu.AutoModelForCausalLM, "from_config", full)
    with pytest.raises(UserError, match="the weights of a tiny Llama, random weights do not fit"):
        gpu.random_model(gpu.REHEARSAL, "cpu")


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
    model = gpu.random_model(gpu.REHEARSAL, "cpu")
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
