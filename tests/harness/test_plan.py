from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from harness.plan import print_plan
from harness.runner import run
from harness.settings import Settings
from kvmerge.errors import UserError
from kvmerge.models import Shape
from tests.tiny_run import compose, row, write_rows

Tiny = Callable[..., Settings]


def plan(settings: Settings) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_plan(settings, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells_of(line: str) -> list[str]:
    return [part.strip() for part in line.strip("│ ").split("│")]


def task_rows(text: str) -> dict[str, list[str]]:
    rows = [cells_of(line) for line in text.splitlines() if line.startswith("│")]
    return {name: rest for name, *rest in rows}


def test_a_plan_counts_samples_and_answers_with_their_seeds(tiny: Tiny) -> None:
    text = plan(tiny("limit=2"))
    rows = task_rows(text)
    assert list(rows) == ["qasper", "trec", "samsum", "lcc"]
    for samples, answers, _, longest in rows.values():
        assert (samples, answers) == ("2", "10")  # full, kvmerger, h2o, and cam with two seeds
        assert int(longest) in (128, 64)
    assert "cells: full@1, kvmerger@0.5, h2o@0.5, cam@0.5" in text


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
    monkeypatch.setattr("harness.runner.load", lambda spec: pytest.fail("the model was loaded"))
    settings = tiny("num_shards=2")
    before = sorted(tmp_path.rglob("*"))
    plan(settings)
    assert sorted(tmp_path.rglob("*")) == before
    assert not settings.output_dir.exists()


def test_cost_is_that_of_one_prefill_a_sample(tmp_path: Path) -> None:
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
    model = replace(settings.model, shape=Shape(parameters=1e9, layers=4, kv_heads=2, head_dim=8))
    text = plan(replace(settings, model=model))
    assert task_rows(text)["lcc"] == ["2", "6", "2,000", "64"]
    assert "4,000 tokens, about 8.0 TFLOP" in text  # 2 operations a weight and token
    assert "at most 128 steps, each reading 1.86 GiB" in text
    assert "0.2 KiB a token" in text  # 4 layers x 2 heads x 8 x (K and V) x 2 bytes = 256


def test_the_longest_prompt_is_told_in_tokens(tmp_path: Path) -> None:
    write_rows(tmp_path, {"lcc": [row("lcc", 0, context="x" * 3_500)]})
    settings = compose(
        "benchmark=longbench",
        "benchmark.tasks=[lcc]",
        f"benchmark.data_dir={tmp_path}",
        f"output_dir={tmp_path / 'out'}",
        "cells=[full@1]",
    )
    shape = Shape(parameters=1e9, layers=64, kv_heads=32, head_dim=64)
    text = plan(replace(settings, model=replace(settings.model, shape=shape)))
    tokens = int(task_rows(text)["lcc"][2].replace(",", ""))
    assert 1000 < tokens < 1100
    assert f"1,024.0 KiB a token, up to {tokens:,} MiB a sample" in text


def test_a_model_of_unknown_size_has_a_plan_without_cost(tiny: Tiny) -> None:
    text = plan(tiny("model.shape=null"))
    assert "cells:" in text
    assert "TFLOP" not in text


def test_a_plan_names_missing_data(tiny: Tiny, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", {"trec": [row("trec", 0)]})
    settings = tiny("benchmark.tasks=[trec]", rows=tmp_path / "rows")
    (tmp_path / "rows" / "trec.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"trec\.jsonl, line 1: missing field"):
        plan(settings)
