"""Check the GPU kernels on a card, then time an 8B-shaped model on it.

    python -m scripts.bench.gpu                           # 4k, 16k and 32k tokens; results/bench/gpu.md
    python -m scripts.bench.gpu --lengths 4096 8192
    python -m scripts.bench.gpu --small --device cpu      # a rehearsal without a card

The model has Llama 3.1 8B's shape and random weights, so nothing is downloaded: time and memory do not
depend on what the weights say. Numbers are worth nothing unless the kernels are right, so they are
compared with float64 first, and a wrong one stops the run with exit status 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from harness.provenance import git_state, hardware, package_versions
from harness.report.render import markdown
from harness.report.tables import Table
from kvmerge.budget import Budget
from kvmerge.engine import Comparison, Decoder, Stop
from kvmerge.errors import UserError
from kvmerge.files import write_atomically
from kvmerge.hook import hooked
from kvmerge.kernels.attention import prefill_attention
from kvmerge.resolve import load_method
from kvmerge.scores import column_sums
from kvmerge.session import Row
from scripts.bench.gpu_checks import Shape, check_engine, check_kernels, random_states
from scripts.bench.measure import weight_bytes

PLAIN, FULL, COMPRESSED = "transformers", "full@1", "kvmerger@0.35"


@dataclass(frozen=True)
class Setup:
    """What is checked and timed."""

    name: str
    file: str
    """Where the figures go, without ending: a rehearsal leaves a card's alone."""
    config: dict[str, Any]
    """Arguments of LlamaConfig."""
    dtype: torch.dtype
    lengths: tuple[int, ...]
    """Prompt tokens."""
    steps: int
    """Decode steps that a reading is the mean of."""
    states: tuple[Shape, ...]
    """What the kernels are checked on."""


