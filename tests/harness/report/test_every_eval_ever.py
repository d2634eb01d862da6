from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from harness.report.export.every_eval_ever import evaluation_log, sample_logs, write_every_eval_ever
from harness.report.run import Run, load_run
from tests.synthetic_run import record, write_run

SCHEMAS = Path(__file__).parents[2] / "golden" / "every_eval_ever"
NOTHING: dict[str, Any] = {"dtype": None, "git": None, "packages": {}, "config": {}, "fingerprint": {}}
"""What a run.json may lack."""
HUB = {"path": "meta-llama/Llama-2-7b-chat-hf", "revision": "f5db02d"}


def schema(name: str) -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads((SCHEMAS / f"{name}.schema.json").read_text()))


LOG, SAMPLE = schema("eval"), schema("instance_level_eval")


def small_run(
    folder: Path, n: int = 4, cells: tuple[str, ...] = ("full@1", "h2o@0.5"), **info: Any
) -> Run:
    records = {
        cell: {
            "qa": [
                record(str(i), i / 3 if n > 1 else 1.0, kl_to_full=None if cell == "full@1" else 0.25)
                for i in range(n)
            ],
            "text": [record(str(i), 2.0, extra={"nll": 10.0 + i, "tokens": 10}) for i in range(n)],
        }
        for cell in cells
    }
    return load_run(write_run(folder, {"qa": "qa_f1", "text": "perplexity"}, records, **info))


def check(folder: Path) -> list[Path]:
    """Hold every file below a folder against its schema; return those of cells."""
    logs = sorted(folder.rglob("*.json"))
    for path in logs:
        LOG.validate(json.loads(path.read_text()))
    for path in folder.rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            SAMPLE.validate(json.loads(line))
    return logs


def results(log: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["evaluation_result_id"]: result for result in log["evaluation_results"]}


def test_the_schema_is_the_version_that_files_name(tmp_path: Path) -> None:
    log = evaluation_log(small_run(tmp_path), "full@1")
    assert LOG.schema["version"] == SAMPLE.schema["version"] == log["schema_version"] == "0.3.0"


@pytest.mark.parametrize(
    "info",
    [
        {},
        NOTHING,
        {"config": {"model": HUB}, "runs": [{"ended": "2026-01-02T03:04:05+00:00", "seconds": 9.5}]},
    ],
    ids=["as made", "nothing recorded", "much recorded"],
)
@pytest.mark.parametrize("cells", [("full@1", "h2o@0.5", "kvmerger:top=0.1@1024"), ("cam@0.35",)])
@pytest.mark.parametrize("n", [1, 4])
def test_every_file_is_valid(
    tmp_path: Path, n: int, cells: tuple[str, ...], info: dict[str, Any]
) -> None:
    run = small_run(tmp_path / "run", n, cells, **info)
    write_every_eval_ever(run, tmp_path / "out")
    logs = check(tmp_path / "out")
    assert len(logs) == len(cells)
    assert len(list((tmp_path / "out").rglob("*.jsonl"))) == len(cells)


