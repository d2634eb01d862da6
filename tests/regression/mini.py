"""A small fixed subset of the mini benchmark, end to end, compared with committed records.

    make regression          # check: exit 1 naming cell, sample and field of what moved
    make regression-accept   # record anew, after a change that is meant to move something

What is compared: prompts exactly (by hash); entries kept exactly; merging sets and kept tokens exactly,
by layer and KV head; logits at the last answer token within `LOGIT_TOLERANCE`; scores within
`SCORE_TOLERANCE`. Processors round differently, and a choice between two nearly equal tokens may then
fall the other way: recording perturbs each layer by `NOISE`, several times, and leaves out the heads
whose choice changes, so that what is recorded holds on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.task import Sample, Task
from harness.answering import prompt_hash, stop_rule
from harness.settings import Settings, compose
from kvmerge.engine import Comparison, Decoder
from kvmerge.errors import UserError
from kvmerge.files import write_atomically
from kvmerge.hook import hooked
from kvmerge.method import Allowance, Entries, PrefillLayer
from kvmerge.models import load
from kvmerge.session import Row

RECORDS = Path(__file__).with_suffix(".json")
SAMPLES = 1
"""Samples of each task."""
LOGIT_TOLERANCE = 0.05
"""Largest difference of a recorded logit; logits here range over about 40."""
SCORE_TOLERANCE = 0.05
NOISE = 1e-4
"""Relative perturbation that a recorded choice must survive, a hundred times float32 rounding."""
DRAWS = 8
"""Draws of it that each choice must survive."""
_TOP_LOGITS = 8
_SHOWN = 50
"""Differences that are printed in full."""


@dataclass(frozen=True)
class Difference:
    """One field that moved."""

    task: str
    sample: str
    cell: str
    """Empty for what all cells share."""
    field: str
    recorded: object
    measured: object
    detail: str = ""
    """Where in the field, or by how much."""

    def __str__(self) -> str:
        """Say which cell, sample and field moved, and from what to what."""
        cell = f"cell {self.cell}, " if self.cell else ""
        what = f"{self.field} {self.detail}".rstrip()
        where = f"{cell}task {self.task}, sample {self.sample}"
        return f"{where}: {what} was {self.recorded}, is {self.measured}"


@dataclass
class Selection:
    """Observes what each row keeps: a digest by layer and KV head."""

    rows: Sequence[Row]
    perturb: bool
    digests: list[list[list[str | None]]] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = [[] for _ in self.rows]

    def __call__(self, row: int, layer_idx: int, layer: PrefillLayer, kept: Entries) -> None:
        """Digest the kept tokens and set sizes of one layer (see `kvmerge.session.Observer`)."""
        digests: list[str | None] = list(_digests(kept))
        if self.perturb and kept.positions.shape[-1] < layer.length:
            for draw in range(DRAWS):
                again = _digests(self._perturbed(row, layer, kept, draw))
                digests = [a if a == b else None for a, b in zip(digests, again, strict=True)]
        self.digests[row].append(digests)

    def _perturbed(self, row: int, layer: PrefillLayer, kept: Entries, draw: int) -> Entries:
        generator = torch.Generator().manual_seed(layer.layer_idx * DRAWS + draw)

        def noisy(state: Tensor) -> Tensor:
            return state * (1 + NOISE * torch.randn(state.shape, generator=generator))

        assert layer.scores is not None
        nearby = replace(layer, keys=noisy(layer.keys), scores=noisy(layer.scores))
        allowance = Allowance(
            n_keep=kept.positions.shape[-1],
            budget=self.rows[row].budget.fraction(layer.length),
            generator=torch.Generator().manual_seed(0),
        )
        return self.rows[row].method.compress(nearby, allowance)


def main(argv: Sequence[str] | None = None) -> int:
    """Check against the committed records, or write them anew; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.regression.mini")
    parser.add_argument("action", choices=["check", "record"])
    options = parser.parse_args(argv)
    settings = regression_settings()
    notes = settings.benchmark.notes()
    try:
        model, tokenizer = load(settings.model)
        measured = measure(settings, model, tokenizer, perturb=options.action == "record")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note}")
    if options.action == "record":
        RECORDS.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(RECORDS, _as_text(measured))
        print(f"{_coverage(measured)}; written to {RECORDS}")
        return 0
    recorded = json.loads(RECORDS.read_text(encoding="utf-8"))
    differences = list(compare(recorded, measured))
    for line in summary(differences):
        print(line)
    for difference in differences[:_SHOWN]:
        print(f"moved: {difference}")
    if len(differences) > _SHOWN:
        print(f"… and {len(differences) - _SHOWN} more")
    print(f"regression: {_coverage(recorded)}; {len(differences)} moved")
    if not differences:
        return 0
    print("If the change is meant to move this, record it anew: make regression-accept")
    return 1


def summary(differences: Sequence[Difference]) -> Iterator[str]:
    """Yield a line for each cell that moved, with each field counted; what moved most comes first."""
    for cell, total in _most_first(difference.cell for difference in differences):
        fields = _most_first(other.field for other in differences if other.cell == cell)
        counts = ", ".join(f"{count} {name}" for name, count in fields)
        yield f"summary: {f'cell {cell}' if cell else 'shared by all cells'}: {total} moved ({counts})"


def _most_first(names: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(names).items(), key=lambda counted: (-counted[1], counted[0]))


def regression_settings(*overrides: str) -> Settings:
    """Compose the settings of the comparison: the mini experiment's cells, one seed."""
    fixed = ["experiment=mini", f"limit={SAMPLES}", "num_seeds=1"]
    return compose([*fixed, *overrides])


