"""Whole runs of a tiny random model: what is recorded, what is run again, what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoConfig

import harness.answering
from benchmarks import longbench
from benchmarks.task import PromptFormat
from harness import code
from harness.answering import prompt_hash, stop_rule
from harness.batching import BatchSize
from harness.executors import worker
from harness.executors.worker import counted_layers
from harness.provenance import changed_beside
from harness.records import KL_DECIMALS, prediction_path
from harness.report.run import load_run
from harness.report.summary import write_summary
from harness.results import Results
from harness.runner import left, run
from harness.settings import Settings
from kvmerge.errors import UserError
from kvmerge.models import load, loading
from kvmerge.models.tokenizer import load_tokenizer
from scripts.records import repair
from tests.tiny import HEAD_DIM, LAYERS
from tests.tiny_run import assert_same_lines, read_lines, row, tiny_settings, write_rows

Tiny = Callable[..., Settings]

CONTRACT = [
    "id",
    "seed",
    "prediction",
    "answers",
    "score",
    "prompt_hash",
    "prompt_tokens",
    "generated_tokens",
    "kept_entries",
    "budget_achieved",
    "kv_bytes",
    "kl_to_full",
    "top1_agreement",
    "fidelity_tokens",
]
CELLS = {"full@1": 1.0, "kvmerger@0.5": 0.5, "h2o@0.5": 0.5, "cam@0.5": 0.5}
KV_HEADS = 2
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Calls:
    """What was run: the sample of each prefill, and how many rows shared it."""

    samples: list[str] = field(default_factory=list)
    rows: list[list[tuple[str, str, int]]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    original = harness.answering.run_samples

    def counted(model: Any, requests: Sequence[Any], stop: Any) -> Any:
        made.batches.append(len(requests))
        for each in requests:
            made.samples.append(each.sample_id.removeprefix("longbench/"))
            made.rows.append([(type(r.method).__name__, str(r.budget), r.seed) for r in each.rows])
        return original(model, requests, stop)

    monkeypatch.setattr(harness.answering, "run_samples", counted)
    return made


@pytest.fixture(scope="module")
def finished(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; not to be changed."""
    settings = tiny_settings(checkpoint, data, tmp_path_factory.mktemp("finished") / "out")
    run(settings)
    return settings.output_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The whole run again, where `tiny` settings write, to be damaged and resumed."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def summary(folder: Path) -> pd.DataFrame:
    write_summary(load_run(folder))
    frame = pd.read_csv(folder / "summary.csv", dtype=str, keep_default_na=False)
    return frame.drop(columns=["prefill_seconds", "decode_seconds"])


# what is recorded


def test_there_is_a_line_for_every_task_cell_seed_and_sample(finished: Path) -> None:
    wanted = {
        (task, cell, seed, f"{task}-{number}")
        for task in ("qasper", "trec", "samsum", "lcc")
        for cell in CELLS
        for seed in ((0, 1) if cell == "cam@0.5" else (0,))
        for number in range(3)
    }
    assert set(read_lines(finished)) == wanted


def test_lines_say_in_which_batch_with_how_many_threads_and_by_which_kernel_they_ran(
    tiny: Tiny, tmp_path: Path
) -> None:
    cells = "cells=[full@1,cam@0.5]"  # three rows a sample, of two seeds
    only = "benchmark.tasks=[trec]"
    run(tiny(cells, only, "batch_size=2"))
    run(tiny(cells, only, "limit=1", "model.pack_weights=false", folder=tmp_path / "unpacked"))
    run(tiny(cells, only, "limit=1", "model.dtype=bfloat16", folder=tmp_path / "bfloat16"))

    def how(folder: Path) -> list[tuple[int | None, int | None, int | None, str | None]]:
        records = Results(folder).records("trec", "cam@0.5")
        return [(r.batch_samples, r.batch_rows, r.threads, r.kernel) for r in records if r.seed == 0]

    threads = torch.get_num_threads()
    batched = (2, 6, threads, "tiled-torch+packed/float32")
    assert how(tmp_path / "out") == [batched, batched, (1, 3, threads, "tiled-torch+packed/float32")]
    assert how(tmp_path / "unpacked") == [(1, 3, threads, "tiled-torch/float32")]
    assert how(tmp_path / "bfloat16") == [(1, 3, threads, "flash-cpu/bfloat16")]


