"""A run in the schema of Every Eval Ever, version 0.3.0: one JSON a cell, and its samples beside it.

The schema (arXiv 2606.14516) is a common form for results of evaluations, so that those of different
harnesses can be read together. Its files lie as its data store keeps them, below `every_eval_ever/`:

    data/<benchmark>/<developer>/<model>/<uuid>.json
    data/<benchmark>/<developer>/<model>/<uuid>_samples.jsonl

What a run did not record is left out, or `unknown` where the schema demands a value.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.columnar import Records
from harness.report.bootstrap import RESAMPLES, Samples, Scored
from harness.report.run import Run, averages
from harness.report.words import code_digest
from kvmerge.files import write_atomically
from kvmerge.names import parse_name

VERSION = "0.3.0"
"""Version of the schema."""
_UNKNOWN = "unknown"
_NO_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_DETAILS = (
    *("seed", "prompt_hash", "budget_achieved", "kept_entries", "kv_bytes"),
    *("kl_to_full", "top1_agreement"),
)
"""Fields of a record that stand among the details of a sample."""
_FULL_MARKS = "a sample with full marks; its score is 0 to 1"

Json = dict[str, Any]


def write_every_eval_ever(run: Run, folder: Path) -> list[Path]:
    """Write a run's cells below a folder, in place of what it held, and return the paths.

    Cells without any score, as where answers are withheld, are left out. Joined runs write their own.
    """
    shutil.rmtree(folder / "data", ignore_errors=True)
    return [path for source in run.sources for path in _write_cells(source, folder)]


def _write_cells(run: Run, folder: Path) -> list[Path]:
    written = []
    for cell in run.cells:
        log = evaluation_log(run, cell)
        if not log["evaluation_results"]:
            continue
        identity = log["evaluation_id"]
        name = uuid.UUID(bytes=hashlib.sha256(identity.encode()).digest()[:16], version=4)
        place = Path("data", *_place(run))
        samples = b"".join(f"{_dump(sample)}\n".encode() for sample in sample_logs(run, cell))
        if samples:
            path = place / f"{name}_samples.jsonl"
            write_atomically(folder / path, samples)
            written.append(folder / path)
            log["detailed_evaluation_results"] = {
                "format": "jsonl",
                "file_path": path.as_posix(),
                "hash_algorithm": "sha256",
                "checksum": hashlib.sha256(samples).hexdigest(),
                "total_rows": samples.count(b"\n"),
            }
        path = folder / place / f"{name}.json"
        write_atomically(path, json.dumps(log, indent=2, allow_nan=False) + "\n")
        written.append(path)
    return written


def evaluation_log(run: Run, cell: str) -> Json:
    """Return a cell's scores, by task and on the average, with what they were measured by."""
    results = [
        _result(run, cell, task, run.scores[task, cell])
        for task in run.tasks
        if (task, cell) in run.scores and math.isfinite(run.scores[task, cell].value)
    ]
    averaged = averages(run).get(cell)
    if averaged is not None and math.isfinite(averaged.value):
        results.append(_average(run, cell, averaged))
    ended = _ended(run)
    return _known(
        schema_version=VERSION,
        evaluation_id=_identity(run, cell),
        evaluation_timestamp=ended,
        retrieved_timestamp=ended or _written(run),
        source_metadata={
            "source_name": "kvmerge",
            "source_type": "evaluation_run",
            "source_organization_name": _UNKNOWN,
            "evaluator_relationship": "other",
        },
        eval_library=_known(
            name="kvmerge",
            version=run.recorded("git", "commit") or _UNKNOWN,
            additional_details=_texts(
                modified=run.recorded("git", "dirty"),
                code=code_digest(run),
                packages=run.recorded("packages"),
                hardware=run.recorded("hardware"),
            ),
        ),
        model_info=_model(run),
        evaluation_results=results,
    )


