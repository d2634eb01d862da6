"""On a CUDA card: are the kernels right, and what does an 8B-shaped model cost with them?

The model has Llama 3.1 8B's shape and random weights, so nothing is downloaded: time and memory do not
depend on what the weights say. Numbers are worth nothing unless the kernels are right, so they are
compared with float64 first, and nothing is timed after a wrong one.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvmerge.budget import Budget
from kvmerge.engine import Comparison, Decoder, Stop
from kvmerge.errors import UserError
from kvmerge.hook import hooked
from kvmerge.kernels.attention import prefill_attention
from kvmerge.models import attention_sizes
from kvmerge.resolve import load_method
from kvmerge.scores import column_sums
from kvmerge.session import Row
from scripts.bench.gpu_checks import Check, Shape, check_engine, check_kernels
from scripts.bench.measure import Report, random_states, weight_bytes

PLAIN, FULL, COMPRESSED = "transformers", "full@1", "kvmerger@0.35"


@dataclass(frozen=True)
class Setup:
    """What is checked and timed."""

    name: str
    device: str
    """`cuda`; `cpu` only rehearses the code."""
    config: dict[str, Any]
    """Arguments of LlamaConfig."""
    dtype: torch.dtype
    lengths: tuple[int, ...]
    """Prompt tokens."""
    steps: int
    """Decode steps that a reading is the mean of."""
    states: tuple[Shape, ...]
    """What the kernels are checked on."""


ON_A_CARD = Setup(
    name="Llama 3.1 8B's shape, random weights",
    device="cuda",
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
REHEARSAL = Setup(
    name="a tiny Llama, random weights",
    device="cpu",
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


def gpu(setup: Setup, repeats: int) -> list[Report]:
    """Check the kernels and, where they are right, time prefills and decoding.

    Returns:
        the checks alone where one is wrong; otherwise prefill, decoding and memory beside them.

    Raises:
        UserError: where there is no card, or the weights do not fit it.
    """
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "gpu needs a CUDA card, and torch sees none here. Run it on a machine with one; "
            "`python -m scripts.bench gpu_rehearsal` only rehearses the code."
        )
    small = random_model(REHEARSAL, setup.device)
    checks = [*check_kernels(setup.states, setup.device), check_engine(small, _prompt(small, 300))]
    reports = [_checks_report(setup, checks)]
    if reports[0].wrong:
        return reports
    model = random_model(setup, setup.device)
    measured = [measure(model, length, setup.steps, repeats) for length in setup.lengths]
    return [*reports, *_time_reports(setup, weight_bytes(model), measured)]


def environment() -> str:
    """Return what a GPU's figures depend on beside what every report names."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    return f"Driver {_driver()}, CUDA {torch.version.cuda}, Triton {triton}."


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
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
    """Run the prefill as transformers does, with SDPA and a cache of its own."""
    _free(model.device)
    seconds, _ = _timed(model.device, lambda: model(ids, use_cache=True, logits_to_keep=1))
    return Reading(seconds, None, _peak(model.device), None)


def _engine(model: PreTrainedModel, ids: Tensor, row: Row, steps: int) -> Reading:
    """Run the engine with one row: prefill with what the method needs, then decoding."""
    _free(model.device)
    with hooked(model):
        comparison = Comparison(model, [row])
        prefill, _ = _timed(model.device, lambda: comparison.prefill(ids, steps))
        stop = Stop(steps + 1, frozenset())  # the first token costs no step
        decode, _ = _timed(model.device, lambda: Decoder([comparison]).decode(stop))
    return Reading(prefill, decode / steps, _peak(model.device), comparison.stats[0].kv_bytes)


def _layer_seconds(model: PreTrainedModel, length: int, repeats: int) -> dict[str, float]:
    """Return median seconds of one layer's attention and of its column sums, as the engine's."""
    device = model.device
    heads, kv_heads, head_dim = attention_sizes(model.config)
    scale = head_dim**-0.5
    states = random_states(heads, kv_heads, length, head_dim, model.dtype, device.type)
    queries, keys, _ = states
    _, lse = prefill_attention(*states, scale)
    actions = {
        "attention": lambda: prefill_attention(*states, scale),
        "column sums": lambda: column_sums(queries, keys, lse),
    }
    return {
        name: statistics.median([_timed(device, action)[0] for _ in range(repeats + 1)][1:])
        for name, action in actions.items()
    }


def _timed(device: torch.device, action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds until the device has finished, and what the action returned."""
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
    """Return the median of each figure."""
    columns: dict[str, list[Any]] = {
        name: [getattr(reading, name) for reading in readings] for name in Reading.__annotations__
    }
    return {
        name: None if None in values else statistics.median(values) for name, values in columns.items()
    }


def random_model(setup: Setup, device: str) -> PreTrainedModel:
    """Return a model of the setup's shape with random weights, made on the device itself.

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
            "the caches. Use a larger card."
        ) from error


