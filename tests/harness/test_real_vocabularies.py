"""Whole runs of every published model's configuration: random weights, its own tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.runner import run
from tests import tiny
from tests.real_tokenizers import TOKENIZERS, load_tokenizer, shared, tokenizer_folder
from tests.tiny_run import compose, read_lines

FAMILY = {"llama": "llama", "mistral": "mistral", "qwen2.": "qwen2", "qwen3": "qwen3"}
VOCABULARY = {"qwen2.5-7b-instruct": 152064, "qwen3-8b": 151936}
"""Logits of published weights that have more of them than the tokenizer has tokens."""
RUNS = [
    ("longbench", 400, ("multifieldqa_en", "trec"), True),
    ("longbench", 3400, ("multi_news", "lcc"), False),
    ("zero_scrolls", 400, ("qasper",), True),
    ("zero_scrolls", 3400, ("qasper",), False),
]
"""Benchmark, max_length, tasks (of LongBench, one with a wrap, one without), whether they are cut."""
CELLS = "cells=[full@1,kvmerger@0.35,h2o@0.35]"


@pytest.fixture(scope="module", params=TOKENIZERS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model's name and a random checkpoint of its architecture."""
    name: str = request.param
    source, folder = tokenizer_folder(name), tmp_path_factory.mktemp("real")
    family = next(kind for start, kind in FAMILY.items() if name.startswith(start))
    tokenizer = load_tokenizer(source)
    tiny.new_model(
        family,
        vocab_size=VOCABULARY.get(name, len(tokenizer)),
        hidden_size=32,
        head_dim=8,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        **({"sliding_window": 4096} if name.endswith("v0.1") else {"sliding_window": None}),
    ).save_pretrained(folder)
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    if isinstance(tokenizer.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    return name, folder


@pytest.mark.parametrize(("benchmark", "max_length", "tasks", "cut"), RUNS)
def test_a_run_is_fed_what_its_tokenizer_makes_and_keeps_its_budgets(
    model: tuple[str, Path],
    benchmark: str,
    max_length: int,
    tasks: tuple[str, ...],
    cut: bool,
    tmp_path: Path,
) -> None:
    name, folder = model
    settings = compose(
        f"model={name}",
        f"model.path={folder}",
        "model.dtype=float32",
        "model.context=4096",
        f"model.max_length={max_length}",
        f"benchmark={benchmark}",
        f"benchmark.data_dir={shared(benchmark)}",
        f"benchmark.tasks=[{','.join(tasks)}]",
        CELLS,
        "limit=1",
        f"output_dir={tmp_path / 'out'}",
    )
    run(settings)
    lines = read_lines(settings.results_dir)
    tokenizer = load_tokenizer(tokenizer_folder(name))
    for task in settings.benchmark.tasks:
        sample = settings.benchmark.samples(task)[0]
        ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
        plain = len(tokenizer(sample.prompt, verbose=False)["input_ids"])
        assert cut == (plain > max_length)
        assert len(ids) < max_length + 100 if cut else len(ids) >= plain
        found = {cell: line for (of, cell, *_), line in lines.items() if of == task.name}
        assert len(found) == 3
        for cell, line in found.items():
            assert line["prompt_tokens"] == len(ids)
            full = cell.startswith("full")
            assert line["kept_entries"] == (len(ids) if full else 35 * len(ids) // 100)