def test_lines_hold_the_contracts_fields_and_what_was_measured(finished: Path) -> None:
    for (task, cell, seed, sample), line in read_lines(finished).items():
        assert list(line)[: len(CONTRACT)] == CONTRACT
        assert (line["id"], line["seed"]) == (sample, seed)
        prompt = line["prompt_tokens"]
        entries = math.floor(CELLS[cell] * prompt)
        assert line["kept_entries"] == line["kept_entries_min"] == line["kept_entries_max"] == entries
        assert line["read_entries"] == entries
        assert line["requested_entries"] == entries
        assert line["kept_entries_by_layer"] == [entries] * 2
        assert line["budget_achieved"] == pytest.approx(entries / prompt)
        per_entry = LAYERS * KV_HEADS * HEAD_DIM * 2 * 4  # keys and values, float32
        assert line["kv_bytes"] == entries * per_entry
        assert line["kv_bytes_full"] == prompt * per_entry
        sizes = entries * LAYERS * KV_HEADS * 8 if cell.startswith("kvmerger") else 0
        assert line["size_bytes"] == sizes
        limit = longbench.find_task(task).max_new_tokens
        assert 1 <= line["generated_tokens"] <= limit
        assert line["finish_reason"] in ("stop", "length")
        assert line["finish_reason"] == "stop" or line["generated_tokens"] == limit


def test_prompt_and_score_are_the_benchmarks_own(finished: Path, tiny: Tiny) -> None:
    settings = tiny()
    _, tokenizer = load(settings.model)
    fmt = PromptFormat(3500, "template")
    for task in settings.benchmark.tasks:
        for sample in settings.benchmark.samples(task):
            ids = settings.benchmark.encode(sample, task, tokenizer, fmt).prompt
            digest = hashlib.sha256(",".join(str(i) for i in ids).encode()).hexdigest()[:16]
            for cell in CELLS:
                line = read_lines(finished)[task.name, cell, 0, sample.id]
                assert line["prompt_hash"] == digest == prompt_hash(ids)
                assert line["prompt_tokens"] == len(ids)
                assert line["answers"] == list(sample.answers)
                assert line["score"] == longbench.score(
                    task.name, line["prediction"], sample.answers, sample.all_classes
                )


def test_a_prompt_hash_never_changes() -> None:
    assert prompt_hash([1, 22, 333]) == "8915516745284e69"
    assert len({prompt_hash(ids) for ids in ([1, 2], [12], [2, 1], [])}) == 4


def test_the_full_cell_answers_as_the_models_own_generate(finished: Path, tiny: Tiny) -> None:
    settings = tiny("benchmark.tasks=[trec]")
    model, tokenizer = load(settings.model)
    (task,) = settings.benchmark.tasks
    for sample in settings.benchmark.samples(task):
        ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
        whole = model.generate(  # type: ignore[operator]
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=task.max_new_tokens,
        )
        answer = tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)
        line = read_lines(finished)["trec", "full@1", 0, sample.id]
        assert line["prediction"] == answer
        assert line["generated_tokens"] == whole.shape[1] - len(ids)


def test_a_method_that_draws_runs_with_each_seed_and_differs(tiny: Tiny) -> None:
    settings = tiny("benchmark.tasks=[trec]", "cells=[cam@0.5,h2o@0.5]", "seed=7", "limit=2")
    run(settings)
    lines = read_lines(settings.output_dir)
    assert {key[1:3] for key in lines} == {("cam@0.5", 7), ("cam@0.5", 8), ("h2o@0.5", 7)}
    cam = {key[2:]: line["prediction"] for key, line in lines.items() if key[1] == "cam@0.5"}
    assert cam[7, "trec-0"] != cam[8, "trec-0"]


