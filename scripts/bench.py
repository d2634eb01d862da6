"""Time the whole comparison against transformers' own generate on the same samples.

    python -m scripts.bench --samples 4 --repeats 5

Both run in one process, in turn, so that the ratio of their medians survives a noisy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from harness.provenance import hardware, package_versions
from harness.settings import Choices, Settings, settings_from
from harness.summary import write_atomically
from kvmerge.engine import Stop, run_sample
from kvmerge.models import load
from kvmerge.resolve import config_dir
from kvmerge.session import Row

OUT = Path("results") / "bench"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table; JSON goes to results/bench/."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m scripts.bench")
    parser.add_argument("--experiment", default="mini", help="cells and benchmark to time")
    parser.add_argument("--samples", type=int, default=4, help="samples, one of each task in turn")
    parser.add_argument("--answer-tokens", type=int, default=24, help="tokens every answer has")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; medians are shown")
    options = parser.parse_args(argv)

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={options.experiment}"])
    settings = settings_from(config, Choices("kvmerger", options.experiment))
    model, tokenizer = load(settings.model)
    prompts = []
    for index in range(options.samples):
        task = settings.benchmark.tasks[index % len(settings.benchmark.tasks)]
        sample = settings.benchmark.samples(task)[index // len(settings.benchmark.tasks)]
        ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
        prompts.append(torch.tensor([ids], device=model.device))
    figures = measure(settings, model, prompts, options.answer_tokens, options.repeats)
    _show(figures)
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomically(OUT / "comparison.json", json.dumps(figures, indent=2) + "\n")
    return 0


def measure(
    settings: Settings,
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    answer_tokens: int,
    repeats: int,
) -> dict[str, object]:
    """Seconds over all prompts: `generate`, one full row, and all cells; in turn, `repeats` times."""
    rows = [settings.row(cell, settings.seed) for cell in settings.cells]
    full = [row for row, cell in zip(rows, settings.cells, strict=True) if cell.is_full]
    stop = Stop(answer_tokens, frozenset())

    def generate() -> None:
        for ids in prompts:
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=answer_tokens,
                min_new_tokens=answer_tokens,
                do_sample=False,
            )

    def engine(chosen: Sequence[Row]) -> None:
        for ids in prompts:
            run_sample(model, ids, chosen, stop)

    runs = {
        "generate": generate,
        "engine, full cache alone": lambda: engine(full),
        f"engine, {len(rows)} cells": lambda: engine(rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(repeats + 1):
        for name, action in runs.items():
            started = time.perf_counter()
            action()
            if attempt:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "ratio_to_generate": {name: value / medians["generate"] for name, value in medians.items()},
        "prompt_tokens": [ids.shape[1] for ids in prompts],
        "answer_tokens": answer_tokens,
        "cells": [cell.name for cell in settings.cells],
        "model": settings.model.name,
        "dtype": settings.model.dtype,
        "hardware": hardware(),
        "packages": package_versions(),
    }


def _show(figures: dict[str, object]) -> None:
    seconds, ratios = figures["seconds"], figures["ratio_to_generate"]
    assert isinstance(seconds, dict)
    assert isinstance(ratios, dict)
    tokens = figures["prompt_tokens"]
    machine = figures["hardware"]
    assert isinstance(tokens, list)
    assert isinstance(machine, dict)
    table = Table(title="Median seconds over all samples")
    for column in ("run", "median s", "min s", "max s", "ratio to generate"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, values in seconds.items():
        spread = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.2f}" for value in spread), f"{ratios[name]:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{figures['model']}, {figures['dtype']}, {len(tokens)} prompts of {min(tokens)} to "
        f"{max(tokens)} tokens, {figures['answer_tokens']} answer tokens, fidelity off, "
        f"{machine['threads']} threads on {machine['cpu']}.",
        highlight=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
