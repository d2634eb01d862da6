from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from harness.answering import Job
from harness.plan.calibration import keep
from harness.plan.show import print_plan
from harness.plan.tokens import _estimated, count_tokens
from harness.runner import left, run
from harness.settings import Settings
from kvmerge.errors import UserError
from kvmerge.models import Outline, Shape
from tests.harness.plan.test_calibration import KNOWN
from tests.real_tokenizers import TOKENIZERS, shared
from tests.tiny_run import compose, read_lines, row, write_rows

Tiny = Callable[..., Settings]


def plan(settings: Settings) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_plan(settings, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def unseen(monkeypatch: pytest.MonkeyPatch, settings: Settings, shape: Shape | None) -> str:
    """The plan of a model whose files are not at hand, so that its shape is all that is known."""
    monkeypatch.setattr("harness.ready.outline", lambda *_, **__: Outline(None, None))
    return plan(replace(settings, model=replace(settings.model, shape=shape)))


def cells_of(line: str) -> list[str]:
    return [part.strip() for part in line.strip("│ ").split("│")]


def task_rows(text: str) -> dict[str, list[str]]:
    """The rows of the first table."""
    first = text.partition("└")[0]
    rows = [cells_of(line) for line in first.splitlines() if line.startswith("│")]
    return {name: rest for name, *rest in rows}


def test_a_plan_counts_samples_and_answers_with_their_seeds(tiny: Tiny) -> None:
    text = plan(tiny("limit=2"))
    rows = task_rows(text)
    assert list(rows) == ["qasper", "trec", "samsum", "lcc", "all"]
    assert rows.pop("all")[:2] == ["8", "40"]
    for samples, answers, _, longest in rows.values():
        assert (samples, answers) == ("2", "10")  # full, kvmerger, h2o, and cam with two seeds
        assert int(longest) in (128, 64)
    assert "cells: full@1, kvmerger@0.5, h2o@0.5, cam@0.5" in text


def test_a_plan_counts_the_tokens_that_the_run_then_feeds(tiny: Tiny) -> None:
    settings = tiny("cells=[full@1]", "limit=2")
    planned = count_tokens(settings, left(settings))
    text = plan(settings)
    run(settings)
    fed: dict[str, list[int]] = {}
    for (task, *_), line in read_lines(settings.output_dir).items():
        fed.setdefault(task, []).append(line["prompt_tokens"])
    assert {task.name: list(tokens.counted) for task, tokens in planned.items()} == fed
    assert "prompt tokens: counted with the model's tokenizer\n" in text
    assert f"{sum(map(sum, fed.values())):,} tokens, about" in text


def test_a_plan_of_many_samples_counts_a_part_and_says_how_far_off_it_may_be(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("lcc", number, context="x" * (50 + 7 * number)) for number in range(40)]
    settings = tiny("benchmark.tasks=[lcc]", rows=write_rows(tmp_path / "rows", {"lcc": rows}))
    (everything,) = count_tokens(settings, left(settings)).values()
    assert (everything.error, len(everything.counted)) == (0, 40)
    monkeypatch.setattr("harness.plan.tokens._CHARACTERS", sum(everything.counted) // 3)
    (part,) = count_tokens(settings, left(settings)).values()
    assert 5 <= len(part.counted) < 20
    assert abs(part.total - everything.total) <= part.error
    text = plan(settings)
    assert f"in {len(part.counted)} of 40 samples" in text
    assert f"± {round(part.error):,} tokens" in text


def test_without_its_tokenizer_prompts_are_estimated_and_the_plan_says_so(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny("benchmark.tasks=[trec]")
    nothing = Outline(None, None, download="owner/name (13.48 GB)")
    monkeypatch.setattr("harness.ready.outline", lambda *_, **__: nothing)
    text = plan(settings)
    assert "estimated by their characters" in text
    assert "a run downloads first: owner/name (13.48 GB)" in text
    (tokens,) = count_tokens(settings, left(settings)).values()
    prompts = [sample.prompt for sample in settings.samples(settings.benchmark.tasks[0])]
    assert list(tokens.counted) == [round(len(prompt) / 4.3) for prompt in prompts]


@pytest.mark.parametrize("benchmark", ["longbench", "mini"])
@pytest.mark.parametrize("model", sorted(set(TOKENIZERS.values())))
def test_estimates_are_as_good_as_they_say(model: str, benchmark: str) -> None:
    """Of texts without Chinese, where the models' own tokenizers are beside the repository."""
    tokenizer = Tokenizer.from_file(str(shared("tokenizers", model) / "tokenizer.json"))
    data = [f"benchmark.data_dir={shared('longbench')}"] if benchmark == "longbench" else []
    settings = compose(f"benchmark={benchmark}", *data, "limit=2", "model.max_length=1000000")
    chinese = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    errors = []
    for task in settings.benchmark.tasks:
        jobs = [Job(task, sample, ()) for sample in settings.samples(task)]
        wanted = sum(len(tokenizer.encode(job.sample.prompt).ids) for job in jobs)
        if task.name not in chinese:
            errors.append(abs(sum(_estimated(settings, job).tokens for job in jobs) / wanted - 1))
    assert max(errors) < 0.5
    assert sum(errors) / len(errors) < 0.2


def test_a_plan_leaves_out_what_is_done(tiny: Tiny) -> None:
    run(tiny("benchmark.tasks=[trec]", "limit=1", "cells=[h2o@0.5]"))
    rows = task_rows(plan(tiny("benchmark.tasks=[trec]", "cells=[full@1,h2o@0.5]")))
    assert rows["trec"][:2] == ["3", "5"]
    done = plan(tiny("benchmark.tasks=[trec]", "limit=1", "cells=[h2o@0.5]"))
    assert "nothing left to run" in done
    assert "TFLOP" not in done


def test_a_plan_writes_nothing_and_loads_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.executors.worker.load", lambda *_: pytest.fail("the model was loaded"))
    settings = tiny("num_shards=2")
    before = sorted(tmp_path.rglob("*"))
    plan(settings)
    assert sorted(tmp_path.rglob("*")) == before
    assert not settings.output_dir.exists()


def test_cost_is_that_of_one_prefill_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("lcc", number, context="x" * 35_000) for number in range(2)]
    write_rows(tmp_path, {"lcc": rows})
    settings = compose(
        "benchmark=longbench",
        "benchmark.tasks=[lcc]",
        f"benchmark.data_dir={tmp_path}",
        f"output_dir={tmp_path / 'out'}",
        "model.max_length=2000",
        "model.dtype=bfloat16",
        "cells=[full@1,h2o@0.5,kvmerger@0.5]",
    )
    shape = Shape(parameters=1e9, layers=4, kv_heads=2, head_dim=8)
    text = unseen(monkeypatch, settings, shape)
    assert task_rows(text)["lcc"] == ["2", "6", "2,000", "64"]
    assert "4,000 tokens, about 8.0 TFLOP" in text  # 2 operations a weight and token
    assert "at most 128 steps, each reading 1.9 GiB" in text
    assert "0.2 KiB a token" in text  # 4 layers x 2 heads x 8 x (K and V) x 2 bytes = 256


def test_the_longest_prompt_is_told_in_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, {"lcc": [row("lcc", 0, context="x" * 3_500)]})
    settings = compose(
        "benchmark=longbench",
        "benchmark.tasks=[lcc]",
        f"benchmark.data_dir={tmp_path}",
        f"output_dir={tmp_path / 'out'}",
        "cells=[full@1]",
    )
    shape = Shape(parameters=1e9, layers=64, kv_heads=32, head_dim=64)
    text = unseen(monkeypatch, settings, shape)
    tokens = int(task_rows(text)["lcc"][2].replace(",", ""))
    assert 0 < tokens < 1024
    assert f"1.0 MiB a token, up to {tokens}.0 MiB a sample" in text


def test_a_model_of_unknown_size_has_a_plan_without_cost(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = unseen(monkeypatch, tiny(), None)
    assert "cells:" in text
    assert "TFLOP" not in text


def test_a_plan_names_missing_data(tiny: Tiny, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", {"trec": [row("trec", 0)]})
    settings = tiny("benchmark.tasks=[trec]", rows=tmp_path / "rows")
    (tmp_path / "rows" / "trec.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"trec\.jsonl, line 1: missing field"):
        plan(settings)


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / "cache"))


def test_a_plan_says_how_to_learn_what_a_run_takes(tiny: Tiny, calibrated: None) -> None:
    text = plan(tiny())
    assert "`make calibrate-speed` does it in about two minutes" in text
    assert "plan.device=a100-80" in text


def test_a_plan_gives_time_memory_and_cost_as_a_range(tiny: Tiny, calibrated: None) -> None:
    settings = tiny("dry_run=true", "plan.price=3600", "limit=1")
    keep(settings.model, KNOWN)
    text = plan(settings)
    found = re.search(r"time: ([\d.]+) s, from ([\d.]+) s to ([\d.]+) s, loading included", text)
    assert found is not None
    likely, low, high = map(float, found.groups())
    assert low < likely < high
    cost = re.search(r"cost: ([\d.]+) \(([\d.]+) to ([\d.]+)\) at 3600 an hour and worker", text)
    assert cost is not None
    assert [round(float(each), 1) for each in cost.groups()] == pytest.approx(
        [likely, low, high], abs=0.11
    )  # a unit a second
    assert "by this machine, as it was calibrated, within 15%" in text
    assert "not measured: cam@0.5" in text


def test_workers_share_the_time_and_each_is_paid(tiny: Tiny, calibrated: None) -> None:
    settings = tiny("dry_run=true", "plan.device=l4", "plan.price=1")
    with_workers = replace(settings, resolved=settings.resolved | {"executor": {"workers": 4}})
    assert "on 4 workers" in plan(with_workers)
    assert " workers" not in plan(settings)


def test_the_cache_of_every_cell_is_told_by_task(tiny: Tiny) -> None:
    settings = tiny("cells=[full@1,h2o@0.5]", "limit=1")
    table = plan(settings).partition("cache of a sample")[2]
    rows = [cells_of(line) for line in table.splitlines() if line.startswith("│")]
    assert [name for name, *_ in rows[:4]] == ["qasper", "trec", "samsum", "lcc"]
    assert all(len(row) == 3 for row in rows[:4])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan.device=h200"], "unknown plan.device 'h200'. Did you mean 'h100'?"),
        (["plan.price=-1"], "plan.price=-1 must be a number of 0 or more"),
        (["plan.price=cheap"], "plan.price='cheap' must be a number or null"),
        (["plan.devise=h100"], "unknown setting of plan 'devise'. Did you mean 'device'?"),
    ],
)
def test_a_plan_refuses_what_it_cannot_be_made_for(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        compose("dry_run=true", *words)
    assert told in str(refused.value)


def test_a_plan_for_a_card_names_cells_of_whose_methods_nothing_is_known(tiny: Tiny) -> None:
    cells = "cells=[full@1,h2o@0.5,'tests.kvmerge.test_check.Sound@0.5']"
    text = " ".join(plan(tiny("dry_run=true", "plan.device=l4", cells)).split())
    assert "not measured: tests.kvmerge.test_check.Sound@0.5; compression is taken for 1% to" in text


@pytest.mark.parametrize("word", ["plan.device=h100", "plan.price=2"])
def test_what_only_a_plan_reads_is_refused_without_one(word: str) -> None:
    with pytest.raises(UserError, match="belongs to a plan"):
        compose(word)
