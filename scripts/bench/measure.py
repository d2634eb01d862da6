"""What every benchmark uses: a model twice, prompts of a length, and timing for a noisy machine.

What is compared runs in turn, in one process. Ratios are taken within each round and their median is
shown, since the runs of a round meet the machine in the same mood.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.texts import read_text
from harness.settings import Settings, compose
from kvmerge.cells import parse_cell
from kvmerge.engine import Request, Stop, run_samples
from kvmerge.models import load
from kvmerge.session import Row


@dataclass(frozen=True)
class Report:
    """The answer to one question."""

    name: str
    title: str
    setting: str
    """What was measured, and how; the machine and the versions stand apart."""
    rows: list[dict[str, Any]]
    """The table, a dictionary a line with the same keys; the first names the line."""
    target: str = ""
    """What the project asks of it."""
    raw: dict[str, Any] = field(default_factory=dict)
    """Every single reading."""
    model: str | None = None
    """What was measured, where it is not the model of the bench."""
    dtype: str | None = None
    """Of that model."""
    wrong: bool = False
    """Whether a result is not what it must be, so that no time of it is worth anything."""


class Bench:
    """The model under test and prompts for it."""

    def __init__(self, overrides: Sequence[str], repeats: int) -> None:
        """Take command-line overrides (`model=...`) and the number of counted rounds."""
        self.overrides = list(overrides)
        self.repeats = repeats

    @cached_property
    def settings(self) -> Settings:
        """Return the settings that the model comes from."""
        return compose(["experiment=mini", *self.overrides])

    @property
    def cells(self) -> list[str]:
        """Return the cells of a comparison: the seven of the paper's table."""
        return [cell.name for cell in self.settings.cells]

    @cached_property
    def model(self) -> PreTrainedModel:
        """Return the model as the harness runs it."""
        return self._loaded[0]

    @cached_property
    def plain(self) -> PreTrainedModel:
        """Return the same weights as plain transformers runs them, with SDPA."""
        return load(replace(self.settings.model, pack_weights=False))[0]

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load(self.settings.model)

    @cached_property
    def _text_ids(self) -> Tensor:
        ids = self._loaded[1](read_text("packages").content, verbose=False)["input_ids"]
        return torch.tensor([ids])

    def prompt(self, length: int, number: int = 0) -> Tensor:
        """Return `(1, length)` tokens of real prose, another piece for each number."""
        ids = self._text_ids
        while ids.shape[1] < (number + 1) * length:
            ids = torch.cat([ids, self._text_ids], dim=1)
        return ids[:, number * length : (number + 1) * length].to(self.model.device)

    def rows(self, cells: Sequence[str]) -> list[Row]:
        """Return the rows of cells, one seed each."""
        return [self.settings.row(parse_cell(cell), 0) for cell in cells]

    def run(self, prompts: Sequence[Tensor], rows: Sequence[Row], tokens: int, batch: int = 1) -> None:
        """Answer prompts with exactly so many tokens, `batch` prompts at a time."""
        requests = [Request(ids, rows, policy=self.settings.policy) for ids in prompts]
        for begin in range(0, len(requests), batch):
            run_samples(self.model, requests[begin : begin + batch], Stop(tokens, frozenset()))

    def generate(self, model: PreTrainedModel, prompts: Sequence[Tensor], tokens: int) -> None:
        """Answer prompts by transformers' own `generate`, with exactly so many tokens."""
        for ids in prompts:
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )

    def in_turn(self, actions: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of each action, one after the other in every round.

        A round before them warms up.
        """
        return in_turn(actions, self.repeats)


def in_turn(actions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each action in `repeats` rounds, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for attempt in range(repeats + 1):
        for name, action in actions.items():
            gc.collect()
            started = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if attempt:
                seconds[name].append(time.perf_counter() - started)
    return seconds


class Stopwatch:
    """Seconds inside the engine's stages, by stage (see `kvmerge.session.Stages`)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to its stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


class LiveBytes(TorchDispatchMode):
    """The largest total of what is allocated inside the block and alive at the same time, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages that it made."""
        given = {
            _.untyped_storage().data_ptr() for _ in tree_leaves((args, kwargs)) if isinstance(_, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            pointer, size = storage.data_ptr(), storage.nbytes()
            if pointer in given or pointer in self._known:
                continue
            self._known.add(pointer)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, pointer, size)
        return out

    def _freed(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.live -= size


def against(seconds: Mapping[str, list[float]], base: str) -> list[dict[str, Any]]:
    """Return a table line for each action: median, extremes, and the ratio to `base`."""
    return [
        {
            "run": name,
            "median s": round(statistics.median(values), 3),
            "min s": round(min(values), 3),
            "max s": round(max(values), 3),
            f"ratio to {base}": round(ratio(values, seconds[base]), 3),
        }
        for name, values in seconds.items()
    ]


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over the rounds of one action's seconds divided by another's."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def random_states(
    heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries, keys and values of one prompt, laid out as the models give them."""
    generator = torch.Generator(device).manual_seed(length)
    queries, keys, values = (
        torch.randn(1, length, n, head_dim, generator=generator, device=device).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    )
    return (2 * queries).to(dtype), keys.to(dtype), values.to(dtype)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the weights that a decode step reads.

    All but an embedding that is not the output layer too: of that, a step reads one row.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    if model.config.tie_word_embeddings:
        return total
    return total - sum(parameter.nbytes for parameter in model.get_input_embeddings().parameters())
