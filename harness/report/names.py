"""Methods, budgets and cells as people write them: `KVMerger (top=0.1)`, `35%`.

Files, records and commands go on naming a cell `kvmerger:top=0.1@0.35`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from kvmerge.budget import Budget
from kvmerge.names import parse_name

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
    "ada_snapkv": ("Ada-SnapKV", ""),
    "tova": ("TOVA", ""),
    "d2o": ("D2O", ""),
    "look_m": ("LOOK-M", ""),
    "keepkv": ("KeepKV", ""),
    "attention_matching": ("Attention matching", ""),
    "zsmerge": ("ZSMerge", ""),
    "adjacent_merge_ours": ("Adjacent merging", "ours"),
    "fold": ("Fold", ""),
    "key_norm": ("Key norm", ""),
    "keydiff": ("KeyDiff", ""),
    "lagkv": ("LagKV", ""),
    "chunkkv": ("ChunkKV", ""),
    "expected_attention": ("Expected attention", ""),
    "replay": ("Replay", "ours"),
    "random": ("Random", ""),
    "random_all": ("Random", "all"),
    "meanpool_sets": ("Mean pooling", "sets"),
    "meanpool_chunks": ("Mean pooling", "chunks"),
    "pivot_only": ("Pivot only", ""),
}
"""By method: its name, and which of the methods of that name it is."""


_MODELS = {"smollm2": "SmolLM2", "llama2": "Llama-2", "llama3": "Llama-3"}
_BENCHMARKS = {
    "longbench": "LongBench",
    "longbench_e": "LongBench-E",
    "minilongbench": "MiniLongBench",
    "zero_scrolls": "ZeroSCROLLS",
    "zero_scrolls_test": "ZeroSCROLLS (test)",
}


def model_label(name: str) -> str:
    """Write a model's name as its authors do: `SmolLM2-135M`, `Llama-2-7B-Chat`."""

    def part(text: str) -> str:
        is_size = re.fullmatch(r"[\d.]+[mb]", text)
        return _MODELS.get(text) or (text.upper() if is_size else text[:1].upper() + text[1:])

    return "-".join(map(part, name.split("-"))) if re.fullmatch(r"[a-z0-9.-]+", name) else name


def benchmark_label(name: str) -> str:
    """Write a benchmark's name as its authors do; one that is not known here keeps its own name."""
    return _BENCHMARKS.get(name, name)


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
    """Write a cell as `KVMerger 35%`; the full cache, which has but one budget, without it.

    Published numbers are also of methods whose budget nobody said: these have no `@`.
    """
    if "@" not in cell:
        return method_label(cell)
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
