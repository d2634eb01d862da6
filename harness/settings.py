"""From the composed configuration to the validated parts of one run, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from benchmarks.metrics import check_found
from benchmarks.task import Benchmark, PromptFormat, Sample, Task
from harness.described import described
from harness.folders import cells_folder, named_folder
from harness.given import (
    JUDGED,
    OF_CELLS,
    Given,
    Observe,
    PlanOptions,
    SelfcheckOptions,
    Vary,
)
from harness.judgement import Judgement, judgement_from
from harness.overrides import GROUPS, read_overrides, told
from harness.sources import register
from kvmerge.cells import Cell, make_cell, parse_cell, parse_cells
from kvmerge.errors import UserError
from kvmerge.files import check_name
from kvmerge.models import ModelSpec
from kvmerge.places import OF_CLASSES, choices, config_dir, find
from kvmerge.resolve import build, method_settings
from kvmerge.schema import construct
from kvmerge.session import Policy, Row

if TYPE_CHECKING:
    from harness.executors.executor import Executor

Options = TypeVar("Options")
_OF_BENCHMARKS = [
    name for name in (*Benchmark.__annotations__, *vars(Benchmark)) if not name.startswith("_")
]
"""What the runner asks of a benchmark."""
FULL = "full@1"
"""The cell that others are compared with."""


def _listed() -> str:
    return "\n".join(f"{group}: {', '.join(choices(group))}" for group in sorted(GROUPS))


# What `--help` shows: Hydra's own list would also name the files that only serve others.
OmegaConf.register_new_resolver("kvmerge_choices", _listed, replace=True)
OmegaConf.register_new_resolver(
    "kvmerge_settings",
    lambda _root_: described(_root_, _root_.hydra.runtime.choices),
    replace=True,
)
register()


def compose(overrides: Sequence[str]) -> Settings:
    """Return the settings that `run.py` has with these overrides, for tools and tests.

    Hydra's global state, which a caller may be using itself, is as it was afterwards.

    Raises:
        UserError: for a choice, setting or value that does not exist or is not allowed.
    """
    words = read_overrides(overrides)
    hydra = GlobalHydra.instance()
    outer = hydra.hydra
    hydra.clear()
    try:
        with told(), initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = hydra_compose("config", words, return_hydra_config=True)
            choices = Choices.of(config.hydra)
            with open_dict(config):
                del config["hydra"]
            return settings_from(config, choices)
    finally:
        GlobalHydra.instance().hydra = outer


@dataclass(frozen=True)
class Choices:
    """What the configuration groups were set to, and which top-level keys the user gave."""

    by_group: Mapping[str, str]
    given: frozenset[str] = frozenset()

    @property
    def method(self) -> str:
        """The method."""
        return self.by_group["method"]

    @property
    def experiment(self) -> str | None:
        """The experiment, where one was chosen."""
        return self.by_group.get("experiment")

    @classmethod
    def of(cls, hydra: Any) -> Choices:
        """Read them from Hydra's own part of a composed configuration."""
        chosen = {
            group: str(hydra.runtime.choices[group])
            for group in GROUPS
            if hydra.runtime.choices.get(group) is not None
        }
        for group in OF_CLASSES:
            find(group, chosen[group])  # in two places Hydra would take the first, without a word
        words: Any = OmegaConf.to_container(
            hydra.overrides.task
        )  # unresolved: a word may hold a ${...}
        given = {str(word).lstrip("+").partition("=")[0] for word in words}
        return cls(chosen, frozenset(given))


