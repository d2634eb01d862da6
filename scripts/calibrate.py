"""Calibrate KVMerger's threshold for each layer (`budget_mode=eps_layer`, docs/methods.md).

    python -m scripts.calibrate model=smollm2-135m benchmark=mini budget=0.35 limit=4

The paper remarks that compression ratios per layer hardly vary between samples, so they can be fixed
in advance. For each layer, the threshold is bisected until the mean number of entries over KV heads
and samples meets the budget. Overrides are those of run.py; settings of the method hold. The file goes
to results/calibration, named by model and budget.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harness.settings import Settings, compose
from kvmerge import merging
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.families import windows
from kvmerge.files import write_atomically
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Allowance, Entries, PrefillLayer
from kvmerge.models import load
from kvmerge.session import Row

SAMPLES = 20
"""Samples used where the command sets no limit (docs/methods.md)."""
OUT = Path("results") / "calibration"


class Links:
    """Observe layers and keep the similarity of every link that may be made."""

    def __init__(self, method: KVMerger, budget: Budget) -> None:
        """Collect links as `method` would see them at `budget`."""
        self.method, self.budget = method, budget
        self.by_layer: dict[int, list[tuple[Tensor, int]]] = {}

    def __call__(self, row: int, layer_idx: int, layer: PrefillLayer, kept: Entries) -> None:
        """Add one layer: link similarities of each KV head, -inf where protected, and the budget."""
        allowance = Allowance(self.budget.entries(layer.length), self.budget.fraction(layer.length))
        if allowance.n_keep >= layer.length:
            return  # nothing is merged, whatever the threshold
        protected = self.method.protected(layer.column_scores(), layer.length, allowance)
        similarity = merging.cosine(layer.keys[:, :, :-1].float(), layer.keys[:, :, 1:].float())
        closed = protected[..., :-1] | protected[..., 1:]
        links = similarity.masked_fill(closed, -torch.inf)[0]
        self.by_layer.setdefault(layer_idx, []).append((links, allowance.n_keep))

    def threshold(self, layer_idx: int) -> float:
        """Return the threshold at which the mean number of entries is the budget's.

        A layer that is left to a window of its own has none: 1, which links nothing, holds its place.
        """
        if layer_idx not in self.by_layer:
            return 1.0
        low, high = -1.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            excess = [
                float((links.shape[-1] + 1 - (links > middle).sum(-1)).float().mean()) - n_keep
                for links, n_keep in self.by_layer[layer_idx]
            ]
            # A higher threshold links less and leaves more entries.
            low, high = (middle, high) if sum(excess) < 0 else (low, middle)
        return round((low + high) / 2, 6)


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, write the thresholds and print where they went."""
    overrides = list(sys.argv[1:] if argv is None else argv)
    if overrides and overrides[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        path = calibrate(compose([f"limit={SAMPLES}", *overrides]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"use it with: method=kvmerger method.budget_mode=eps_layer method.thresholds={path}")
    return 0


def calibrate(settings: Settings) -> Path:
    """Run the prompts once and write one threshold a layer.

    Returns:
        the file.

    Raises:
        UserError: as a run does, and where there is no threshold to calibrate.
    """
    if len(settings.cells) != 1:
        raise UserError(
            f"{len(settings.cells)} cells were given; thresholds are calibrated for one method at one "
            "budget, e.g. method=kvmerger budget=0.35."
        )
    cell = settings.cells[0]
    method = cell.method
    if not isinstance(method, KVMerger) or method.linkage != "adjacent":
        raise UserError(
            f"{cell.name} has no thresholds to calibrate: only KVMerger with linkage=adjacent has. "
            "Leave method=... out, or give method=kvmerger."
        )
    model, tokenizer = load(settings.model)
    links = Links(method, cell.budget)
    jobs = [(task, sample) for task in settings.benchmark.tasks for sample in settings.samples(task)]
    for task, sample in tqdm(jobs, unit="sample", desc="calibrate"):
        ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
        prompt = torch.tensor([ids], device=model.device)
        run_sample(model, prompt, [Row(method, cell.budget)], Stop(1, frozenset()), observer=links)
    if not links.by_layer:
        raise UserError(f"budget={cell.budget} holds every prompt; lower it, or take longer prompts.")
    path = OUT / f"{settings.model.name}@{cell.budget}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = len(windows(model.config))
    content = {
        "model": settings.model.name,
        "benchmark": settings.benchmark.name,
        "samples": len(jobs),
        "cell": cell.name,
        "thresholds": [links.threshold(layer) for layer in range(layers)],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
