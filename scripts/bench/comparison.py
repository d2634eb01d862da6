"""Does a comparison of seven cells cost about one run of the full cache?"""

from __future__ import annotations

from scripts.bench.measure import Bench, Report, against

_GENERATE = "generate"


def comparison(bench: Bench, samples: int = 4, length: int = 3500, tokens: int = 64) -> Report:
    """Time seven cells against one full-cache `generate` of plain transformers."""
    prompts = [bench.prompt(length, number) for number in range(samples)]
    full, all_cells = bench.rows(bench.cells[:1]), bench.rows(bench.cells)
    seconds = bench.in_turn(
        {
            _GENERATE: lambda: bench.generate(bench.plain, prompts, tokens),
            "generate, packed weights": lambda: bench.generate(bench.model, prompts, tokens),
            "full cache alone": lambda: bench.run(prompts, full, tokens),
            f"{len(all_cells)} cells": lambda: bench.run(prompts, all_cells, tokens),
            f"{len(all_cells)} cells, {samples} samples at once": lambda: bench.run(
                prompts, all_cells, tokens, samples
            ),
        }
    )
    return Report(
        "comparison",
        "Seven cells against one full-cache generate",
        f"{samples} prompts of {length:,} tokens, {tokens} answer tokens, fidelity off. "
        f"`{_GENERATE}`: plain transformers with SDPA and torch's own linear layers.",
        against(seconds, _GENERATE),
        "at most 1.5 times generate; 1.25 is the goal",
        {"seconds": seconds, "cells": bench.cells},
    )
