"""The seam between a run and whoever answers its samples.

An executor is a dataclass of its settings, chosen by `configs/executor/<name>.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.executors.units import Outcome, Unit
from harness.settings import Settings
from kvmerge.models import Outline

Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class Workers(Protocol):
    """Workers that are ready."""

    count: int
    """How many there are."""
    notes: Sequence[str]
    """What a reader of the results must know of the model that they loaded."""

    def answer(self, units: Sequence[Unit], is_stopping: Callable[[], bool]) -> Iterator[Outcome]:
        """Answer units, and yield an outcome for each of their samples as it is there, in any order.

        Args:
            units: task by task.
            is_stopping: whether the run is to end: no unit is begun then, and those that were begun
                are finished.

        Raises:
            UserError: what holds for the whole run, as a worker raised it.
        """
        ...


class Executor(Protocol):
    """Settings of where a run is carried out."""

    def start(
        self, settings: Settings, known: Outline | None, loaded: Loaded | None
    ) -> AbstractContextManager[Workers]:
        """Return workers for the block, each with the model loaded; after it nothing of them is left.

        Args:
            settings: the run.
            known: the model's outline, from the checks that the run made.
            loaded: the model and its tokenizer, where this process has them already.

        Raises:
            UserError: if there can be no such workers, or they cannot load the model.
        """
        ...
