"""Methods and benchmarks as a user would write them, outside the project."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

METHOD = """
from dataclasses import dataclass

import own_helper
from kvmerge import Method
from kvmerge.method import select


@dataclass(frozen=True)
class Shortest(Method):
    recent: int = 4

    def compress(self, layer, allowance):
        return select(layer, own_helper.keep(layer.keys, allowance.n_keep, self.recent))


@dataclass(frozen=True)
class Demanding(Method):
    recent: int

    def compress(self, layer, allowance):
        return Shortest(self.recent).compress(layer, allowance)


not_a_method = dict
"""
HELPER = """
import torch

from kvmerge.method import top_positions


def keep(keys, n_keep, recent):
    shortness = -keys.float().norm(dim=-1)
    shortness[..., keys.shape[2] - min(recent, n_keep) :] = torch.inf
    return top_positions(shortness, n_keep)
"""
BENCHMARK = """
from benchmarks.encoding import encode_truncating_middle
from benchmarks.metrics import find_metric
from benchmarks.task import Encoded, Sample, Task


class Sums:
    metric = find_metric("qa_f1")

    def __init__(self, count: int = 3, terms: tuple[int, ...] = (1, 2)):
        self.name = "sums"
        self.tasks = (Task("add", self.metric, max_new_tokens=3),)
        self.count, self.terms = count, terms

    def samples(self, task):
        asked = [(str(n), f"What is {n} + {n}?" * 9, (str(2 * n),)) for n in range(self.count)]
        return [Sample(name, task.name, prompt, answers) for name, prompt, answers in asked]

    def encode(self, sample, task, tokenizer, fmt):
        return Encoded(encode_truncating_middle(tokenizer, sample.prompt, fmt, wrap=task.chat))

    def score(self, sample, task, prediction):
        return task.mark(prediction, sample.answers)

    def notes(self):
        return []

    def fingerprint(self):
        return {"add": str(self.count)}
"""
METRIC = """
from benchmarks.metric import Metric, best_of


def begins(prediction, answer):
    return float(prediction[:1] == answer[:1])


BEGINS = Metric("own_metrics.BEGINS", best_of(begins, without=0.0))
PLAIN = Metric("begins", best_of(begins, without=0.0))
LIKE_ANOTHER = Metric("qa_f1", best_of(begins, without=0.0))
"""
MODULES = {
    "own_metrics.py": METRIC,
    "own_methods.py": METHOD,
    "own_helper.py": HELPER,
    "own_tasks.py": BENCHMARK,
}
CONFIGS = {
    "method/mine.yaml": "# Mine.\n_target_: own_methods.Shortest\nrecent: 8\n",
    "method/mine_late.yaml": "# A variant of it.\ndefaults: [mine]\nrecent: 16\n",
    "method/late_h2o.yaml": "# A variant of the project's.\ndefaults: [h2o]\nrecent: 2\n",
    "method/_start.yaml": "# Serves others.\nrecent: 2\n",
    "model/mymodel.yaml": "# Small.\ndefaults: [tiny-random]\nname: mymodel\nmax_length: 600\n",
    "benchmark/sums.yaml": "# Sums.\n_target_: own_tasks.Sums\ncount: 2\n",
    "experiment/mine.yaml": (
        "# @package _global_\n# Mine beside the project's.\n"
        "defaults:\n  - override /model: mymodel\n  - override /benchmark: sums\n"
        "cells: [full@1, h2o@0.5, mine@0.5, mine_late@0.5]\n"
    ),
}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def install(folder: Path, name: str, announced: Mapping[str, Mapping[str, str]]) -> None:
    """What pip leaves of a package that announces entry points, by group."""
    groups = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in of_group.items())
        for group, of_group in announced.items()
    )
    info = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"}
    write(folder / f"{name}-1.0.dist-info", info | {"entry_points.txt": "\n".join(groups)})


@contextmanager
def importable() -> Iterator[None]:
    """Forget the modules of a test afterwards."""
    try:
        yield
    finally:
        for module in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[module]