def measure(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    perturb: bool = False,
) -> dict[str, Any]:
    """Run the subset and return what is to be compared, by task, sample and cell."""
    jobs = [(task, sample) for task in settings.benchmark.tasks for sample in settings.samples(task)]
    measured: dict[str, Any] = {}
    for task, sample in tqdm(jobs, unit="sample", desc="regression"):
        figures = _measure_sample(settings, model, tokenizer, task, sample, perturb)
        measured.setdefault(task.name, {})[sample.id] = figures
    return measured


@torch.inference_mode()
def _measure_sample(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sample: Sample,
    perturb: bool,
) -> dict[str, Any]:
    ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
    rows = [settings.row(cell, settings.seed) for cell in settings.cells]
    full = next(index for index, cell in enumerate(settings.cells) if cell.is_full)
    selection = Selection(rows, perturb)
    stop = stop_rule(settings, model, tokenizer, task)
    comparison = Comparison(model, rows, sample.id, selection)
    with hooked(model):
        first = comparison.prefill(torch.tensor([ids], device=model.device), stop.max_new_tokens)
        decoder = Decoder([comparison])
        (answers,) = decoder.decode(stop)
        last = first.expand(len(rows), -1)
        for (logits,) in decoder.replay([answers[full]]):
            last = logits[:, -1].float()
    top = last[full].topk(_TOP_LOGITS).indices
    cells = {}
    for index, cell in enumerate(settings.cells):
        text = str(tokenizer.decode(answers[index], skip_special_tokens=True))
        cells[cell.name] = {
            "entries": sorted({n for layer in comparison.stats[index].entries for n in layer}),
            "selection": selection.digests[index],
            "logits": [round(value, 4) for value in last[index, top].tolist()],
            "score": round(settings.benchmark.score(sample, task, text)["score"], 6),
        }
    return {
        "prompt_hash": prompt_hash(ids),
        "prompt_tokens": len(ids),
        "logit_tokens": top.tolist(),
        "cells": cells,
    }


def compare(recorded: dict[str, Any], measured: dict[str, Any]) -> Iterator[Difference]:
    """Yield what differs between two measurements."""
    for task in sorted({*recorded, *measured}):
        samples = recorded.get(task, {}), measured.get(task, {})
        for sample in sorted({*samples[0], *samples[1]}):
            old, new = (side.get(sample) for side in samples)
            if old is None or new is None:
                here = "recorded" if old is not None else "not recorded"
                yield Difference(task, sample, "", "presence", here, "the opposite")
                continue
            for key in ("prompt_hash", "prompt_tokens", "logit_tokens"):
                if old[key] != new[key]:
                    yield Difference(task, sample, "", key, old[key], new[key])
            for cell in sorted({*old["cells"], *new["cells"]}):
                sides = old["cells"].get(cell), new["cells"].get(cell)
                for moved in _moved(*sides):
                    yield Difference(task, sample, cell, *moved)


def _moved(
    old: dict[str, Any] | None, new: dict[str, Any] | None
) -> Iterator[tuple[str, object, object, str]]:
    """Yield field, recorded, measured and detail of what differs in a cell."""
    if old is None or new is None:
        yield "presence", old is not None, new is not None, ""
        return
    if old["entries"] != new["entries"]:
        yield "entries kept", old["entries"], new["entries"], ""
    heads = [
        (layer, head)
        for layer, digests in enumerate(old["selection"])
        for head, digest in enumerate(digests)
        if digest is not None and digest != new["selection"][layer][head]
    ]
    if heads:
        layer, head = heads[0]
        yield (
            "merging sets or kept tokens",
            old["selection"][layer][head],
            new["selection"][layer][head],
            f"of layer {layer}, KV head {head} ({len(heads)} heads in all)",
        )
    furthest = max(abs(a - b) for a, b in zip(old["logits"], new["logits"], strict=True))
    if not furthest <= LOGIT_TOLERANCE:
        yield "logits", old["logits"], new["logits"], f"(by up to {furthest:.3g})"
    if not abs(old["score"] - new["score"]) <= SCORE_TOLERANCE:
        yield "score", old["score"], new["score"], ""


def _digests(kept: Entries) -> Iterator[str]:
    """Yield a digest of each KV head's positions and set sizes: contiguous sets follow from the two."""
    sizes = kept.sizes if kept.sizes is not None else torch.ones_like(kept.positions)
    for positions, size in zip(kept.positions[0], sizes[0], strict=True):
        text = json.dumps([positions.tolist(), size.tolist()])
        yield hashlib.sha256(text.encode()).hexdigest()[:8]


def _as_text(measured: dict[str, Any]) -> str:
    """Return JSON with a line for each cell, so that a change of the records reads as what moved."""
    compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    tasks = []
    for task, samples in measured.items():
        lines = []
        for sample, figures in samples.items():
            shared = {key: value for key, value in figures.items() if key != "cells"}
            cells = ",\n".join(f"{compact(n)}:{compact(c)}" for n, c in figures["cells"].items())
            lines.append(f'{compact(sample)}:{compact(shared)[:-1]},"cells":{{\n{cells}}}}}')
        tasks.append(f"{compact(task)}:{{" + ",\n".join(lines) + "}")
    return "{" + ",\n".join(tasks) + "}\n"


def _coverage(measured: dict[str, Any]) -> str:
    samples = [sample for task in measured.values() for sample in task.values()]
    cells = {name for sample in samples for name in sample["cells"]}
    heads = [
        digest
        for sample in samples
        for cell in sample["cells"].values()
        for layer in cell["selection"]
        for digest in layer
    ]
    fixed = sum(digest is not None for digest in heads)
    return (
        f"{len(measured)} tasks, {len(samples)} samples, {len(cells)} cells; "
        f"selection compared in {fixed} of {len(heads)} (sample, cell, layer, head)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