def sample_logs(run: Run, cell: str) -> Iterator[Json]:
    """Yield a line for each answer of a cell to a task scored 0 to 100, seed by seed.

    Prompts are not recorded whole: their hash stands for them. Continuations, scored by perplexity,
    are no answers that could be correct, so they have no line.
    """
    identity, model = _identity(run, cell), _model_id(run)
    for task in run.averaged_tasks:
        records = Records.of(run.of(task, cell))
        names = ("id", "prompt_hash", "answers", "prediction", "score", "prompt_tokens")
        asked = zip(*map(records.values, (*names, "generated_tokens")), strict=True)
        for row, metadata in zip(asked, _metadata(records), strict=True):
            sample, prompt_hash, answers, prediction, score, prompt_tokens, generated_tokens = row
            if not math.isfinite(score):
                continue
            yield {
                "schema_version": VERSION,
                "evaluation_id": identity,
                "model_id": model,
                "evaluation_name": _evaluation_name(run, task),
                "evaluation_result_id": task,
                "sample_id": sample,
                "interaction_type": "single_turn",
                "input": {
                    "raw": f"[not recorded whole; hash {prompt_hash}]",
                    "reference": list(answers),
                },
                "output": {"raw": [prediction]},
                "answer_attribution": [],
                "evaluation": {"score": score, "is_correct": score == 1},
                "token_usage": {
                    "input_tokens": prompt_tokens,
                    "output_tokens": generated_tokens,
                    "total_tokens": prompt_tokens + generated_tokens,
                },
                "metadata": metadata,
            }


def _metadata(records: Records) -> Iterator[dict[str, str]]:
    """Yield the details of each record."""
    columns = [map(_text, records.values(name)) for name in _DETAILS]
    for *texts, groups in zip(*columns, records.values("groups"), strict=True):
        known = zip(_DETAILS, texts, strict=True)
        details = {name: text for name, text in known if text is not None}
        yield details | _texts(**{f"group_{name}": value for name, value in (groups or {}).items()})


# One result


def _result(run: Run, cell: str, task: str, scored: Scored) -> Json:
    metric = run.metrics[task]
    percent = metric.averaged
    low, high = (0, 100) if percent else ("-Infinity", "Infinity")
    answers = None if metric.continuation else run.recorded("tasks", task, "max_new_tokens")
    return {
        "evaluation_result_id": task,
        "evaluation_name": _evaluation_name(run, task),
        "source_data": _known(
            dataset_name=run.benchmark,
            source_type="other",
            additional_details=_texts(
                task=task,
                samples=run.recorded("tasks", task, "samples"),
                sha256=run.recorded("fingerprint", "data", task),
                benchmark=run.recorded("config", "benchmark"),
            ),
        ),
        "metric_config": _known(
            metric_id=metric.name,
            metric_name=metric.name,
            metric_unit="percent" if percent else None,
            lower_is_better=not metric.higher_is_better,
            score_type="continuous",
            min_score=low,
            max_score=high,
            additional_details=_texts(is_correct=_FULL_MARKS if percent else None),
        ),
        "score_details": {
            "score": scored.value,
            "details": _figures(run.figures[task, cell]),
            "uncertainty": _uncertainty(scored, [run.samples[task, cell]]),
        },
        "generation_config": _known(
            generation_args=_known(
                temperature=None if metric.continuation else 0.0, max_tokens=answers or None
            ),
            additional_details=_setting(run, cell),
        ),
    }


def _average(run: Run, cell: str, scored: Scored) -> Json:
    tasks = run.averaged_tasks
    return {
        "evaluation_result_id": "average",
        "evaluation_name": _evaluation_name(run, "average"),
        "source_data": {
            "dataset_name": run.benchmark,
            "source_type": "other",
            "additional_details": _texts(tasks=list(tasks)),
        },
        "metric_config": {
            "metric_id": "kvmerge.average",
            "metric_name": "plain mean of the tasks' scores, which stand beside it",
            "metric_unit": "percent",
            "lower_is_better": False,
            "score_type": "continuous",
            "min_score": 0,
            "max_score": 100,
        },
        "score_details": {
            "score": scored.value,
            "details": _figures(run.over_tasks(cell)),
            "uncertainty": _uncertainty(scored, [run.samples[task, cell] for task in tasks]),
        },
        "generation_config": {"additional_details": _setting(run, cell)},
    }


def _figures(values: Mapping[str, float]) -> dict[str, str]:
    """Return the figures of a cell but its times, which are those of a batch that all cells share."""
    return _texts(**{name: value for name, value in values.items() if not name.endswith("_seconds")})


