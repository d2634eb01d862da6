"""Calibrate KVMerger's threshold for each layer (`budget_mode=eps_layer`, docs/methods.md).

    python -m scripts.calibrate model=smollm2-135m benchmark=mini budget=0.35 limit=4

The paper remarks that compression ratios per layer hardly vary between samples, so they can be fixed
in advance. For each layer, the threshold is the one at which the mean number of entries over KV heads
and samples meets the budget. Overrides are those of run.py; settings of the method hold. The file goes
to results/calibration, named by model and budget.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from harness.settings import Settings, compose
from kvmerge import merging
from kvmerge.budget import Budget
from kvmerge.command import exits, parser_of
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
GRID = [step / 50 for step in range(-50, 51)]
"""Thresholds at which sets are counted."""
OUT = Path("results") / "calibration"


class Counts:
    """Observe layers and count the sets that each threshold of the grid leaves."""

    def __init__(self, method: KVMerger, budget: Budget) -> None:
        """Count sets as `method` would find them at `budget`."""
        self.method, self.budget = method, budget
        self.excess: dict[int, list[Tensor]] = {}
        """Of each layer, for each sample `(grid,)`: mean entries of a KV head beyond the budget."""

    def __call__(self, row: int, layer_idx: int, layer: PrefillLayer, kept: Entries) -> None:
        """Add one layer of a sample."""
        allowance = Allowance(self.budget.entries(layer.length), self.budget.fraction(layer.length))
        if allowance.n_keep >= layer.length:
            return  # nothing is merged, whatever the threshold
        protected = self.method.protected(layer.column_scores(), layer.length, allowance)
        sets = merging.set_counts(layer.keys, protected, GRID, linkage=self.method.linkage)
        self.excess.setdefault(layer_idx, []).append(sets[0].double().mean(0).cpu() - allowance.n_keep)

    def threshold(self, layer_idx: int) -> float:
        """Return the threshold at which the mean number of entries is the budget's.

        The largest such one, between two of the grid on a straight line. A layer that is left to a
        window of its own has none: 1, which links next to nothing, holds its place.
        """
        if layer_idx not in self.excess:
            return 1.0
        excess = torch.stack(self.excess[layer_idx]).mean(0)
        enough = (excess <= 0).nonzero().flatten()
        if not len(enough):
            return GRID[0]
        below = int(enough[-1])
        if below == len(GRID) - 1:
            return GRID[-1]
        share = float(excess[below] / (excess[below] - excess[below + 1]))
        return round(GRID[below] + share * (GRID[below + 1] - GRID[below]), 6)


@exits
def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, write the thresholds and print where they went."""
    parser = parser_of("python -m scripts.calibrate", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="as those of run.py")
    overrides = parser.parse_args(argv).overrides
    path = calibrate(compose([f"limit={SAMPLES}", *overrides]))
    print(f"use it with: method=kvmerger method.budget_mode=eps_layer method.thresholds={path}")
    return 0


def calibrate(settings: Settings) -> Path:
    """Run the prompts once and write one threshold a layer.

    Returns:
        the file.

    Raises:
        UserError: as a run does, and where there is no threshold to calibrate.
    """
    cells = [cell for cell in settings.cells if not cell.is_full] or settings.cells  # no baseline
    if len(cells) != 1:
        raise UserError(
            f"{len(cells)} cells were given; thresholds are calibrated for one method at one "
            "budget, e.g. method=kvmerger budget=0.35."
        )
    (cell,) = cells
    method = cell.method
    if not isinstance(method, KVMerger):
        raise UserError(
            f"{cell.name} has no thresholds to calibrate: only KVMerger has. Leave method=... out, or "
            "give method=kvmerger."
        )
    model, tokenizer = load(settings.model)
    counts = Counts(method, cell.budget)
    jobs = [(task, sample) for task in settings.benchmark.tasks for sample in settings.samples(task)]
    for task, sample in tqdm(jobs, unit="sample", desc="calibrate"):
        ids = settings.benchmark.encode(sample, task, tokenizer, settings.prompt_format).prompt
        prompt = torch.tensor([ids], device=model.device)
        run_sample(model, prompt, [Row(method, cell.budget)], Stop(1, frozenset()), observer=counts)
    if not counts.excess:
        raise UserError(f"budget={cell.budget} holds every prompt; lower it, or take longer prompts.")
    path = OUT / f"{settings.model.name}@{cell.budget}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = len(windows(model.config))
    content = {
        "model": settings.model.name,
        "benchmark": settings.benchmark.name,
        "samples": len(jobs),
        "cell": cell.name,
        "linkage": method.linkage,
        "thresholds": [counts.threshold(layer) for layer in range(layers)],
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