def test_an_absolute_budget_counts_entries_and_stops_at_the_prompt(tiny: Tiny) -> None:
    settings = tiny("benchmark.tasks=[trec]", "cells=[h2o@40,kvmerger@2000]", "limit=1")
    run(settings)
    lines = {key[1]: line for key, line in read_lines(settings.output_dir).items()}
    assert lines["h2o@40"]["kept_entries"] == 40
    assert lines["kvmerger@2000"]["budget_achieved"] == 1


def test_variants_of_a_method_have_files_of_their_own(tiny: Tiny) -> None:
    variant = "kvmerger:pivot=first,sigma=1@0.5"
    settings = tiny("benchmark.tasks=[trec]", f"cells=[kvmerger@0.5,'{variant}']", "limit=1")
    run(settings)
    names = {path.name for path in settings.output_dir.glob("predictions/trec/*")}
    assert names == {"kvmerger@0.5.jsonl", "kvmerger-pivot=first-sigma=1@0.5.jsonl"}
    assert list(summary(settings.output_dir)["method"]) == ["kvmerger", "kvmerger:pivot=first,sigma=1"]


# fidelity


def test_divergence_from_full_is_measured_beside_a_full_cell(finished: Path) -> None:
    lines = read_lines(finished)
    for (task, cell, _, sample), line in lines.items():
        answer = lines[task, "full@1", 0, sample]["generated_tokens"]
        assert line["fidelity_tokens"] == answer - 1
        if cell == "full@1":
            assert (line["kl_to_full"], line["top1_agreement"]) == (0, 1)
        else:
            assert line["kl_to_full"] > 0.01
            assert line["kl_to_full"] == round(line["kl_to_full"], KL_DECIMALS)
            assert 0 <= line["top1_agreement"] < 1


ONE = ("benchmark.tasks=[trec]", "limit=1")


@pytest.mark.parametrize(
    "given",
    [
        ["cells=[h2o@0.5]"],
        ["cells=[h2o@0.5,full@1]", "fidelity=false"],
        ["method=h2o", "budget=0.5", "baseline=none"],
    ],
)
def test_divergence_is_empty_where_nothing_is_compared(tiny: Tiny, given: list[str]) -> None:
    settings = tiny(*ONE, *given)
    run(settings)
    for line in read_lines(settings.output_dir).values():
        assert [line[name] for name in CONTRACT[-3:]] == [None, None, None]


def test_fidelity_true_compares_with_a_full_cache_that_is_not_recorded(
    tiny: Tiny, finished: Path, calls: Calls
) -> None:
    settings = tiny(*ONE, "cells=[h2o@0.5,kvmerger@0.5]", "fidelity=true")
    run(settings)
    wanted = {
        key: line
        for key, line in read_lines(finished).items()
        if key[0] == "trec" and key[1] in ("h2o@0.5", "kvmerger@0.5") and key[3] == "trec-0"
    }
    assert_same_lines(read_lines(settings.output_dir), wanted)
    assert [name for name, *_ in calls.rows[0]] == ["H2O", "KVMerger", "Full"]
    assert load_run(settings.output_dir).full_cell is None