def _row(cell: str) -> Row:
    method, _, budget = cell.partition("@")
    return Row(load_method(method), Budget.parse(budget))


def _prompt(model: PreTrainedModel, length: int) -> Tensor:
    generator = torch.Generator(model.device).manual_seed(length)
    high = model.config.vocab_size
    return torch.randint(3, high, (1, length), generator=generator, device=model.device)


# --- the reports


def _report(
    setup: Setup, part: str, title: str, setting: str, rows: list[dict[str, Any]], **more: Any
) -> Report:
    rehearsal = setup.device == "cpu"
    words = "A rehearsal without a card: it says nothing of a GPU. " if rehearsal else ""
    return Report(
        f"gpu_rehearsal_{part}" if rehearsal else f"gpu_{part}",
        f"On a GPU: {title}",
        f"{words}{setting} {environment()}",
        rows,
        model=setup.name,
        dtype=str(setup.dtype).removeprefix("torch."),
        **more,
    )


def _checks_report(setup: Setup, checks: Sequence[Check]) -> Report:
    """Show the worst of each kind of check, and every one that failed."""
    rows = []
    for what in dict.fromkeys(check.what for check in checks):
        alike = [check for check in checks if check.what == what]
        failed = [check for check in alike if not check.passed]
        for check in failed or [max(alike, key=lambda check: check.error / (check.allowed or 1))]:
            rows.append(
                {
                    "check": what,
                    "inputs": len(alike),
                    "worst": check.states,
                    "error": f"{check.error:.1e}",
                    "allowed": f"{check.allowed:.1e}",
                    "verdict": "ok" if check.passed else "WRONG",
                }
            )
    return _report(
        setup,
        "checks",
        "correctness",
        "Largest deviation from float64 on the same rounded inputs.",
        rows,
        raw={"checks": [asdict(check) | {"passed": check.passed} for check in checks]},
        wrong=not all(check.passed for check in checks),
    )


def _time_reports(
    setup: Setup, weights: int, measured: Sequence[Mapping[str, Any]]
) -> Iterator[Report]:
    skipped = "".join(
        f" {length['tokens']:,} tokens skipped: {length['skipped']}."
        for length in measured
        if "skipped" in length
    )
    lengths = [length for length in measured if "skipped" not in length]
    raw = {"lengths": list(measured), "weights_bytes": weights}
    yield _report(
        setup,
        "prefill",
        "prefill",
        f"{PLAIN}: SDPA and its own cache; the others: this engine, and their ratio to it. "
        f"{COMPRESSED} includes the scores and the merging. The last columns are one layer's.{skipped}",
        [_prefill_row(length) for length in lengths],
        raw=raw,
    )
    yield _report(
        setup,
        "decode",
        "decoding",
        f"Milliseconds a step, mean of {setup.steps} steps of one row. The bound is (weights + full "
        f"cache) / (weights + compressed cache): the bytes that a step reads.{skipped}",
        [_decode_row(length, weights) for length in lengths],
    )
    yield _report(
        setup,
        "memory",
        "memory",
        f"GiB. Peak: most that torch had allocated, weights included; {PLAIN}: prefill alone. "
        f"Cache: keys and values of the prompt.{skipped}",
        [_memory_row(length) for length in lengths],
    )


def _prefill_row(length: Mapping[str, Any]) -> dict[str, Any]:
    ways, layer = length["ways"], length["layer_seconds"]
    base = ways[PLAIN]["prefill"]
    return {
        "tokens": length["tokens"],
        **{f"{way} s": round(ways[way]["prefill"], 3) for way in ways},
        **{f"{way} ratio": round(ways[way]["prefill"] / base, 3) for way in (FULL, COMPRESSED)},
        "attention ms": round(1e3 * layer["attention"], 2),
        "column sums ms": round(1e3 * layer["column sums"], 2),
    }


def _decode_row(length: Mapping[str, Any], weights: int) -> dict[str, Any]:
    full, compressed = length["ways"][FULL], length["ways"][COMPRESSED]
    bound = (weights + full["kv_bytes"]) / (weights + compressed["kv_bytes"])
    return {
        "tokens": length["tokens"],
        f"{FULL} ms": round(1e3 * full["step"], 2),
        f"{COMPRESSED} ms": round(1e3 * compressed["step"], 2),
        "speed-up": round(full["step"] / compressed["step"], 3),
        "bound by bytes": round(bound, 3),
    }


def _memory_row(length: Mapping[str, Any]) -> dict[str, Any]:
    def gib(value: float | None) -> float | str:
        return "" if value is None else round(value / 2**30, 2)

    ways = length["ways"]
    return {
        "tokens": length["tokens"],
        **{f"{way} peak": gib(ways[way]["peak"]) for way in ways},
        **{f"{way} cache": gib(ways[way]["kv_bytes"]) for way in (FULL, COMPRESSED)},
    }