@dataclass(frozen=True)
class Settings:
    """Everything one run needs."""

    kind: str
    """What is done with the rest (`harness.cli`)."""
    cells: list[Cell]
    """What answers; empty where the run observes."""
    model: ModelSpec
    benchmark: Benchmark
    executor: Executor
    """Where the samples are answered."""
    output_dir: Path
    seed: int
    num_seeds: int
    policy: Policy
    question: str
    """`inside` the prompt that is compressed, or `after` the compression of its context."""
    limit: int | None
    shard: int
    num_shards: int
    fidelity: bool
    batch_size: int | str
    """Samples run at once: a number, or `auto`."""
    judgement: Judgement
    """What the report judges by; no part of the measurement."""
    stale: str
    """`rerun` answers cells anew whose lines another version of their method made."""
    dry_run: bool
    plan: PlanOptions
    """What `dry_run` is asked for."""
    selfcheck: SelfcheckOptions | None
    """Where `kind` is `selfcheck`."""
    observe: Observe | None
    """Where `kind` is `observations`."""
    vary: Vary | None
    """Where `kind` is `noise`."""
    resolved: dict[str, Any]
    """The configuration as plain data, for provenance."""

    @property
    def prompt_format(self) -> PromptFormat:
        """The model's prompt format."""
        model = self.model
        return PromptFormat(model.max_length, model.chat, model.context, model.template_options)

    @property
    def results_dir(self) -> Path:
        """Where this run writes: `output_dir`, or its own folder below it when sharded."""
        if self.num_shards == 1:
            return self.output_dir
        return self.output_dir / "shards" / f"{self.shard}-of-{self.num_shards}"

    def row(self, cell: Cell, seed: int) -> Row:
        """Return what the engine runs for a cell and a seed."""
        return Row(cell.method, cell.budget, seed, cell=cell.name)

    def seeds(self, cell: Cell) -> list[int]:
        """Return the seeds that a cell runs with: one, unless its method draws."""
        return [self.seed + run for run in range(self.num_seeds if cell.method.stochastic else 1)]

    @property
    def rows(self) -> int:
        """Rows that a sample brings: one for each seed of each cell."""
        return sum(len(self.seeds(cell)) for cell in self.cells)

    def samples(self, task: Task) -> list[Sample]:
        """Return the samples of a task that this run takes."""
        return self.take(self.benchmark.samples(task))

    def take(self, samples: list[Sample]) -> list[Sample]:
        """Choose those of a task's samples that this run takes: the limit first, then the shard."""
        return samples[: self.limit][self.shard :: self.num_shards]


def settings_from(config: DictConfig, choices: Choices) -> Settings:
    """Validate a composed configuration, while Hydra is initialized.

    Raises:
        UserError: naming the setting.
    """
    with told():
        resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if "experiment" in resolved:
        raise UserError(
            f"experiment={choices.experiment}: its file must begin with `# @package _global_`, a line "
            "that makes what it sets settings of the run."
        )
    given = construct(Given, resolved)
    observe = _observe(given, choices)
    cells = [] if observe else _cells(given, choices)
    model: ModelSpec = build(given.model, "model")
    _check_kind("model", given.model, isinstance(model, ModelSpec), "a kvmerge.models.ModelSpec")
    if {"model.path"} <= choices.given and not {"model", "model.name"} & choices.given:
        # Not the default model's weights any more, so neither its name nor, unless given, its context.
        context = model.context if "model.context" in choices.given else None
        model = replace(model, name=Path(str(model.path)).absolute().name, context=context)
    benchmark: Benchmark = build(given.benchmark, "benchmark")
    lacking = ", ".join(name for name in _OF_BENCHMARKS if not hasattr(benchmark, name))
    _check_kind("benchmark", given.benchmark, not lacking, f"a benchmark: it lacks {lacking}")
    for task in benchmark.tasks:
        check_found(task.metric)
    check_name("model.name", model.name)
    check_name("benchmark.name", benchmark.name)
    if given.shard >= given.num_shards:
        raise UserError(
            f"shard={given.shard} must be below num_shards={given.num_shards}; shards count from 0."
        )
    return Settings(
        kind=given.kind,
        cells=cells,
        model=model,
        benchmark=benchmark,
        executor=_executor(given, choices),
        output_dir=_output_dir(given, resolved, choices, benchmark.name, model.name),
        seed=given.seed,
        num_seeds=given.num_seeds,
        policy=_policy(given, cells),
        question=given.question,
        limit=given.limit,
        shard=given.shard,
        num_shards=given.num_shards,
        fidelity=any(cell.is_full for cell in cells) if given.fidelity is None else given.fidelity,
        batch_size=given.batch_size,
        judgement=judgement_from(resolved),
        stale=given.stale,
        dry_run=given.dry_run,
        plan=_plan(given, choices),
        selfcheck=_uncompared(given, choices, "selfcheck", "selfcheck", SelfcheckOptions),
        observe=observe,
        vary=_uncompared(given, choices, "noise", "vary", Vary),
        resolved=resolved,
    )


def _executor(given: Given, choices: Choices) -> Executor:
    name = choices.by_group["executor"]
    if given.kind != "comparison" and name != "local":
        raise UserError(
            f"executor={name}: kind={given.kind} runs in one process. Leave executor out, or say "
            "executor=local."
        )
    executor: Executor = build(given.executor, "executor")
    return executor


def _check_kind(group: str, chosen: Mapping[str, Any], is_one: bool, kind: str) -> None:
    if not is_one:
        raise UserError(f"{chosen['_target_']} is not {kind} (docs/add_a_{group}.md).")