LARGE = Setup(
    name="Llama 3.1 8B's shape, random weights",
    file="gpu",
    config={
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    dtype=torch.bfloat16,
    lengths=(4096, 16384, 32768),
    steps=32,
    states=(
        (32, 8, 4096, 128),
        (32, 32, 1000, 128),
        (9, 3, 257, 64),
        (12, 4, 1003, 80),
        (8, 2, 515, 96),
        (8, 1, 513, 256),
        (4, 2, 37, 16),
        (4, 2, 1, 128),
    ),
)
SMALL = Setup(
    name="a tiny Llama, random weights",
    file="gpu_small",
    config={
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # large, so that no two tokens are nearly as likely
    },
    dtype=torch.float32,
    lengths=(64, 200),
    steps=4,
    states=((4, 2, 37, 16), (6, 2, 130, 64)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 if a kernel is wrong; 2 after a user error, e.g. where there is no card.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds; medians are shown")
    parser.add_argument("--small", action="store_true", help="a tiny model and short prompts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder to write")
    options = parser.parse_args(argv)
    setup = SMALL if options.small else LARGE
    try:
        _check_options(options)
        correct = run(
            setup, options.lengths or setup.lengths, options.repeats, options.device, options.out
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if correct else 1


def _check_options(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "the GPU benchmark needs a CUDA card, and torch sees none here. Run it on a machine with "
            "one; `--small --device cpu` only rehearses the code."
        )
    if options.device == "cpu" and not options.small:
        raise UserError("an 8B-shaped model is too much for --device cpu: add --small, or use a card.")
    if options.repeats < 1 or min(options.lengths or [1]) < 1:
        raise UserError("--repeats and --lengths must be 1 or more.")


def run(setup: Setup, lengths: Sequence[int], repeats: int, device: str, out: Path) -> bool:
    """Check, time, and write the figures as JSON and Markdown.

    Returns:
        whether every check passed; nothing is timed otherwise.
    """
    small = random_model(SMALL, device)
    checks = [*check_kernels(setup.states, device), check_engine(small, _prompt(small, 300))]
    correct = all(check.passed for check in checks)
    figures: dict[str, Any] = {
        "on_a_card": device == "cuda",
        "environment": environment(),
        "model": setup.name,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "decode_steps": setup.steps,
        "repeats": repeats,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "weights_bytes": None,
        "lengths": [],
    }
    if correct:
        model = random_model(setup, device)
        figures["weights_bytes"] = weight_bytes(model)
        figures["lengths"] = [
            measure(model, length, setup.steps, repeats) for length in sorted(lengths)
        ]
    text = report(figures)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{setup.file}.json", json.dumps(figures, indent=2) + "\n")
    write_atomically(out / f"{setup.file}.md", text)
    Console().print(Markdown(text))
    return correct


def environment() -> dict[str, Any]:
    """The machine, the driver, versions and the commit."""
    packages = package_versions()
    return {
        "hardware": hardware(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "torch": packages["torch"],
        "transformers": packages["transformers"],
        "git": git_state(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


# --- time and memory


@dataclass(frozen=True)
class Reading:
    """One run of one way to keep the cache."""

    prefill: float
    """Seconds."""
    step: float | None
    """Seconds a decode step; None where decoding was not timed."""
    peak: int | None
    """Most bytes allocated on the card, weights included; None without a card."""
    kv_bytes: int | None
    """Bytes of the prompt's keys and values that the engine keeps."""


def measure(model: PreTrainedModel, length: int, steps: int, repeats: int) -> dict[str, Any]:
    """Run every way in turn, `repeats` times after a warm-up.

    Returns:
        the length, medians by way, and all readings; or the length and why it was skipped.
    """
    ids = _prompt(model, length)
    ways: dict[str, Callable[[], Reading]] = {
        PLAIN: partial(_plain, model, ids),
        FULL: partial(_engine, model, ids, _row(FULL), steps),
        COMPRESSED: partial(_engine, model, ids, _row(COMPRESSED), steps),
    }
    readings: dict[str, list[Reading]] = {way: [] for way in ways}
    try:
        for attempt in range(repeats + 1):
            for way, action in ways.items():
                reading = action()
                if attempt:
                    readings[way].append(reading)
        layer = _layer_seconds(model, length, repeats)
    except torch.OutOfMemoryError as error:
        return {"tokens": length, "skipped": f"out of memory: {str(error).splitlines()[0]}"}
    return {
        "tokens": length,
        "ways": {way: _median(of_way) for way, of_way in readings.items()},
        "layer_seconds": layer,
        "readings": {way: [asdict(reading) for reading in of_way] for way, of_way in readings.items()},
    }


@torch.inference_mode()
def _plain(model: PreTrainedModel, ids: Tensor) -> Reading:
    """The prefill as transformers runs it, with SDPA and a cache of its own."""
    _free(model.device)
    seconds, _ = _timed(model.device, lambda: model(ids, use_cache=True, logits_to_keep=1))
    return Reading(seconds, None, _peak(model.device), None)


def _engine(model: PreTrainedModel, ids: Tensor, row: Row, steps: int) -> Reading:
    """The engine with one row: prefill with what the method needs, then decoding."""
    _free(model.device)
    with hooked(model):
        comparison = Comparison(model, [row])
        prefill, _ = _timed(model.device, lambda: comparison.prefill(ids, steps))
        stop = Stop(steps + 1, frozenset())  # the first token costs no step
        decode, _ = _timed(model.device, lambda: Decoder([comparison]).decode(stop))
    return Reading(prefill, decode / steps, _peak(model.device), comparison.stats[0].kv_bytes)


def _layer_seconds(model: PreTrainedModel, length: int, repeats: int) -> dict[str, float]:
    """Median seconds of one layer's attention and of its column sums, as the engine runs them."""
    config, device = model.config, model.device
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    states = random_states((heads, kv_heads, length, config.head_dim), model.dtype, device.type)
    queries, keys, _ = states
    _, lse = prefill_attention(*states, config.head_dim**-0.5)
    actions = {
        "attention": lambda: prefill_attention(*states, config.head_dim**-0.5),
        "column sums": lambda: column_sums(queries, keys, lse),
    }
    return {
        name: statistics.median([_timed(device, action)[0] for _ in range(repeats + 1)][1:])
        for name, action in actions.items()
    }


def _timed(device: torch.device, action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device has finished, and what the action returned."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    result = action()
    synchronize()
    return time.perf_counter() - started, result


def _free(device: torch.device) -> None:
    """Drop what an earlier run left, and forget its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _median(readings: Sequence[Reading]) -> dict[str, float | None]:
    """The median of each figure."""
    columns: dict[str, list[Any]] = {
        name: [getattr(reading, name) for reading in readings] for name in Reading.__annotations__
    }
    return {
        name: None if None in values else statistics.median(values) for name, values in columns.items()
    }


def random_model(setup: Setup, device: str) -> PreTrainedModel:
    """A model of the setup's shape with random weights, made on the device itself.

    Raises:
        UserError: if the weights do not fit.
    """
    torch.manual_seed(0)
    try:
        with torch.device(device):
            config = LlamaConfig(**setup.config)
            return AutoModelForCausalLM.from_config(config, dtype=setup.dtype).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the weights of {setup.name} do not fit this card: it needs about 16 GB, and more for "
            "the caches. Use a larger card, or --small."
        ) from error


def _row(cell: str) -> Row:
    method, _, budget = cell.partition("@")
    return Row(load_method(method), Budget.parse(budget))


def _prompt(model: PreTrainedModel, length: int) -> Tensor:
    generator = torch.Generator(model.device).manual_seed(length)
    high = model.config.vocab_size
    return torch.randint(3, high, (1, length), generator=generator, device=model.device)


# --- the report


def report(figures: Mapping[str, Any]) -> str:
    """All figures as Markdown."""
    where, machine = figures["environment"], figures["environment"]["hardware"]
    card = ", ".join(machine["gpus"]) or machine["cpu"]
    rehearsal = (
        ""
        if figures["on_a_card"]
        else ("A rehearsal without a card: these figures say nothing of a GPU.\n\n")
    )
    commit = where["git"]["commit"] or "unknown"
    dirty = " with changes" if where["git"]["dirty"] else ""
    settings = {
        "device": card,
        "driver, CUDA": f"{where['driver']}, {where['cuda']}",
        "torch, Triton, transformers": f"{where['torch']}, {where['triton']}, {where['transformers']}",
        "model": f"{figures['model']}, {figures['dtype']}",
        "commit": commit + dirty,
    }
    lines = "".join(f"- {name}: {value}\n" for name, value in settings.items())
    tables = [_checks_table(figures["checks"])]
    if any(_measured(figures)):
        tables += [_prefill_table(figures), _decode_table(figures), _memory_table(figures)]
    skipped = "".join(
        f"- {of_length['tokens']:,} tokens skipped: {of_length['skipped']}\n"
        for of_length in figures["lengths"]
        if "skipped" in of_length
    )
    body = "\n".join(markdown(table) for table in tables)
    return f"# The GPU path\n\n{rehearsal}{lines}\n{body}" + (f"\n{skipped}" if skipped else "")


def _checks_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """The worst of each kind of check, and every one that failed."""
    rows = []
    for what in dict.fromkeys(check["what"] for check in checks):
        of_kind = [check for check in checks if check["what"] == what]
        failed = [check for check in of_kind if not check["passed"]]
        worst = max(of_kind, key=lambda check: check["error"] / (check["allowed"] or 1))
        for check in failed or [worst]:
            rows.append(
                {
                    "check": what,
                    "inputs": str(len(of_kind)),
                    "worst": check["states"],
                    "error": f"{check['error']:.1e}",
                    "allowed": f"{check['allowed']:.1e}",
                    "": "ok" if check["passed"] else "WRONG",
                }
            )
    return _table("Correctness", "Largest deviation from float64 on the same rounded inputs.", rows)


def _prefill_table(figures: Mapping[str, Any]) -> Table:
    rows = []
    for tokens, ways, layer in _measured(figures):
        base = ways[PLAIN]["prefill"]
        rows.append(
            {
                "tokens": f"{tokens}",
                **{f"{way} s": f"{ways[way]['prefill']:.3f}" for way in ways},
                **{f"{way} ratio": f"{ways[way]['prefill'] / base:.3f}" for way in (FULL, COMPRESSED)},
                "attention ms": f"{1e3 * layer['attention']:.2f}",
                "column sums ms": f"{1e3 * layer['column sums']:.2f}",
            }
        )
    caption = (
        f"Median of {figures['repeats']} rounds. {PLAIN}: SDPA and its own cache; the others: this "
        f"engine, and their ratio to it. {COMPRESSED} includes the scores and the merging. The last "
        "columns are one layer's."
    )
    return _table("Prefill", caption, rows)


def _decode_table(figures: Mapping[str, Any]) -> Table:
    rows = []
    weights = figures["weights_bytes"]
    for tokens, ways, _ in _measured(figures):
        full, compressed = ways[FULL], ways[COMPRESSED]
        speedup = full["step"] / compressed["step"]
        bound = (weights + full["kv_bytes"]) / (weights + compressed["kv_bytes"])
        rows.append(
            {
                "tokens": f"{tokens}",
                f"{FULL} ms": f"{1e3 * full['step']:.2f}",
                f"{COMPRESSED} ms": f"{1e3 * compressed['step']:.2f}",
                "speed-up": f"{speedup:.3f}",
                "bound by bytes": f"{bound:.3f}",
            }
        )
    caption = (
        f"Milliseconds a step, mean of {figures['decode_steps']} steps of one row. The bound is "
        "(weights + full cache) / (weights + compressed cache): the bytes that a step reads."
    )
    return _table("Decoding", caption, rows)


def _memory_table(figures: Mapping[str, Any]) -> Table:
    def gib(value: float | None) -> str:
        return "" if value is None else f"{value / 2**30:.2f}"

    rows = [
        {
            "tokens": f"{tokens}",
            **{f"{way} peak": gib(ways[way]["peak"]) for way in ways},
            **{f"{way} cache": gib(ways[way]["kv_bytes"]) for way in (FULL, COMPRESSED)},
        }
        for tokens, ways, _ in _measured(figures)
    ]
    caption = (
        f"GiB. Peak: most that torch had allocated, weights included; {PLAIN}: prefill alone. "
        "Cache: keys and values of the prompt."
    )
    return _table("Memory", caption, rows)


def _measured(figures: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any], dict[str, float]]]:
    """Tokens, medians by way and one layer's seconds, of the lengths that were not skipped."""
    for of_length in figures["lengths"]:
        if "skipped" not in of_length:
            yield of_length["tokens"], of_length["ways"], of_length["layer_seconds"]


def _table(title: str, caption: str, rows: Sequence[Mapping[str, str]]) -> Table:
    header = tuple(rows[0]) if rows else ()
    cells = tuple(tuple(row.values()) for row in rows)
    return Table(title.lower(), title, caption, header, cells, (), pd.DataFrame(rows))


if __name__ == "__main__":
    raise SystemExit(main())
