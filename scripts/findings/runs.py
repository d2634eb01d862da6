"""Which runs the findings stand on, in the order of what they tell for their time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.settings import compose

EXPERIMENTS = ("merging", "field", "ours")
_LEFT_OUT = (0.5, 0.1, 0.05)
"""Budgets that only the first setting has."""
_ASKING = "benchmark.tasks=[passkey,key_value,passage_retrieval,passage_qa,classification,quotation]"
"""The tasks of mini that say where their context ends."""


@dataclass(frozen=True)
class Setting:
    """One benchmark in one mode."""

    benchmark: str
    question: str
    limit: int
    """Samples of each task that the committed results have."""
    options: tuple[str, ...] = ()
    every_budget: bool = False
    shortened: tuple[str, ...] = ("merging",)
    """Experiments for which `<name>_short` stands here."""

    @property
    def name(self) -> str:
        """The folder's name, e.g. `needle-after`."""
        return f"{self.benchmark}-{self.question}"

    def words(self, experiment: str) -> Iterator[str]:
        """Yield the words of the command line that runs an experiment here, but for its folder."""
        chosen = f"{experiment}_short" if experiment in self.shortened else experiment
        yield f"experiment={chosen}"
        yield f"benchmark={self.benchmark}"
        yield f"question={self.question}"
        yield "num_seeds=1"
        yield from self.options
        if not self.every_budget:
            cells = compose([f"experiment={chosen}"]).cells
            names = [f"'{cell.name}'" for cell in cells if cell.budget.value not in _LEFT_OUT]
            yield f"cells=[{','.join(names)}]"


SETTINGS = (
    Setting("mini", "after", 2, (_ASKING,), every_budget=True, shortened=()),
    # nothing is asked: what follows the prompt is scored
    Setting("perplexity", "inside", 6, ("benchmark.scored_tokens=128",), shortened=()),
    Setting(
        "needle",
        "after",
        10,
        ("benchmark.lengths=[1024]", "benchmark.depths=[0,25,50,75,100]", "benchmark.repeats=2"),
    ),
    Setting("mini", "inside", 1),
    Setting(
        "mini_long",
        "after",
        1,
        ("benchmark.tasks=[passkey,key_value,passage_qa,quotation]",),
    ),
    Setting(
        "longbench",
        "after",
        1,
        (
            "benchmark.tasks=[qasper,multifieldqa_en,hotpotqa,2wikimqa,trec,triviaqa,samsum,"
            "passage_retrieval_en]",
        ),
        shortened=EXPERIMENTS[:2],
    ),
)