def _options(given: Given, kind: str, section: str, options: type[Options]) -> Options | None:
    """Return what a kind of run has of its own; None for the other kinds."""
    found: Mapping[str, Any] | None = getattr(given, section)
    if given.kind != kind:
        if found is not None:
            raise UserError(f"{section}=... belongs to kind={kind}, and kind={given.kind} was given.")
        return None
    if found is None:
        raise UserError(f"kind={kind} needs its options, {section}; experiment={kind} has them.")
    return construct(options, found, section)


def _uncompared(
    given: Given, choices: Choices, kind: str, section: str, options: type[Options]
) -> Options | None:
    """Return the options of a kind that compares no two methods, as `_options` does."""
    found = _options(given, kind, section, options)
    idle = _given_of(JUDGED, choices)
    if found is not None and idle:
        raise UserError(
            f"kind={kind} compares no two methods, so {' and '.join(idle)} cannot be given as well. "
            "Leave it out, or give it to the run that comes after."
        )
    return found


def _plan(given: Given, choices: Choices) -> PlanOptions:
    options = construct(PlanOptions, given.plan, "plan")
    idle = _given_of(("plan",), choices)
    if idle and not given.dry_run:
        raise UserError(f"{' and '.join(idle)} belongs to a plan. Give dry_run=true as well.")
    return options


def _observe(given: Given, choices: Choices) -> Observe | None:
    observe = _options(given, "observations", "observe", Observe)
    idle = _given_of(OF_CELLS, choices)
    if observe is not None and idle:
        raise UserError(
            f"kind=observations has a prefill and nothing else, so {' and '.join(idle)} cannot be "
            "given as well. Leave it out, or run another experiment to answer with cells."
        )
    return observe


def _given_of(settings: Collection[str], choices: Choices) -> list[str]:
    """Return which of some settings, or of their own, the user gave."""
    return sorted(key for key in choices.given if key.partition(".")[0] in settings)


def _cells(given: Given, choices: Choices) -> list[Cell]:
    if given.cells is None:
        defaults = method_settings(choices.method)
        options = {
            key: value
            for key, value in given.method.items()
            if key not in defaults or value != defaults[key]
        }
        full = choices.method == "full" and "budget" not in choices.given
        cell = make_cell(choices.method, options, 1 if full else given.budget)
        return [cell] if cell.is_full or given.baseline == "none" else [parse_cell(FULL), cell]
    clash = _given_of(("method", "budget", "baseline"), choices)
    if clash:
        chosen = f"experiment={choices.experiment}" if choices.experiment else "cells=[...]"
        raise UserError(
            f"{chosen} says what runs, so {' and '.join(clash)} cannot be given as well. "
            "Leave one of them out, or list cells=[method@budget,...] yourself."
        )
    return parse_cells(given.cells)


def _policy(given: Given, cells: Sequence[Cell]) -> Policy:
    policy = Policy(given.decode_policy, given.pos, tuple(given.layers_skip), given.skip_budget)
    for cell in cells:
        policy.check(cell.method)
    if given.question == "after":
        deciding = [cell.name for cell in cells if policy.decides(cell.method)]
        if given.kind == "selfcheck" or deciding:
            why = f"{', '.join(deciding)} would drop parts of it while decoding"
            raise UserError(
                "question=after stores the question whole, and "
                + (why if deciding else "a selfcheck holds prompts against published ones")
                + ". Leave it out"
                + (", or these cells, and use decode_policy=append." if deciding else ".")
            )
    without = [cell.name for cell in cells if not (cell.is_full or cell.method.holds)]
    if policy.decode_policy == "hold" and without:
        raise UserError(
            f"decode_policy=hold: {', '.join(without)} has no rule for evicting while decoding. "
            "Leave it out, or use decode_policy=append."
        )
    return policy


def _output_dir(
    given: Given, resolved: Mapping[str, Any], choices: Choices, benchmark: str, model: str
) -> Path:
    if given.output_dir is not None:
        if not given.output_dir:
            raise UserError("output_dir='' names no folder; give one, or null.")
        return Path(given.output_dir).expanduser()
    if given.vary is not None:
        return named_folder("noise", benchmark, model)  # whatever its cells: there the report looks
    if choices.experiment and "cells" not in choices.given:
        return named_folder(choices.experiment, benchmark, model)
    if given.observe is not None:
        return named_folder("observations", benchmark, model)
    names = {"benchmark": benchmark, "model": model}
    return cells_folder(resolved, choices.by_group, names)
