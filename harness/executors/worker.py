"""A worker: a loaded model that turns units into outcomes. The same whichever executor it works for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from harness.answering import Answerer, Job
from harness.executors.units import Answered, Outcome, Unit
from harness.failures import Failure, is_of_run
from harness.settings import Settings
from kvmerge.errors import summary
from kvmerge.families import local_windows
from kvmerge.models import Outline, load

logger = logging.getLogger(__name__)


class Worker:
    """Answers units with a model that it holds; writes nothing."""

    def __init__(
        self, settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._answerer = Answerer(settings, model, tokenizer)
        self.notes = counted_layers(model.config)
        """What a reader of the results must know of the model."""

    @classmethod
    def load(cls, settings: Settings, known: Outline | None = None, cores: int | None = None) -> Self:
        """Load the model of a run.

        Args:
            settings: the run.
            known: the model's outline, where that was looked at already.
            cores: threads to work with, where torch is not to use those of the whole process. What
                OpenMP reads is settled before torch is imported (`harness.start.settle_threads`).

        Raises:
            UserError: if the model cannot be loaded.
        """
        if cores is not None:
            torch.set_num_threads(cores)
        return cls(settings, *load(settings.model, known))

    def answer(self, unit: Unit) -> Iterator[Outcome]:
        """Answer a unit, and yield an outcome for each of its samples.

        Where something is raised, the samples that are left are answered one by one, and only those
        that raise it again are failures.

        Raises:
            UserError: for what holds for the whole run.
        """
        left = {job.sample.id: job for job in unit.jobs}
        if len(left) > 1:
            try:
                for outcome in self._together(unit.jobs):
                    del left[outcome.id]
                    yield outcome
            except Exception as error:
                if is_of_run(error):
                    raise
                logger.warning(
                    "task %s: %s in a batch; its %d samples are answered one by one",
                    *(unit.task.name, summary(error), len(left)),
                )
        for job in left.values():
            yield self._alone(job)

    def _together(self, jobs: Sequence[Job]) -> Iterator[Answered]:
        for prompt, lines in self._answerer.answer(jobs):
            yield Answered(jobs[0].task.name, prompt, [(cell.name, record) for cell, record in lines])

    def _alone(self, job: Job) -> Outcome:
        try:
            (answered,) = self._together([job])
        except Exception as error:
            if is_of_run(error):
                raise
            return Failure.of(job, error)
        return answered


def counted_layers(config: PretrainedConfig) -> list[str]:
    """Return a note on which layers a budget counts, where it does not count all."""
    windows = local_windows(config)
    local = [window for window in windows if window is not None]
    if not local:
        return []
    return [
        f"Budgets and kept entries count {len(windows) - len(local)} of {len(windows)} layers; the "
        f"others keep a window of {max(local)} tokens in every cell."
    ]
