"""Methods, budgets and cells as people write them: `KVMerger (top=0.1)`, `35%`.

Files, records and commands go on naming a cell `kvmerger:top=0.1@0.35`.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmerge.budget import Budget
from kvmerge.cells import parse_name

_PRINTED = {
    "full": ("Full cache", ""),
    "kvmerger": ("KVMerger", ""),
    "kvmerger_sized": ("KVMerger", "sized"),
    "kvmerger_log": ("KVMerger", "log"),
    "h2o": ("H2O", ""),
    "h2o_sim_decode": ("H2O", "sim. decode"),
    "h2o_sim_prefill": ("H2O", "sim. prefill"),
    "cam": ("CaM", ""),
    "cam_hh": ("CaM", "hh"),
    "cam_generate": ("CaM", "generate"),
    "streaming_llm": ("StreamingLLM", ""),
    "snapkv": ("SnapKV", ""),
    "pyramidkv": ("PyramidKV", ""),
    "tova": ("TOVA", ""),
    "d2o": ("D2O", ""),
    "random": ("Random", ""),
    "random_all": ("Random", "all"),
    "meanpool_sets": ("Mean pooling", "sets"),
    "meanpool_chunks": ("Mean pooling", "chunks"),
    "pivot_only": ("Pivot only", ""),
}
"""By method: its name, and which of the methods of that name it is."""


def method_label(variant: str) -> str:
    """Name a method with its options in brackets; one that is not known here keeps its own name."""
    method, _, options = variant.partition(":")
    name, kind = _PRINTED.get(method, (method, ""))
    inside = ", ".join(filter(None, (kind, *options.split(","))))
    return f"{name} ({inside})" if inside else name


def budget_label(budget: Budget) -> str:
    """Write a budget as `35%`, or as `1,024 entries`."""
    if isinstance(budget.value, int):
        return f"{budget.value:,} entries"
    return f"{100 * budget.value:.6g}%"


def cell_label(cell: str) -> str:
    """Write a cell as `KVMerger 35%`; the full cache, which has but one budget, without it."""
    name = parse_name(cell)
    label = method_label(name.variant)
    return label if name.method == "full" else f"{label} {budget_label(name.budget)}"


def budget_groups(cells: Iterable[str]) -> dict[str, list[str]]:
    """Return cells by the label of their budget, the full cache by its own, in order of appearance."""
    groups: dict[str, list[str]] = {}
    for cell in cells:
        name = parse_name(cell)
        label = cell_label(cell) if name.method == "full" else budget_label(name.budget)
        groups.setdefault(label, []).append(cell)
    return groups
