"""From the composed configuration to the validated parts of one run, before any weight is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from benchmarks.task import Benchmark, PromptFormat, Sample, Task
from kvmerge.cells import Cell, file_name, make_cell, parse_cells
from kvmerge.errors import UserError, unknown
from kvmerge.models import ModelSpec
from kvmerge.resolve import build, choices, config_dir, method_settings
from kvmerge.session import Policy, Row

GROUPS = ("model", "method", "benchmark", "experiment")


def _listed() -> str:
    return "\n".join(f"{group}: {', '.join(choices(group))}" for group in sorted(GROUPS))


# What `--help` shows: Hydra's own list would also name the files that only serve others.
OmegaConf.register_new_resolver("kvmerge_choices", _listed, replace=True)


def compose(overrides: Sequence[str]) -> Settings:
    """Return the settings that `run.py` has with these overrides, for tools and tests.

    Hydra's global state, which a caller may be using itself, is as it was afterwards.

    Raises:
        UserError: for a choice, setting or value that does not exist or is not allowed.
    """
    check_choices(overrides)
    hydra = GlobalHydra.instance()
    outer = hydra.hydra
    hydra.clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = hydra_compose("config", list(overrides), return_hydra_config=True)
    except HydraException as error:
        raise UserError(str(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
    choices = Choices.of(config.hydra)
    with open_dict(config):
        del config["hydra"]
    return settings_from(config, choices)


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse group choices that do not exist, with what does and the nearest to it.

    Also what Hydra's grammar refuses without saying how to write it: a cell's options unquoted.
    """
    for override in overrides:
        group, separator, listed = override.partition("=")
        if group == "cells" and "=" in listed and not set("'\"") & set(listed):
            raise UserError(
                f"{override}: a cell with options needs quotes, as in "
                "\"cells=[full@1,'kvmerger:sigma=3@0.35']\"."
            )
        if not separator or group not in GROUPS:
            continue
        for name in listed.split(","):
            if name not in choices(group):
                raise unknown(group, name, choices(group))


@dataclass(frozen=True)
class Choices:
    """What the configuration groups were set to, and which top-level keys the user gave."""

    method: str
    experiment: str | None = None
    given: frozenset[str] = frozenset()

    @classmethod
    def of(cls, hydra: Any) -> Choices:
        """Read them from Hydra's own part of a composed configuration."""
        chosen = hydra.runtime.choices
        given = {text.lstrip("+").partition("=")[0] for text in hydra.overrides.task}
        return cls(str(chosen["method"]), chosen.get("experiment"), frozenset(given))


@dataclass(frozen=True)
class Settings:
    """Everything one run needs."""

    cells: list[Cell]
    model: ModelSpec
    benchmark: Benchmark
    output_dir: Path
    seed: int
    num_seeds: int
    policy: Policy
    limit: int | None
    shard: int
    num_shards: int
    fidelity: bool
    batch_size: int | str
    """Samples run at once: a number, or `auto`."""
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
        return Row(cell.method, cell.budget, seed)

    def seeds(self, cell: Cell) -> list[int]:
        """Return the seeds that a cell runs with: one, unless its method draws."""
        return [self.seed + run for run in range(self.num_seeds if cell.method.stochastic else 1)]

    def samples(self, task: Task) -> list[Sample]:
        """Return the samples of a task that this run takes."""
        return self.take(self.benchmark.samples(task))

    def take(self, samples: list[Sample]) -> list[Sample]:
        """Choose those of a task's samples that this run takes: the limit first, then the shard."""
        return samples[: self.limit][self.shard :: self.num_shards]


def settings_from(config: DictConfig, choices: Choices) -> Settings:
    """Validate a composed configuration. Raises `UserError` naming the setting."""
    cells = _cells(config, choices)
    model = build(config.model)
    if {"model.path"} <= choices.given and not {"model", "model.name"} & choices.given:
        # Not the default model's weights any more, so neither its name nor, unless given, its context.
        context = model.context if "model.context" in choices.given else None
        model = replace(model, name=Path(str(model.path)).name, context=context)
    benchmark = build(config.benchmark)
    seed = _whole(config, "seed", least=0)
    num_seeds = _whole(config, "num_seeds", least=1)
    num_shards = _whole(config, "num_shards", least=1)
    shard = _whole(config, "shard", least=0)
    if shard >= num_shards:
        raise UserError(f"shard={shard} must be below num_shards={num_shards}; shards count from 0.")
    limit = None if config.limit is None else _whole(config, "limit", least=1)
    fidelity = config.fidelity
    if fidelity is None:
        fidelity = any(cell.is_full for cell in cells)
    elif not isinstance(fidelity, bool):
        raise UserError(f"fidelity={fidelity!r} must be true, false or null.")
    output_dir = config.output_dir or _default_output_dir(cells, choices, benchmark.name, model.name)
    return Settings(
        cells=cells,
        model=model,
        benchmark=benchmark,
        output_dir=Path(str(output_dir)).expanduser(),
        seed=seed,
        num_seeds=num_seeds,
        policy=_policy(config, cells),
        limit=limit,
        shard=shard,
        num_shards=num_shards,
        fidelity=fidelity,
        batch_size="auto" if config.batch_size == "auto" else _whole(config, "batch_size", least=1),
        resolved=_plain(config),
    )


def _cells(config: DictConfig, choices: Choices) -> list[Cell]:
    if config.cells is None:
        settings = _plain(config.method)
        options = {
            key: value
            for key, value in settings.items()
            if value != method_settings(choices.method).get(key, object())
        }
        budget = config.budget
        if choices.method == "full" and "budget" not in choices.given:
            budget = 1
        return [make_cell(choices.method, options, budget)]
    clash = sorted(key for key in choices.given if key.partition(".")[0] in ("method", "budget"))
    if clash:
        chosen = f"experiment={choices.experiment}" if choices.experiment else "cells=[...]"
        raise UserError(
            f"{chosen} says what runs, so {' and '.join(clash)} cannot be given as well. "
            "Leave one of them out, or list cells=[method@budget,...] yourself."
        )
    cells = _plain_value(config.cells)
    if not isinstance(cells, list):
        raise UserError(f"cells={cells!r} must be a list, e.g. cells=[full@1,kvmerger@0.35].")
    return parse_cells(cells)


def _policy(config: DictConfig, cells: Sequence[Cell]) -> Policy:
    skip = _plain_value(config.layers_skip)
    layers = tuple(skip) if isinstance(skip, list) else skip
    policy = Policy(config.decode_policy, config.pos, layers, config.skip_budget)
    for cell in cells:
        policy.check(cell.method)
    without = [cell.name for cell in cells if not (cell.is_full or cell.method.holds)]
    if policy.decode_policy == "hold" and without:
        raise UserError(
            f"decode_policy=hold: {', '.join(without)} has no rule for evicting while decoding. "
            "Leave it out, or use decode_policy=append."
        )
    return policy


def _whole(config: DictConfig, key: str, least: int) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{key}={value!r} must be a whole number of {least} or more.")
    return value


def _default_output_dir(cells: Sequence[Cell], choices: Choices, benchmark: str, model: str) -> Path:
    if choices.experiment and "cells" not in choices.given:
        run = choices.experiment
    elif len(cells) == 1:
        run = file_name(cells[0].name)
    else:
        names = ",".join(cell.name for cell in cells)
        run = f"cells-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    return Path("results") / "runs" / run / benchmark / model


def _plain_value(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
