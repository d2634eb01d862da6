"""What the documentation shows is what happens."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from transformers.generation import GenerateDecoderOnlyOutput

from harness.runner import run
from kvmerge import Budget, compression, places, resolve
from kvmerge.cells import parse_cell
from kvmerge.comparison import COLUMNS
from kvmerge.engine import Stop, run_sample
from kvmerge.kvmerger import KVMerger
from kvmerge.models import load
from kvmerge.session import Row
from tests import tiny
from tests.own_parts import write
from tests.tiny_run import compose as settings_of
from tests.tiny_run import read_lines

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|yaml)\n(.*?)```", re.DOTALL)


@pytest.fixture
def method_page(tmp_path, monkeypatch):
    """The page's blocks by language, and a copy of the configuration for what it adds."""
    shutil.copytree(places.config_dir(), tmp_path / "configs")
    monkeypatch.setattr(places, "config_dir", lambda: tmp_path / "configs")
    text = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    blocks = {"python": [], "yaml": []}
    for language, block in BLOCK.findall(text):
        blocks[language].append(block)
    return blocks, tmp_path / "configs" / "method"


def test_the_example_of_add_a_method_runs(method_page, tmp_path, monkeypatch):
    blocks, folder = method_page
    (folder / "value_norm.yaml").write_text(blocks["yaml"][0], encoding="utf-8")
    (tmp_path / "value_norm.py").write_text(blocks["python"][0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import baselines

    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    try:
        method = resolve.load_method("value_norm", {"recent": 4})
        rows = [Row(method, Budget.parse(0.5))]
        results, _ = run_sample(tiny.shared_model(), tiny.prompt(40), rows, Stop(4, frozenset()))
        assert results[0].stats.entries == [[20, 20], [20, 20]]
        values = tiny.normal(1, 2, 40, 16)
        kept = sys.modules["baselines.value_norm"].keep(values, n_keep=20, recent=4)
    finally:
        sys.modules.pop("baselines.value_norm", None)
    assert kept[0, 0, -4:].tolist() == [36, 37, 38, 39]
    others = values[0, 0, :36].norm(dim=-1).argsort(descending=True)[:16].sort().values
    assert torch.equal(kept[0, 0, :16], others)


def test_a_variant_of_kvmerger_costs_two_lines_of_yaml(method_page):
    blocks, folder = method_page
    lines = [line for line in blocks["yaml"][1].splitlines() if not line.startswith("#")]
    assert len(lines) == 2
    (folder / "kvmerger_first.yaml").write_text(blocks["yaml"][1], encoding="utf-8")
    assert resolve.load_method("kvmerger_first") == KVMerger(pivot="first")
    assert parse_cell("kvmerger_first:top=0.1@0.35").method == KVMerger(pivot="first", top=0.1)
    with initialize_config_dir(str(folder.parent), version_base="1.3"):
        composed = compose("config", ["method=kvmerger_first"]).method
    assert resolve.build(composed) == KVMerger(pivot="first")


def test_the_model_of_add_a_model_runs_from_a_folder_of_ones_own(checkpoint, tmp_path):
    ((_, text),) = BLOCK.findall((ROOT / "docs" / "add_a_model.md").read_text(encoding="utf-8"))
    assert "path: my-org/my-llama" in text
    text = text.replace("my-org/my-llama", str(checkpoint)).replace("context: 8192", "context: 2048")
    write(tmp_path / "mine", {"model/my-llama.yaml": text})
    with places.config_dirs([str(tmp_path / "mine")]):
        settings = settings_of("model=my-llama", "benchmark=mini", "benchmark.tasks=[passkey]")
    assert settings.model.name == "my-llama"
    assert settings.model.max_length == 7500
    model, tokenizer = load(replace(settings.model, dtype="float32"))
    assert model.config.num_hidden_layers == 2
    assert len(tokenizer) > 0


def test_the_benchmark_of_add_a_benchmark_runs_from_a_folder_of_ones_own(
    checkpoint, tmp_path, monkeypatch
):
    page = (ROOT / "docs" / "add_a_benchmark.md").read_text(encoding="utf-8")
    (_, code), (_, config) = BLOCK.findall(page)
    write(tmp_path / "modules", {"my_benchmark.py": code})
    write(tmp_path / "mine", {"benchmark/capitals.yaml": config})
    monkeypatch.syspath_prepend(tmp_path / "modules")
    given = (f"model.path={checkpoint}", "cells=[full@1,h2o@0.5]", f"output_dir={tmp_path / 'out'}")
    try:
        with places.config_dirs([str(tmp_path / "mine")]):
            by_file = settings_of("benchmark=capitals", "question=after", *given)
            run(by_file)
        by_class = settings_of(
            "benchmark._target_=my_benchmark.Capitals", "benchmark.repeats=2", *given
        )
    finally:
        sys.modules.pop("my_benchmark", None)
    lines = read_lines(tmp_path / "out")
    assert len(lines) == 2 * 4
    assert {key[3] for key in lines} == {"France", "Japan", "Kenya", "Peru"}
    assert all(line["question_tokens"] > 0 for line in lines.values())
    assert by_class.benchmark.context.count("Paris") == 2


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/map.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/add_a_method.md",
        "docs/decisions.md",
        "docs/python.md",
    ],
)
def test_paths_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:kvmerge|baselines|benchmarks|harness|scripts|configs|docs|examples|tests|results)/[\w./-]*)`",
        text,
    )
    made_up = {
        "baselines/value_norm.py",
        "configs/method/value_norm.yaml",
        "configs/method/kvmerger_first.yaml",
    }
    in_a_wheel = {"kvmerge/configs", "harness/report/reference"}
    missing = {path for path in named if not (ROOT / path).exists()}
    assert named
    assert missing - made_up - in_a_wheel == set()


@pytest.mark.parametrize("group", ["method", "benchmark"])
def test_every_choice_stands_in_the_tables_of_using_it(group):
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    assert [name for name in places.choices(group) if f"`{name}`" not in text] == []


def test_every_page_is_in_the_site_s_navigation():
    pages: list[str] = []

    def collect(entries):
        for entry in entries:
            (target,) = entry.values()
            pages.append(target) if isinstance(target, str) else collect(target)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    # docs/site.py makes these
    made = {"index.md", "contributing.md", "changelog.md", "security.md"}
    own = {page for page in pages if page not in made and not page.startswith("reference/")}
    assert own == {path.name for path in (ROOT / "docs").glob("*.md")}
    assert len(pages) == len(set(pages))


@pytest.mark.parametrize("columns", [COLUMNS, compression.COLUMNS, compression.LAYER_COLUMNS])
def test_every_column_is_explained(columns):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [column for column in columns if f"`{column}`" not in text] == []


def test_the_blocks_of_from_python_run_one_after_the_other(checkpoint, capsys):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for there, here in {"Qwen/Qwen3-8B": str(checkpoint), "cuda": "cpu"}.items():
        assert f'"{there}"' in text
        text = text.replace(f'"{there}"', repr(here))
    if "cache" not in GenerateDecoderOnlyOutput.__annotations__:  # the page names what it was before
        text = re.sub(r"\bcache=", "past_key_values=", text).replace("out.cache", "out.past_key_values")
    names: dict[str, Any] = {}
    turns = []
    for _, block in BLOCK.findall(text):
        exec(compile(block, "docs/python.md", "exec"), names)
        if "c" in names:
            turns.append(names["c"].summary()[["turn", "compressed"]].values.tolist())
    assert turns[0] == [[1, True]]
    assert [[1, True], [2, True]] in turns  # each_turn
    assert turns[-1] == [[1, True], [2, False], [2, False]]  # two copies of a cache
    tokens = names["inputs"].input_ids.shape[1]
    assert names["kept"].keys.shape[2] == Budget.parse(0.35).entries(tokens)
    assert "budget_achieved" in capsys.readouterr().out
    assert names["table"].columns.tolist() == list(COLUMNS)


def test_the_commit_hook_runs_the_locked_ruff():
    hook = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    locked = re.search(r"^ruff==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert hook["repos"][0]["rev"] == f"v{locked[1]}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    assert sorted(phony) == sorted(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