def test_a_score_has_its_interval_and_its_samples(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    found = results(evaluation_log(run, "h2o@0.5"))
    assert list(found) == ["qa", "text", "average"]
    shown = run.scores["qa", "h2o@0.5"].estimate()
    details = found["qa"]["score_details"]
    assert details["score"] == pytest.approx(50)
    assert details["uncertainty"] == {
        "confidence_interval": {
            "lower": shown.low,
            "upper": shown.high,
            "confidence_level": 0.95,
            "method": "percentile bootstrap over samples, within tasks",
        },
        "num_samples": 4,
        "num_bootstrap_samples": 10_000,
    }
    assert details["details"]["kl_to_full"] == "0.25"
    assert not any(name.endswith("seconds") for name in details["details"])
    assert found["average"]["score_details"]["score"] == pytest.approx(50)


def test_one_sample_has_no_interval(tmp_path: Path) -> None:
    found = results(evaluation_log(small_run(tmp_path, n=1), "full@1"))
    assert {name: each["score_details"]["uncertainty"] for name, each in found.items()} == {
        "qa": {"num_samples": 1},
        "text": {"num_samples": 1},
        "average": {"num_samples": 1},
    }


def test_scales_and_directions_are_those_of_the_metrics(tmp_path: Path) -> None:
    found = results(evaluation_log(small_run(tmp_path), "full@1"))
    qa, text = (found[task]["metric_config"] for task in ("qa", "text"))
    assert (qa["lower_is_better"], qa["min_score"], qa["max_score"]) == (False, 0, 100)
    assert qa["metric_unit"] == "percent"
    assert text["lower_is_better"] is True
    assert (text["min_score"], text["max_score"]) == ("-Infinity", "Infinity")
    assert "metric_unit" not in text


def test_what_was_generated_and_how_is_told(tmp_path: Path) -> None:
    prints = {"cells": {"kvmerger:top=0.1@0.35": {"sigma": 5.0}}, "data": {"qa": "abc"}}
    run = small_run(tmp_path, 4, ("kvmerger:top=0.1@0.35",), fingerprint=prints)
    run.info["tasks"]["qa"]["max_new_tokens"] = 64
    found = results(evaluation_log(run, "kvmerger:top=0.1@0.35"))
    assert found["qa"]["generation_config"]["generation_args"] == {"temperature": 0.0, "max_tokens": 64}
    assert "generation_args" not in found["text"]["generation_config"]
    setting = found["qa"]["generation_config"]["additional_details"]
    assert setting["decoding"] == "greedy"
    assert (setting["method"], setting["options"], setting["budget"]) == ("kvmerger", "top=0.1", "0.35")
    assert json.loads(setting["method_settings"]) == {"sigma": 5.0}
    assert found["qa"]["source_data"]["additional_details"]["sha256"] == "abc"


@pytest.mark.parametrize(
    ("weights", "model", "developer", "opened"),
    [
        ("meta-llama/Llama-2-7b-chat-hf at f5db02d", HUB["path"], "meta-llama", "open_weights"),
        ("a local checkpoint", "toy-1m", None, "unknown"),
    ],
)
def test_a_model_of_the_hub_has_its_name_there_and_a_local_one_its_own(
    tmp_path: Path, weights: str, model: str, developer: str | None, opened: str
) -> None:
    run = small_run(tmp_path, config={"model": HUB}, fingerprint={"weights": weights})
    log = evaluation_log(run, "full@1")
    assert log["model_info"]["id"] == model
    assert log["model_info"].get("developer") == developer
    assert log["model_info"]["additional_details"]["model_availability"] == opened
    (path, *_) = write_every_eval_ever(run, tmp_path / "out")
    parts = path.relative_to(tmp_path / "out").parts
    assert parts[:4] == ("data", "toy", developer or "unknown", model.split("/")[-1])


def test_what_is_not_recorded_is_left_out_or_unknown(tmp_path: Path) -> None:
    run = small_run(tmp_path, **NOTHING)
    os.utime(tmp_path / "run.json", (1_700_000_000, 1_700_000_000))
    log = evaluation_log(run, "full@1")
    assert log["eval_library"] == {"name": "kvmerge", "version": "unknown"}
    assert "evaluation_timestamp" not in log
    assert log["retrieved_timestamp"] == "1700000000"  # when run.json was written
    assert "inference_engine" not in log["model_info"]
    assert "dtype" not in log["model_info"]["additional_details"]


def test_the_samples_are_the_answers_and_are_found_from_the_cell(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run")
    samples, log = write_every_eval_ever(run, tmp_path / "out")[2:]
    told = json.loads(log.read_text())
    linked = told["detailed_evaluation_results"]
    assert tmp_path / "out" / linked["file_path"] == samples
    assert linked["checksum"] == hashlib.sha256(samples.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert linked["total_rows"] == len(lines) == 4  # of the perplexity there is none
    for line, answer in zip(lines, run.records["qa", "h2o@0.5"], strict=True):
        assert line["evaluation_id"] == told["evaluation_id"]
        assert line["model_id"] == told["model_info"]["id"]
        assert line["evaluation_result_id"] == "qa"
        assert line["sample_id"] == answer.id
        assert line["output"]["raw"] == [answer.prediction]
        assert line["input"] == {"raw": "[not recorded whole; hash cafe]", "reference": ["a", "b"]}
        assert line["evaluation"] == {"score": answer.score, "is_correct": answer.score == 1}
        assert line["token_usage"] == {"input_tokens": 100, "output_tokens": 3, "total_tokens": 103}
        assert line["metadata"]["seed"] == "42"


def test_several_seeds_are_a_line_each(tmp_path: Path) -> None:
    answers = [record("0", 0.5, seed=seed) for seed in (1, 2)]
    run = load_run(write_run(tmp_path, {"t": "qa_f1"}, {"cam@0.5": {"t": answers}}))
    assert [line["metadata"]["seed"] for line in sample_logs(run, "cam@0.5")] == ["1", "2"]


def test_hostile_names_and_answers_stay_in_their_folder_and_on_their_line(tmp_path: Path) -> None:
    answers = [record("../x\u2028", 0.5, prediction='"}\n\u2028\x85{"')]
    run = load_run(
        write_run(
            tmp_path / "run",
            {"t": "qa_f1"},
            {"h2o@0.5": {"t": answers}},
            benchmark="../../etc",
            model="a\\b:c/..",
        )
    )
    written = write_every_eval_ever(run, tmp_path / "out")
    check(tmp_path / "out")
    for path in written:
        parts = path.resolve().relative_to((tmp_path / "out").resolve()).parts
        assert len(parts) == 5
        assert not any(re.search(r'[<>:"\\|?*]', part) or part.startswith(".") for part in parts)
    (samples,) = (path for path in written if path.suffix == ".jsonl")
    (line,) = samples.read_text().splitlines()
    assert json.loads(line)["output"]["raw"] == [answers[0].prediction]


def test_withheld_answers_have_no_file(tmp_path: Path) -> None:
    cells = {"full@1": {"t": [record("0", 0.5)]}, "h2o@0.5": {}}
    run = load_run(write_run(tmp_path, {"t": "unscored"}, cells))
    assert write_every_eval_ever(run, tmp_path / "out") == []


def test_writing_again_replaces_what_was_there(tmp_path: Path) -> None:
    first = write_every_eval_ever(small_run(tmp_path / "run"), tmp_path / "out")
    before = {path: path.read_bytes() for path in first}
    again = write_every_eval_ever(load_run(tmp_path / "run"), tmp_path / "out")
    assert {path: path.read_bytes() for path in again} == before
    later = small_run(tmp_path / "later", 4, ("cam@0.5",))
    write_every_eval_ever(later, tmp_path / "out")
    assert len(check(tmp_path / "out")) == 1


def test_two_cells_and_two_runs_have_names_of_their_own(tmp_path: Path) -> None:
    ended = [{"ended": f"2026-01-0{day}T00:00:00+00:00", "seconds": 1.0} for day in (1, 2)]
    runs = [small_run(tmp_path / str(day), runs=[each]) for day, each in enumerate(ended)]
    names = [path.name for run in runs for path in write_every_eval_ever(run, run.output_dir / "out")]
    assert len(set(names)) == len(names) == 8
