"""Estimate what the paper's whole grid takes on cards, as docs/cost.md shows it.

    python -m scripts.grid

Llama 2 7B and 13B and both Mistral 7B on LongBench and ZeroSCROLLS, seven cells: by what is
published of the cards and the mean lengths in `scripts/grid_lengths.json`, without data or models. A
run shares one prefill between its cells; beside it stand seven runs of one cell each.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.task import Task
from harness.plan.cost import Range, costs, published
from harness.plan.sizes import sizes_of
from harness.plan.tokens import Sized, Tokens
from harness.settings import Settings, compose

MODELS = (
    "llama2-7b-chat",
    "llama2-13b-chat",
    "mistral-7b-instruct-v0.1",
    "mistral-7b-instruct-v0.2",
)
BENCHMARKS = {"longbench": "paper_longbench", "zero_scrolls": "paper_zeroscrolls"}
CARDS = ("a100-80", "h100")
WORKERS = 8
_LENGTHS = Path(__file__).with_name("grid_lengths.json")
_TOKENS_A_WORD = 1.4
"""Of English: six characters a word with its space, at 4.3 a token as `harness.plan.tokens` has it."""
_ALIKE = 64
"""Samples that stand for those of a task: as many as ever decode together."""


def main() -> int:
    """Print a table a card."""
    for card in CARDS:
        print("\n".join(table(card)))
        print()
    return 0


def table(card: str) -> Iterator[str]:
    """Yield the lines of a card's table, as Markdown."""
    yield (
        f"| {card}: model, benchmark | one run, h | the same without fidelity, h | seven runs, h | "
        f"one run on {WORKERS} cards, h | seven runs on {WORKERS} cards, h |"
    )
    yield "|---|---:|---:|---:|---:|---:|"
    for model in MODELS:
        for benchmark in BENCHMARKS:
            given = [f"experiment={BENCHMARKS[benchmark]}", f"model={model}"]
            whole = settings(given)
            cells = [f"cells=['{cell.name}']" for cell in whole.cells]
            runs = [
                [whole],
                [settings([*given, "fidelity=false"])],
                [settings([*given, "fidelity=false", cell]) for cell in cells],
            ]
            one, plain, seven = ([hours(each, card) for each in of_kind] for of_kind in runs)
            shared = [
                Range.sum([work * (1 / WORKERS) + loading for work, loading in of_kind])
                for of_kind in (one, seven)
            ]
            columns = [*(Range.sum([a + b for a, b in of]) for of in (one, plain, seven)), *shared]
            yield f"| {model}, {benchmark} | " + " | ".join(map(_shown, columns)) + " |"


def settings(given: Sequence[str]) -> Settings:
    """Return the settings of a run whose folder holds nothing."""
    return compose([*given, f"output_dir={tempfile.gettempdir()}/kvmerge-grid-of-nothing"])


def hours(of: Settings, card: str) -> tuple[Range, Range]:
    """Return how long a run takes one card without loading the model, and how long that takes."""
    sizes = sizes_of(of.model, None)
    assert sizes is not None
    machine = published(of, sizes, card)
    cost = costs(of, tokens(of), sizes, machine)
    work = Range.sum([of_task.time for of_task in cost.values()])
    return work * (1 / 3600), machine.loading * (1 / 3600)


def tokens(of: Settings) -> dict[Task, Tokens]:
    """Return prompts of the published mean length, cut as the model's are."""
    cells = tuple(cell for cell in of.cells for _ in of.seeds(cell))
    lengths = json.loads(_LENGTHS.read_text(encoding="utf-8"))[of.benchmark.name]["tasks"]
    found = {}
    for task in of.benchmark.tasks:
        words, samples = lengths[task.name]
        sized = Sized(min(round(_TOKENS_A_WORD * words), of.model.max_length), cells)
        found[task] = Tokens(samples, [sized] * min(samples, _ALIKE), is_exact=False)
    return found


def _shown(time: Range) -> str:
    digits = 1 if time.likely >= 1 else 2
    return f"{time.likely:.{digits}f} ({time.low:.{digits}f}–{time.high:.{digits}f})"


if __name__ == "__main__":
    raise SystemExit(main())