# when answers end


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the model's first choice one token, everywhere."""

    def prefer(text: str) -> None:
        def loaded(spec: Any, known: Any) -> Any:
            model, tokenizer = load(spec, known)
            (token,) = tokenizer.encode(text, add_special_tokens=False)

            def lift(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
                return logits.index_add(
                    -1, torch.tensor([token]), torch.full((*logits.shape[:-1], 1), 1e3)
                )

            model.lm_head.register_forward_hook(lift)
            return model, tokenizer

        monkeypatch.setattr(worker, "load", loaded)

    return prefer


@pytest.mark.parametrize(
    ("token", "task", "generated"),
    [
        ("\n", "samsum", 2),  # one token at least, then the newline
        ("\n", "trec", 64),  # a newline ends no other task
        ("</s>", "samsum", 2),
        ("</s>", "trec", 1),
    ],
)
def test_answers_end_at_the_end_token_and_in_samsum_at_a_newline(
    tiny: Tiny, always: Callable[[str], None], token: str, task: str, generated: int
) -> None:
    always(token)
    settings = tiny(f"benchmark.tasks=[{task}]", "cells=[full@1,h2o@0.5]", "limit=1")
    run(settings)
    for line in read_lines(settings.output_dir).values():
        assert line["generated_tokens"] == generated
        assert line["fidelity_tokens"] == (generated - 1 or None)
        if token == "</s>":
            assert bool(line["prediction"]) is (task == "samsum")


def test_a_models_own_stop_tokens_end_every_answer(tiny: Tiny) -> None:
    settings = tiny("model.stop=['<unk>']", "benchmark.tasks=[trec,samsum]")
    model, tokenizer = load(settings.model)
    settings = replace(settings, model=replace(settings.model, stop=["<s>"]))
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    trec, samsum = (stop_rule(settings, model, tokenizer, task) for task in settings.benchmark.tasks)
    assert trec.token_ids == {1, 2}
    assert (trec.max_new_tokens, trec.min_new_tokens) == (64, 0)
    assert samsum.token_ids == {1, 2, newline}
    assert (samsum.max_new_tokens, samsum.min_new_tokens) == (128, 1)


# resuming


def drop_line(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[number]
    path.write_bytes(b"".join(lines))


def drop_samples(folder: Path) -> None:
    for cell in CELLS:
        path = prediction_path(folder, "trec", cell)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"id": "trec-1"' not in line))


def cut(folder: Path) -> None:
    path = prediction_path(folder, "lcc", "h2o@0.5")
    path.write_bytes(path.read_bytes()[:-25])


def drop_seed(folder: Path) -> None:
    path = prediction_path(folder, "samsum", "cam@0.5")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"seed": 1' not in line))


FULL, KVMERGER, H2O = ("Full", "1", 0), ("KVMerger", "0.5", 0), ("H2O", "0.5", 0)
CAM = [("CaM", "0.5", 0), ("CaM", "0.5", 1)]


@pytest.mark.parametrize(
    ("damage", "samples", "rows"),
    [
        (drop_samples, ["trec/trec-1"], [FULL, KVMERGER, H2O, *CAM]),
        (cut, ["lcc/lcc-2"], [H2O, FULL]),
        (drop_seed, [f"samsum/samsum-{i}" for i in range(3)], [CAM[1], FULL]),
        (
            lambda folder: prediction_path(folder, "qasper", "kvmerger@0.5").unlink(),
            [f"qasper/qasper-{i}" for i in range(3)],
            [KVMERGER, FULL],
        ),
        (
            lambda folder: drop_line(prediction_path(folder, "trec", "full@1"), 2),
            ["trec/trec-2"],
            [FULL],
        ),
    ],
    ids=["sample", "half a line", "seed", "cell", "full cell"],
)
def test_only_what_misses_its_line_runs_again_and_gives_the_same(
    tiny: Tiny,
    finished: Path,
    copy: Path,
    calls: Calls,
    damage: Callable[[Path], None],
    samples: list[str],
    rows: list[tuple[str, str, int]],
) -> None:
    damage(copy)
    run(tiny())
    assert calls.samples == samples
    assert calls.rows == [rows] * len(samples)
    assert_same_lines(read_lines(copy), read_lines(finished))


def test_a_finished_run_loads_no_model_and_changes_no_file(
    tiny: Tiny, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "load", lambda *_: pytest.fail("the model was loaded"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    run(tiny())
    run(tiny("limit=1", "cells=[h2o@0.5]", "benchmark.tasks=[trec]"))
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ("model.dtype=bfloat16", "another model.dtype: 'float32' then, 'bfloat16' now"),
        ("model.max_length=100", "another model.max_length: 3500 then, 100 now"),
        ("model.chat=none", "another model.chat"),
        ("model=llama2-7b-chat", r"another model\."),
        ("seed=1", "another seed: 0 then, 1 now"),
        ("decode_policy=hold", "another policy.decode_policy"),
    ],
)
def test_another_setting_is_refused_by_name_and_touches_nothing(
    tiny: Tiny, copy: Path, calls: Calls, given: str, setting: str
) -> None:
    before = read_lines(copy)
    cells = "cells=[full@1,h2o@0.5]"
    with pytest.raises(UserError, match=setting) as caught:
        run(tiny(given, cells, "benchmark.tasks=[trec]"))
    assert str(copy) in str(caught.value)
    assert calls.samples == []
    assert read_lines(copy) == before


@pytest.mark.usefixtures("copy")
def test_other_data_weights_or_code_are_refused(
    tiny: Tiny, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("trec", number, input="Who?") for number in range(3)]
    other = write_rows(tmp_path / "other", {"trec": rows})
    with pytest.raises(UserError, match=r"another data\.trec"):
        run(tiny("benchmark.tasks=[trec]", rows=other))
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    config = changed / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(UserError, match=r"another contents\.config\.json"):
        run(tiny(f"model.path={changed}"))
    change_module(monkeypatch, "kvmerge.session")
    with pytest.raises(UserError, match=r"another code\.kvmerge\.session"):
        run(tiny())


def change_module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a module have another digest than it has."""
    original = code.digest
    monkeypatch.setattr(code, "digest", lambda path: original(path) * (1 + (path == code._path(name))))


def test_another_method_makes_its_own_cells_stale_and_no_others(
    tiny: Tiny, copy: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_lines(copy)
    change_module(monkeypatch, "baselines.h2o")
    with pytest.raises(UserError, match=r"h2o@0\.5: baselines\.h2o has changed") as caught:
        run(tiny())
    assert "cam" not in str(caught.value)
    others = sorted(set(CELLS) - {"h2o@0.5"})
    run(tiny(f"cells=[{','.join(others)}]"))
    assert calls.samples == []
    assert_same_lines(read_lines(copy), before)

    jobs = left(tiny("stale=rerun")).jobs
    assert {cell.name for job in jobs for cell, _ in job.missing} == {"h2o@0.5"}
    assert_same_lines(read_lines(copy), before)

    run(tiny("stale=rerun"))
    assert {name for rows in calls.rows for name, *_ in rows} == {"H2O", "Full"}  # full: for KL
    assert_same_lines(read_lines(copy), before)
    kept = sorted(path.name for path in copy.rglob("*.stale-*"))
    assert kept == ["h2o@0.5.jsonl.stale-1"] * 4
    calls.samples.clear()
    run(tiny("stale=rerun"))
    assert calls.samples == []


@pytest.mark.usefixtures("copy")
def test_another_method_stands_in_no_way_of_other_cells_and_is_told(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny("cells=[full@1,kvmerger@0.5]")
    assert changed_beside(settings, run(settings)) == {}
    change_module(monkeypatch, "baselines.h2o")
    assert changed_beside(settings, run(settings)) == {"h2o@0.5": "baselines.h2o has changed"}
    assert changed_beside(tiny("cells=[h2o@0.5,cam@0.5]"), Results(settings.output_dir)) == {}


def test_a_cell_beside_whose_method_is_gone_is_told(tiny: Tiny, copy: Path) -> None:
    text = (copy / "run.json").read_text()
    (copy / "run.json").write_text(text.replace("cam@0.5", "kam@0.5"))
    found = changed_beside(tiny("cells=[full@1]"), Results(copy))
    assert list(found) == ["kam@0.5"]
    assert found["kam@0.5"].startswith("unknown method 'kam'. Did you mean 'cam'?")


def test_predictions_that_nothing_accounts_for_are_refused(tiny: Tiny, copy: Path) -> None:
    (copy / "run.json").unlink()
    with pytest.raises(UserError, match=r"predictions but no run\.json"):
        run(tiny())


@pytest.mark.usefixtures("copy")
def test_the_same_rows_elsewhere_are_the_same_data(
    tiny: Tiny, data: Path, tmp_path: Path, calls: Calls
) -> None:
    run(tiny(rows=Path(shutil.copytree(data, tmp_path / "elsewhere"))))
    assert calls.samples == []


@pytest.mark.usefixtures("copy")
def test_the_same_checkpoint_elsewhere_is_the_same_model(
    tiny: Tiny, checkpoint: Path, tmp_path: Path, calls: Calls
) -> None:
    run(tiny(f"model.path={shutil.copytree(checkpoint, tmp_path / 'moved')}"))
    assert calls.samples == []


def dated(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Let the tokenizer's chat template write a date."""

    def loaded(*given: Any, **named: Any) -> Any:
        tokenizer = load_tokenizer(*given, **named)
        tokenizer.chat_template = f"Today is {day}. {tokenizer.chat_template}"
        return tokenizer

    monkeypatch.setattr(loading, "load_tokenizer", loaded)


@pytest.mark.parametrize(
    ("more", "sample"),
    [(["limit=2"], "qasper-0"), (["cells=[full@1,h2o@0.5]"], "qasper-0")],
    ids=["another sample", "another cell"],
)
def test_prompts_that_are_others_today_are_not_added(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, calls: Calls, more: list[str], sample: str
) -> None:
    given = {"benchmark.tasks": "[qasper]", "cells": "[full@1]", "limit": "1"}
    given |= {"model.chat": "template"}
    dated(monkeypatch, "Monday")
    run(tiny(*(f"{name}={value}" for name, value in given.items())))
    calls.samples.clear()
    given |= dict(text.split("=", 1) for text in more)
    overrides = [f"{name}={value}" for name, value in given.items()]
    dated(monkeypatch, "Tuesday")
    with pytest.raises(UserError, match=rf"task qasper, sample '{sample}': .*date.*another output_dir"):
        run(tiny(*overrides))
    assert calls.samples == []
    dated(monkeypatch, "Monday")
    run(tiny(*overrides))
    assert calls.samples


def test_lines_of_one_sample_with_different_prompts_are_refused(tiny: Tiny, copy: Path) -> None:
    path = prediction_path(copy, "trec", "h2o@0.5")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["prompt_hash"] = "0" * 16
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"task trec, sample 'trec-1' .*different prompts"):
        run(tiny())


def test_cells_tasks_samples_and_seeds_can_be_added(tiny: Tiny, calls: Calls, finished: Path) -> None:
    first = tiny("cells=[cam@0.5]", "benchmark.tasks=[trec]", "limit=1", "num_seeds=1")
    run(first)
    calls.samples.clear()
    calls.rows.clear()

    run(tiny("cells=[cam@0.5]", "benchmark.tasks=[trec]", "limit=2", "num_seeds=1"))
    assert calls.samples == ["trec/trec-1"]
    run(tiny("cells=[cam@0.5]", "benchmark.tasks=[trec]", "limit=2"))
    assert calls.samples[1:] == ["trec/trec-0", "trec/trec-1"]
    assert calls.rows[1:] == [[CAM[1]], [CAM[1]]]
    run(tiny("cells=[h2o@0.5]", "benchmark.tasks=[lcc]", "limit=1"))
    assert calls.samples[3:] == ["lcc/lcc-0"]

    info = json.loads((first.output_dir / "run.json").read_text())
    assert info["cells"] == ["cam@0.5", "h2o@0.5"]
    assert list(info["tasks"]) == ["trec", "lcc"]
    assert set(info["fingerprint"]["data"]) == {"trec", "lcc"}
    assert len(info["runs"]) == 4
    counted = summary(first.output_dir)[["method", "task", "n"]].values.tolist()
    assert counted == [["cam", "trec", "2"], ["h2o", "lcc", "1"]]

    run(tiny("fidelity=false"))
    everything = read_lines(first.output_dir)
    assert everything.keys() == read_lines(finished).keys()
    for key, line in read_lines(finished).items():
        assert everything[key]["prediction"] == line["prediction"]


# batches


@pytest.mark.parametrize(("given", "sizes"), [("1", [1] * 12), ("2", [2, 1] * 4), ("auto", [3] * 4)])
def test_batches_of_any_size_give_the_same_lines(
    tiny: Tiny, finished: Path, calls: Calls, given: str, sizes: list[int]
) -> None:
    settings = tiny(f"batch_size={given}")
    run(settings)
    assert calls.batches == sizes  # never samples of two tasks
    assert_same_lines(read_lines(settings.output_dir), read_lines(finished))


def test_a_batch_that_does_not_fit_is_halved_and_run_again(
    tiny: Tiny,
    finished: Path,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    counted = harness.answering.run_samples

    def small(model: Any, requests: Sequence[Any], stop: Any) -> Any:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return counted(model, requests, stop)

    shrink = BatchSize.shrink

    def shrunk(size: BatchSize, used: int) -> None:
        # An error that is still handled keeps its frames, and they keep what did not fit.
        assert sys.exc_info() == (None, None, None)
        shrink(size, used)

    monkeypatch.setattr(BatchSize, "shrink", shrunk)
    monkeypatch.setattr(harness.answering, "run_samples", small)
    settings = tiny()
    run(settings)
    assert caplog.messages.count("out of memory with 3 samples at once; going on with 1") == 1
    assert calls.batches == [1] * 12
    assert_same_lines(read_lines(settings.output_dir), read_lines(finished))


@pytest.mark.parametrize("given", ["auto", "1", "3"])
def test_memory_that_cannot_do_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(harness.answering, "run_samples", full)
    size = "1" if given == "auto" else given
    with pytest.raises(UserError, match=f"out of memory with batch_size={size} on cpu.*resumes"):
        run(tiny(f"batch_size={given}"))


# what goes wrong in the middle


def test_a_killed_process_loses_at_most_the_sample_it_was_at(
    tiny: Tiny, calls: Calls, checkpoint: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows", {"lcc": [row("lcc", number) for number in range(16)]})
    out = tmp_path / "out"
    given = [
        f"model.path={checkpoint}",
        "benchmark=longbench",
        f"benchmark.data_dir={rows}",
        "benchmark.tasks=[lcc]",
        f"output_dir={out}",
        "cells=[full@1,h2o@0.5]",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *given, "batch_size=1"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    path = prediction_path(out, "lcc", "h2o@0.5")
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()

    before = {path: path.read_bytes() for path in out.glob("predictions/*/*")}
    done = min(content.count(b"\n") for content in before.values())
    assert 3 <= done < 16, "killed in the middle"
    run(tiny(*given))
    assert len(calls.samples) == 16 - done
    for path, content in before.items():
        whole = content[: content.rfind(b"\n") + 1]
        assert path.read_bytes().startswith(whole)
    assert len(read_lines(out)) == 32
    assert load_run(out).info["runs"][-1]["seconds"] > 0


def test_a_malformed_row_is_named_and_what_is_finished_stays(
    tiny: Tiny, tmp_path: Path, calls: Calls
) -> None:
    rows = write_rows(tmp_path / "rows", {"trec": [row("trec", number) for number in range(3)]})
    run(tiny("benchmark.tasks=[trec]", rows=rows))
    before = read_lines(tmp_path / "out")
    assert len(before) == 15
    calls.samples.clear()

    path = rows / "trec.jsonl"
    good = path.read_text()
    first, second, third = good.splitlines(keepends=True)
    path.write_text(f"{first}{second[:40]}\n{third}")
    with pytest.raises(UserError, match=f"{path}, line 2: not valid JSON"):
        run(tiny("benchmark.tasks=[trec]", rows=rows))
    assert read_lines(tmp_path / "out") == before
    path.write_text(good)
    run(tiny("benchmark.tasks=[trec]", rows=rows))
    assert calls.samples == []


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("cam@0.01", "CaM needs at least 1 recent token"),
        ("kvmerger@0.01", "KVMerger needs a budget of"),
    ],
)
def test_a_prompt_too_short_for_a_method_names_task_and_sample(tiny: Tiny, cell: str, why: str) -> None:
    with pytest.raises(UserError, match=f"task trec, sample 'trec-0' .*prompt tokens.*{why}"):
        run(tiny("benchmark.tasks=[trec]", f"cells=[{cell}]"))


def test_a_full_disk_is_told_and_the_run_resumes(
    tiny: Tiny, finished: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny("benchmark.tasks=[trec]")
    synced = os.fsync
    left = [10]  # run.json, two prompts, and seven lines: the five of trec-0 first

    def sync(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(file)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(UserError, match="the disk is full: sample 'trec-1'"):
        run(settings)
    lines = read_lines(settings.output_dir)
    assert len(lines) == 7
    monkeypatch.setattr(os, "fsync", synced)
    calls.rows.clear()
    run(settings)
    assert calls.rows == [[H2O, *CAM, FULL], [FULL, KVMERGER, H2O, *CAM]]
    wanted = {key: line for key, line in read_lines(finished).items() if key[0] == "trec"}
    assert_same_lines(read_lines(settings.output_dir), wanted)


# records that contradict each other


def test_samples_of_two_minds_are_refused_and_run_again_once_repaired(
    tiny: Tiny, copy: Path, finished: Path
) -> None:
    path = prediction_path(copy, "trec", "h2o@0.5")
    first, *others = path.read_text(encoding="utf-8").splitlines(keepends=True)
    other = json.dumps(json.loads(first) | {"prediction": "something else"}) + "\n"
    path.write_text("".join([first, *others, other]), encoding="utf-8")
    with pytest.raises(UserError, match=r"lines 1, 4 are all of .*'trec-0'.*differ in prediction"):
        run(tiny())
    assert list(repair(copy))
    run(tiny())
    assert_same_lines(read_lines(copy), read_lines(finished))


# shards


def test_shards_together_give_the_summary_of_an_unsharded_run(
    tiny: Tiny, copy: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    for shard in range(2):
        settings = tiny(f"shard={shard}", "num_shards=2", folder=sharded)
        run(settings)
        assert settings.results_dir.is_relative_to(sharded)
    assert not (sharded / "predictions").exists()
    found, wanted = summary(sharded), summary(copy)
    # Batches of other samples round otherwise.
    for frame in (found, wanted):
        frame["kl_to_full"] = frame["kl_to_full"].astype(float).round(5)
    pd.testing.assert_frame_equal(found, wanted)


def test_a_shard_without_samples_does_not_spoil_the_others(tiny: Tiny, tmp_path: Path) -> None:
    for shard in range(2):
        run(tiny("limit=1", f"shard={shard}", "num_shards=2", "benchmark.tasks=[trec]"))
    assert set(summary(tmp_path / "out")["n"]) == {"1"}


def test_a_shard_without_samples_of_an_added_task_follows_the_others(
    tiny: Tiny, tmp_path: Path
) -> None:
    rows = {"trec": [row("trec", 0), row("trec", 1)], "lcc": [row("lcc", 0)]}
    folder = write_rows(tmp_path / "rows", rows)
    for task in ("trec", "lcc"):
        for shard in range(2):
            tasks = f"benchmark.tasks=[{task}]"
            run(tiny(tasks, "cells=[h2o@0.5]", f"shard={shard}", "num_shards=2", rows=folder))
    assert list(summary(tmp_path / "out")["n"]) == ["2", "1"]


@pytest.mark.usefixtures("copy")
def test_a_whole_run_and_shards_do_not_share_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds results of num_shards=1, so num_shards=2"):
        run(tiny("num_shards=2"))
    sharded = tmp_path / "sharded"
    run(tiny("limit=1", "num_shards=2", "benchmark.tasks=[trec]", folder=sharded))
    for num_shards in (1, 3):
        with pytest.raises(UserError, match=rf"num_shards=2, so num_shards={num_shards} cannot"):
            run(tiny(f"num_shards={num_shards}", folder=sharded))


def test_a_run_says_which_layers_its_budgets_count():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    gemma = AutoConfig.for_model("gemma2", layer_types=kinds, num_hidden_layers=3, sliding_window=16)
    (note,) = counted_layers(gemma)
    assert note.startswith(
        "Budgets and kept entries count 1 of 3 layers; the others keep a window of 16"
    )
    assert counted_layers(AutoConfig.for_model("llama")) == []
