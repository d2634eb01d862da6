"""Measure this machine's speed with a model, in about two minutes, for plans (`dry_run=true`).

    python -m scripts.calibrate_speed
    python -m scripts.calibrate_speed model=llama2-7b-chat "cells=[full@1,'kvmerger:linkage=scan@0.35']"

Prompts of three lengths are answered with few rows and with many, and one layer is compressed by every
method that ships and by those of the cells. Overrides are those of run.py; `make calibrate-speed` takes
them as ARGS. What was measured is kept in the cache folder (docs/cost.md).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.texts import read_text
from harness.batching import entry_bytes, free_bytes, samples_that_fit
from harness.plan.calibration import Calibration, Point, fit, keep
from harness.plan.sizes import sizes_of
from harness.plan.speed import Batch
from harness.settings import Settings, compose
from kvmerge.budget import Budget
from kvmerge.command import exits, parser_of
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.limits import positions
from kvmerge.method import Allowance, Entries, Method, PrefillLayer
from kvmerge.models import load, outline
from kvmerge.names import parse_name
from kvmerge.places import choices
from kvmerge.resolve import load_method
from kvmerge.rope import Rope
from kvmerge.session import Row, seeded_generator

_LONGEST = 4096
"""Tokens of the longest prompt, where the model takes as many: about the most of LongBench's, as
what grows with the square of the length shows in none much shorter."""
_PARTS = (0.05, 0.25, 1.0)
"""Lengths of prompts, as parts of the longest."""
_MANY = (32, 16, 4)
"""Rows that decode together after a prompt of each length, beside a single one."""
_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of rows whose caches are each of another length."""
_ANSWER = 12
_ROUNDS = 2
_PATIENCE = 0.5
"""Seconds of a reading after which a method has no second one."""
_BUDGET = Budget(0.5)
"""At which methods compress."""


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, keep what was measured, and say how well it describes the prompts it comes from."""
    parser = parser_of("python -m scripts.calibrate_speed", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="as those of run.py")
    overrides = parser.parse_args(argv).overrides
    settings = compose(["experiment=mini", *overrides])
    found = calibrate(settings)
    path = keep(settings.model, found)
    print(
        f"{settings.model.name}: {1e3 * found.prefill(1000):.0f} ms a prefill of 1,000 tokens, "
        f"{1e3 * found.step(Batch(1, 1, 1000)):.0f} ms a step of one row after it. What was measured "
        f"is within {found.error:.0%} of what was fitted to it. Kept in {path}."
    )
    return 0


def calibrate(settings: Settings) -> Calibration:
    """Load the model of a run and measure it. Raises `UserError` as a run does."""
    known = outline(settings.model)
    model, tokenizer = load(settings.model, known)
    process = psutil.Process()
    loading = time.time() - process.create_time()  # with what it imported, as a run does
    sizes = sizes_of(settings.model, known)
    assert sizes is not None  # the outline has its configuration
    resident = max(0.0, process.memory_info().rss - sizes.weight_bytes)
    lengths = _lengths(settings, model)
    prompts = _prompts(model, tokenizer, lengths)
    points = _points(settings, model, prompts)
    layers = [_middle_layer(settings, model, prompt) for prompt in prompts[1:]]
    return fit(points, _methods(settings, model, layers), loading, resident)


def _lengths(settings: Settings, model: PreTrainedModel) -> list[int]:
    """Return how long the prompts are. Raises `UserError` where the model takes no three of them."""
    limits = [settings.model.max_length, settings.model.context, positions(model.config)]
    longest = min(_LONGEST, *(limit - _ANSWER for limit in limits if limit is not None))
    if longest < 100:
        raise UserError(
            f"{settings.model.name} takes {longest} tokens, too few to tell how time grows with them: "
            "100 are needed."
        )
    return [round(part * longest) for part in _PARTS]


def _prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: Iterable[int]
) -> list[Tensor]:
    """Return prompts of real prose `(1, length)`."""
    ids = torch.tensor([tokenizer(read_text("packages").content, verbose=False)["input_ids"]])
    return [ids[:, :length].to(model.device) for length in lengths]


def _points(settings: Settings, model: PreTrainedModel, prompts: Sequence[Tensor]) -> list[Point]:
    """Answer every prompt with one row, with many of one length, and with some of different lengths."""
    planned = [
        (prompt, budgets)
        for prompt, many in zip(prompts, _MANY, strict=True)
        for budgets in ((0.5,), (0.5,) * _fitting(model, prompt, many))
    ]
    planned += [(prompt, _BUDGETS) for prompt in prompts[:-1]]
    _point(settings, model, *planned[0])  # warms up
    rounds = [
        _point(settings, model, prompt, budgets)
        for prompt, budgets in tqdm(planned * _ROUNDS, unit="prompt", desc="prompts")
    ]
    return [_least(rounds[index :: len(planned)]) for index in range(len(planned))]


def _fitting(model: PreTrainedModel, prompt: Tensor, rows: int) -> int:
    """Return how many of some rows memory holds, as a run puts samples together."""
    each = [prompt.shape[1] + _ANSWER] * rows
    return samples_that_fit(each, entry_bytes(model), free_bytes(model.device))


def _point(
    settings: Settings, model: PreTrainedModel, prompt: Tensor, budgets: Sequence[float]
) -> Point:
    method, length = load_method("h2o"), prompt.shape[1]
    rows = [Row(method, Budget(budget), 0) for budget in budgets]
    results, timing = run_sample(
        model, prompt, rows, Stop(_ANSWER, frozenset()), reference=0, policy=settings.policy
    )
    kept = sum(row.stats.kept_entries for row in results)
    return Point(
        length,
        Batch(len(rows), len(set(budgets)), kept),
        _ANSWER,
        timing.prefill,
        timing.decode,
        timing.fidelity,
    )


def _least(readings: Sequence[Point]) -> Point:
    """Return one point of several readings of it: other work can only add to a time."""
    first = readings[0]
    parts = {
        name: min(getattr(each, name) for each in readings) for name in ("prefill", "decode", "replay")
    }
    return replace(first, **parts)


def _middle_layer(settings: Settings, model: PreTrainedModel, prompt: Tensor) -> PrefillLayer:
    """Return what a layer in the middle of the model hands to methods."""
    seen: list[PrefillLayer] = []

    def watch(row: int, layer_idx: int, layer: PrefillLayer, kept: Entries) -> None:
        if layer_idx == layer.num_layers // 2:
            seen.append(layer)

    rows = [Row(load_method("h2o"), _BUDGET, 0)]
    run_sample(model, prompt, rows, Stop(1, frozenset()), observer=watch)
    rope = None
    with contextlib.suppress(UserError):  # methods that turn keys are left out then
        rope = Rope.of(model)
    return replace(seen[0], rope=rope)


def _methods(
    settings: Settings, model: PreTrainedModel, layers: Sequence[PrefillLayer]
) -> dict[str, tuple[tuple[int, float], tuple[int, float]]]:
    """Return the seconds that methods take with all layers of two lengths."""
    named = {name: load_method(name) for name in choices("method")}
    named |= {parse_name(cell.name).variant: cell.method for cell in settings.cells}
    found = {}
    for name, method in tqdm(named.items(), unit="method", desc="methods"):
        if method.alters_prefill or name == "full":
            continue
        with contextlib.suppress(UserError):  # it protects more than the shorter prompt has
            shorter, longer = (
                (layer.length, layer.num_layers * _compression(method, layer)) for layer in layers
            )
            found[name] = (shorter, longer)
    return found


def _compression(method: Method, layer: PrefillLayer) -> float:
    """Return the least seconds that a method takes with a layer."""
    readings: list[float] = []
    while len(readings) < _ROUNDS and sum(readings) < _PATIENCE:
        allowance = Allowance(
            _BUDGET.entries(layer.length), _BUDGET.fraction(layer.length), seeded_generator(0, "", 0)
        )
        started = time.perf_counter()
        method.compress(layer, allowance)
        if layer.keys.is_cuda:
            torch.cuda.synchronize()
        readings.append(time.perf_counter() - started)
    return min(readings)


if __name__ == "__main__":
    raise SystemExit(main())
