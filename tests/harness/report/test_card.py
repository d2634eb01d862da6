from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness.judgement import Judgement
from harness.provenance import hardware, package_versions
from harness.report.export.card import NOT_RECORDED, card
from harness.report.published import load_references
from harness.report.run import Run, load_run
from tests.synthetic_run import record, write_run

RECORDED: dict[str, Any] = {
    "config": {
        "margin": 2,
        "limit": 5,
        "batch_size": 4,
        "model": {"revision": "f5db02d", "quantize": None},
    },
    "fingerprint": {
        "weights": "meta-llama/Llama-2-7b-chat-hf",
        "code": "c0de",
        "data": {"t": "5ha"},
        "cells": {"kvmerger@0.5": {"thresholds": "llama@0.5", "sigma": 5.0}},
    },
    "hardware": {"cpu": "EPYC", "cores": 2, "threads": 1, "gpus": [], "memory_bytes": 8 * 2**30},
    "runs": [{"seconds": 100.0}, {"seconds": 20.4}, {"seconds": None}],
    "notes": ["Data of another revision."],
}


def run_of(
    folder: Path, n: int = 6, cells: tuple[str, ...] = ("full@1", "kvmerger@0.5"), **info: Any
) -> Run:
    records = {cell: {"t": [record(str(i), i / n) for i in range(n)]} for cell in cells}
    return load_run(write_run(folder, {"t": "qa_f1"}, records, **info))


def card_of(run: Run, judgement: Judgement | None = None) -> str:
    return card([run], [judgement or run.judgement], load_references())


def answers(text: str) -> dict[str, str]:
    return dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", text, flags=re.MULTILINE))


def test_the_code_of_all_modules_has_one_digest(tmp_path: Path) -> None:
    def digest(name: str, **methods: str) -> str:
        prints = {"code": {"kvmerge.engine": "aa"}, "methods": {"full@1": methods}}
        run = run_of(tmp_path / name, **RECORDED | {"fingerprint": RECORDED["fingerprint"] | prints})
        return answers(card_of(run))["Digest of the code"]

    one = digest("one", **{"baselines.full": "bb"})
    assert re.fullmatch("`[0-9a-f]{16}`", one)
    assert digest("same", **{"baselines.full": "bb"}) == one
    assert digest("other", **{"baselines.full": "cc"}) != one


def test_what_run_json_says_is_answered(tmp_path: Path) -> None:
    found = answers(card_of(run_of(tmp_path, **RECORDED)))
    assert found["Weights"] == "`meta-llama/Llama-2-7b-chat-hf`"
    assert found["Revision of the model"] == "`f5db02d`"
    assert found["Quantised"] == "no"
    assert found["Memory"] == "8.0 GiB"
    assert found["GPUs"] == "none"
    assert found["Cores and threads"] == "2 and 1"
    assert found["Wall time"] == "120 s, in 2 starts"
    assert found["Digest of the code"] == "`c0de`"
    assert found["Rule for flips"].startswith("A good answer has 50 points or more, ")
    assert found["Margin of equivalence"].startswith("2 points")
    assert found["Samples left out"] == "all but 5 of each task (`limit=5`)"
    assert found["Thresholds of merging"] == "KVMerger 50%: calibrated ones, `llama@0.5`"
    assert found["Notes of the run"] == "Data of another revision."
    assert "2 contrasts" not in found["Tests"]  # one on the average, none on KL
    assert "1 contrasts on the average and on KL" in found["Tests"]


def test_what_run_json_lacks_is_said_to_be_not_recorded(tmp_path: Path) -> None:
    nothing = {"dtype": None, "git": None, "packages": {}, "config": {}, "fingerprint": {}}
    found = answers(card_of(run_of(tmp_path, **nothing)))
    for name in (
        "Weights",
        "Data type",
        "Quantised",
        "Batch size",
        "Processor",
        "Memory",
        "GPUs",
        "Wall time",
        "Commit",
        "Packages",
        "Revision of the model",
        "Thresholds of merging",
        "Samples left out",
        "Notes of the run",
    ):
        assert found[name] == NOT_RECORDED, name


def test_intervals_tests_and_seeds_are_described(tmp_path: Path) -> None:
    found = answers(card_of(run_of(tmp_path), Judgement(margin=3)))
    assert "10,000 bootstrap resamples" in found["Intervals"]
    assert "neither other models" in found["What they cover"]
    assert "Holm" in found["Tests"]
    assert "within 3 points" in found["Equivalence"]
    assert found["Seeds"].startswith("42;")


def test_cells_and_tasks_are_listed_with_their_settings_and_digests(tmp_path: Path) -> None:
    text = card_of(run_of(tmp_path, **RECORDED))
    assert '| KVMerger 50% | `kvmerger@0.5` | 0.5000 [0.5000, 0.5000] | `{"thresholds": ' in text
    assert "| `t` | `qa_f1` | not recorded | 6 | not recorded | `5ha` |" in text


def test_one_sample_one_cell_and_no_full_cache_have_a_card(tmp_path: Path) -> None:
    text = card_of(run_of(tmp_path, n=1, cells=("cam@0.35",)))
    assert "0 contrasts on the average and on KL" in text
    assert "| CaM 35% |" in text


def test_a_gap_is_a_deviation(tmp_path: Path) -> None:
    cells = {"full@1": {"t": [record("0", 0.5)]}, "h2o@0.5": {}}
    found = answers(card_of(load_run(write_run(tmp_path, {"t": "qa_f1"}, cells))))
    assert "no records: h2o@0.5 on t." in found["Missing"]


def test_a_missed_budget_is_a_deviation(tmp_path: Path) -> None:
    kept = {"h2o@0.35": {"t": [record(str(i), 0.5, budget_achieved=0.5) for i in range(3)]}}
    found = answers(card_of(load_run(write_run(tmp_path, {"t": "qa_f1"}, kept))))
    assert found["Missed budgets"] == "H2O 35%: kept 50%"


def test_several_runs_have_a_part_each(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, model=name) for name in ("one", "two")]
    text = card(runs, [run.judgement for run in runs], load_references())
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["one on toy", "two on toy"]


def test_hostile_texts_are_neither_markdown_nor_html(tmp_path: Path) -> None:
    hostile = "<script>x</script> `a` **b**\n# c | d"
    text = card_of(run_of(tmp_path, model=hostile, notes=[hostile]))
    assert "\n# c" not in text
    assert re.search(
        r"^## \\<script\\>x\\</script\\> \\`a\\` \\\*\\\*b\\\*\\\* \\# c \\\| d on toy$", text, re.M
    )
    model = answers(text)["Model"]
    assert model.startswith("`` <script>")
    assert model.endswith(" ``")


def test_a_run_records_memory_and_what_its_statistics_come_from() -> None:
    assert hardware()["memory_bytes"] > 2**20
    assert package_versions()["statsmodels"]
    assert package_versions()["scipy"]
