"""Every file under configs/ composes, and what it names can be built."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from harness.given import Observe, Vary
from harness.settings import GROUPS, Settings
from harness.variants import UNPACKED
from kvmerge import resolve
from kvmerge.cells import parse_cell, parse_cells
from kvmerge.errors import UserError
from kvmerge.kernels.forced import KERNELS
from kvmerge.method import Method
from kvmerge.models import DTYPES, ModelSpec
from kvmerge.places import choices, config_dir
from kvmerge.resolve import load_method, method_settings
from tests.tiny_run import compose as settings

FILES = [(group, name) for group in GROUPS for name in choices(group)]
OBSERVING = ["observations"]
ANSWERING = [name for name in choices("experiment") if name not in OBSERVING]
"""Experiments by what they do: those that observe have no cells."""


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", list(overrides))


def test_every_group_is_guarded_by_the_command_line() -> None:
    assert {group for group, _ in FILES} <= {*GROUPS, "launcher"}
    assert all(choices(group) for group in GROUPS)


@pytest.mark.parametrize(("group", "name"), FILES, ids=map("/".join, FILES))
def test_every_choice_composes_without_gaps(group: str, name: str) -> None:
    config = composed(f"{group}={name}")
    assert OmegaConf.missing_keys(config) == set()
    assert OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize(("group", "name"), FILES, ids=map("/".join, FILES))
def test_every_file_opens_with_a_comment_on_what_it_is(group: str, name: str) -> None:
    text = (config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.removeprefix("# @package _global_\n").startswith("# ")


@pytest.mark.parametrize("name", choices("method"))
def test_a_methods_file_lists_exactly_the_settings_of_its_class(name: str) -> None:
    method = load_method(name)
    assert isinstance(method, Method)
    given = method_settings(name)
    target = given.pop("_target_")
    assert f"{type(method).__module__}.{type(method).__qualname__}" == target
    own = [field.name for field in fields(method) if field.init]  # type: ignore[arg-type]
    assert sorted(given) == sorted(own)


@pytest.mark.parametrize("name", choices("method"))
def test_the_file_named_as_its_module_gives_the_classs_defaults(name: str) -> None:
    method = load_method(name)
    module = type(method).__module__
    of_class = [other for other in choices("method") if type(load_method(other)) is type(method)]
    if name == module.rpartition(".")[2] or of_class == [name]:
        assert method == type(method)()
    else:
        assert method != type(method)(), "another file of a class must change a setting"


def test_methods_are_frozen_so_that_no_state_can_leak() -> None:
    for name in choices("method"):
        method: Any = load_method(name)
        assert type(method).__dataclass_params__.frozen
        hash(method)


@pytest.mark.parametrize("name", choices("model"))
def test_a_models_file_builds_its_spec(name: str) -> None:
    spec = instantiate(composed(f"model={name}").model, _convert_="all")
    assert isinstance(spec, ModelSpec)
    assert spec.name == name
    assert spec.dtype in DTYPES
    assert spec.chat in ("template", "none") or "{prompt}" in spec.chat
    assert spec.shape is not None
    assert type(spec.stop) is list


def test_the_custom_benchmark_says_what_it_needs() -> None:
    needed = "benchmark.dataset=, benchmark.template=, benchmark.answers="
    with pytest.raises(UserError, match=needed):
        resolve.build(composed("benchmark=custom").benchmark)


@pytest.mark.parametrize("name", [name for name in choices("benchmark") if name != "custom"])
def test_a_benchmarks_file_builds_it_with_all_its_tasks(name: str) -> None:
    benchmark = instantiate(composed(f"benchmark={name}").benchmark, _convert_="all")
    assert benchmark.name == name
    names = [task.name for task in benchmark.tasks]
    assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("name", ANSWERING)
def test_an_experiment_has_cells_that_parse_and_its_own_output_dir(name: str) -> None:
    config = composed(f"experiment={name}")
    cells = parse_cells(config.cells)
    assert cells[0].is_full, "figures compare with the full cache"
    for text in config.cells:
        if "{" not in text:
            assert parse_cell(text).name == text, "written as results name it"
    run: Settings = settings(f"experiment={name}")
    assert run.fidelity
    assert run.output_dir.parts[:3] == ("results", "runs", name)


@pytest.mark.parametrize("name", OBSERVING)
def test_an_experiment_that_observes_lists_every_setting_with_its_default(name: str) -> None:
    config = composed(f"experiment={name}")
    assert config.cells is None
    assert list(config.observe) == [each.name for each in fields(Observe)]
    run: Settings = settings(f"experiment={name}")
    assert run.cells == []
    assert run.observe is not None
    assert run.output_dir.parts[:3] == ("results", "runs", name)
    for each in fields(Observe):
        given = getattr(run.observe, each.name)
        assert (tuple(given) if isinstance(given, list) else given) == each.default


def test_the_noise_experiment_lists_what_it_varies_and_takes_all_dtypes_and_kernels() -> None:
    config = composed("experiment=noise")
    assert list(config.vary) == [each.name for each in fields(Vary)]
    vary = settings("experiment=noise").vary
    assert vary is not None
    assert set(vary.dtypes) == set(DTYPES)
    assert set(vary.kernels) == {*KERNELS, UNPACKED}


def test_an_experiment_says_what_it_needs_and_leaves_the_model_open() -> None:
    for name in choices("experiment"):
        default = composed(f"experiment={name}")
        other = composed(f"experiment={name}", "model=llama2-7b-chat")
        assert default.model.name == "smollm2-135m"
        assert other.model.name == "llama2-7b-chat"
        assert other.cells == default.cells
        assert other.benchmark == default.benchmark


def test_each_of_kvmergers_readings_runs_in_an_experiment() -> None:
    options = {"budget_mode", "thresholds", "underfill", "linkage"}
    cells = [cell for name in ANSWERING for cell in parse_cells(composed(f"experiment={name}").cells)]
    tried = {pair for cell in cells for pair in cell.options if pair[0] in options}
    assert {
        ("budget_mode", "eps_free"),
        ("budget_mode", "eps_evict"),
        ("budget_mode", "eps_layer"),
        ("underfill", "keep"),
        ("linkage", "adjacent"),
        ("linkage", "complete"),
    } <= tried


def test_the_papers_table_has_its_nine_tasks_and_budgets() -> None:
    config = composed("experiment=paper_longbench")
    assert set(config.benchmark.tasks) == {
        "2wikimqa",
        "gov_report",
        "narrativeqa",
        "passage_retrieval_en",
        "multifieldqa_en",
        "trec",
        "multi_news",
        "triviaqa",
        "qasper",
    }
    budgets = {str(cell.budget) for cell in parse_cells(config.cells)}
    assert budgets == {"1", "0.5", "0.35"}


def test_no_choice_is_named_as_a_file_of_another_spelling() -> None:
    for _, name in FILES:
        assert name == name.lower()
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789_-.")


@pytest.mark.parametrize("name", choices("method"))
def test_hydra_and_the_python_api_read_the_same_settings_of_a_method(name: str) -> None:
    composed_method = OmegaConf.to_container(composed(f"method={name}").method)
    assert isinstance(composed_method, dict)
    assert list(composed_method.items()) == list(method_settings(name).items()), "in the same order"


def test_files_that_serve_others_are_no_choices() -> None:
    serving = [path.stem for path in config_dir().glob("*/_*.yaml")]
    assert serving
    for group in GROUPS:
        assert not set(choices(group)) & set(serving)


def test_a_file_is_read_once_however_often_its_method_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    load = OmegaConf.load

    def counted(path: Path) -> Any:
        reads.append(path.name)
        return load(path)

    monkeypatch.setattr(resolve.OmegaConf, "load", counted)
    resolve._load.cache_clear()
    for _ in range(3):
        parse_cells(["h2o@0.5", "h2o@0.35", "kvmerger@0.5", "kvmerger_log:top=0.1@0.5"])
    assert sorted(reads) == ["h2o.yaml", "kvmerger.yaml", "kvmerger_log.yaml"]