def _uncertainty(scored: Scored, tasks: Sequence[Samples]) -> Json:
    shown = scored.estimate()
    n = sum(len(samples.ids) for samples in tasks)
    contexts = sum(len(samples.clusters) for samples in tasks)
    drawn = "samples" if contexts == n else "contexts"
    if math.isnan(shown.low):
        return {"num_samples": n}
    return {
        "confidence_interval": {
            "lower": shown.low,
            "upper": shown.high,
            "confidence_level": 0.95,
            "method": f"percentile bootstrap over {drawn}, within tasks",
        },
        "num_samples": n,
        "num_bootstrap_samples": RESAMPLES,
    }


def _setting(run: Run, cell: str) -> dict[str, str]:
    """Return the method with all its settings, its budget, and how answers were decoded."""
    name = parse_name(cell)
    return _texts(
        decoding="greedy",
        cell=cell,
        method=name.method,
        options=name.options or None,
        budget=str(name.budget),
        method_settings=run.recorded("fingerprint", "cells", cell),
        seed=run.recorded("seed"),
        num_seeds=run.recorded("num_seeds"),
        policy=run.recorded("policy"),
        question=run.recorded("question"),
    )


# Names


def _model(run: Run) -> Json:
    weights = run.recorded("fingerprint", "weights")
    model = run.recorded("config", "model")
    kept = model if isinstance(model, Mapping) else {}
    opened = _ON_HUB.fullmatch(_model_id(run)) or kept.get("embedded")
    version = run.recorded("packages", "transformers")
    return _known(
        name=run.model,
        id=_model_id(run),
        developer=_model_id(run).partition("/")[0] if "/" in _model_id(run) else None,
        inference_engine={"name": "transformers", "version": version} if version else None,
        additional_details={
            "deployment_type": "self_deployed",
            "model_availability": "open_weights" if opened else _UNKNOWN,
        }
        | _texts(
            weights=weights,
            dtype=run.recorded("dtype"),
            device=run.recorded("device"),
            **{
                name: kept.get(name)
                for name in ("revision", "quantize", "max_length", "context", "chat", "stop")
            },
        ),
    )


def _model_id(run: Run) -> str:
    """Return the model's name on the hub where its weights came from there, else its own."""
    path = run.recorded("config", "model", "path")
    local = run.recorded("fingerprint", "weights") == "a local checkpoint"
    return path if isinstance(path, str) and _ON_HUB.fullmatch(path) and not local else run.model


def _identity(run: Run, cell: str) -> str:
    return f"{run.benchmark}/{_model_id(run)}/{cell}/{_ended(run) or _written(run)}"


def _evaluation_name(run: Run, task: str) -> str:
    return f"{run.benchmark}.{task}"


def _place(run: Run) -> list[str]:
    """Return the folders of a run: benchmark, developer and model."""
    developer, _, model = _model_id(run).rpartition("/")
    parts = (run.benchmark, developer or _UNKNOWN, model)
    return [_NO_NAME.sub("-", part).strip(". ") or _UNKNOWN for part in parts]


def _ended(run: Run) -> str | None:
    """Return when the run ended, in seconds since 1970; None where that is not recorded."""
    runs = run.recorded("runs")
    ended = [each.get("ended") for each in runs if isinstance(each, Mapping)] if runs else []
    times = [datetime.fromisoformat(text) for text in ended if isinstance(text, str)]
    return str(int(max(times).timestamp())) if times else None


def _written(run: Run) -> str:
    """Return when the run was last written to."""
    return str(int(max(path.stat().st_mtime for path in run.output_dir.rglob("run.json"))))


# Values


def _known(**values: Any) -> Json:
    """Return what is known of some keys."""
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _texts(**values: Any) -> dict[str, str]:
    """Return what is known as texts, which details are in the schema: numbers and lists as JSON."""
    texts = {name: _text(value) for name, value in values.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _text(value: Any) -> str | None:
    if value is None or value == {} or value != value:
        return None
    return value if isinstance(value, str) else _dump(value)


def _dump(value: Any) -> str:
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)  # as JSON has it, many times faster
    return _COMPACT.encode(value)


# ASCII alone: some readers take U+2028 and its like for the end of a line.
_COMPACT = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=float)
