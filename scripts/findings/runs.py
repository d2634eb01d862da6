"""Which runs the findings stand on, in the order of what they tell for their time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.settings import compose
from kvmerge.cells import Cell

EXPERIMENTS = ("merging", "field", "ours")
_LEFT_OUT = (0.5, 0.1, 0.05)
"""Budgets that only the first setting has."""
_ASKING = "benchmark.tasks=[passkey,key_value,passage_retrieval,passage_qa,classification,quotation]"
"""The tasks of mini that say where their context ends."""


_NEEDLES = "benchmark.lengths=[1024]", "benchmark.depths=[0,25,50,75,100]", "benchmark.repeats=8"
_SLOW = ("attention_matching",)
_LONG = ("benchmark.tasks=[passkey,key_value,passage_qa,quotation]",)
_ENGLISH = (
    "benchmark.tasks=[qasper,multifieldqa_en,hotpotqa,2wikimqa,trec,triviaqa,samsum,"
    "passage_retrieval_en]",
)


@dataclass(frozen=True)
class Setting:
    """One benchmark in one mode."""

    benchmark: str
    question: str
    limit: int
    """Samples of each task."""
    options: tuple[str, ...] = ()
    every_budget: bool = False
    shortened: tuple[str, ...] = ("merging",)
    """Experiments for which `<name>_short` stands here."""
    field_limit: int | None = None
    """The same of the field, and of ours beside it, where they are fewer."""
    too_slow: tuple[str, ...] = ()
    """Methods that are left out for the time that they take with its prompts."""
    asks: bool = True
    """False where nothing is asked: what follows the prompt is scored."""

    @property
    def name(self) -> str:
        """The folder's name, e.g. `needle-after`."""
        return f"{self.benchmark}-{self.question}"

    def samples(self, experiment: str) -> int:
        """Return how many samples of each task an experiment has here."""
        return self.limit if experiment == "merging" else self.field_limit or self.limit

    def words(self, experiment: str) -> Iterator[str]:
        """Yield the words of the command line that runs an experiment here, but for size and place."""
        chosen = f"{experiment}_short" if experiment in self.shortened else experiment
        yield f"experiment={chosen}"
        yield f"benchmark={self.benchmark}"
        yield f"question={self.question}"
        yield "num_seeds=1"
        yield from self.options
        cells = compose([f"experiment={chosen}"]).cells
        names = [f"'{cell.name}'" for cell in cells if self._has(cell)]
        if len(names) < len(cells):
            yield f"cells=[{','.join(names)}]"

    def _has(self, cell: Cell) -> bool:
        every = self.every_budget or cell.budget.value not in _LEFT_OUT
        return every and cell.method_name not in self.too_slow


SETTINGS = (
    Setting("mini", "after", 6, (_ASKING,), field_limit=3, every_budget=True, shortened=()),
    Setting("perplexity", "inside", 16, ("benchmark.scored_tokens=128",), shortened=(), asks=False),
    Setting("needle", "after", 40, _NEEDLES),
    Setting("mini_long", "after", 4, _LONG, too_slow=_SLOW),
    Setting("longbench", "after", 2, _ENGLISH, too_slow=_SLOW),
    Setting("mini", "inside", 3),
    Setting("needle", "inside", 20, _NEEDLES),
    Setting("mini_long", "inside", 2, _LONG, too_slow=_SLOW),
    Setting("longbench", "inside", 2, _ENGLISH, field_limit=1, too_slow=_SLOW),
)
