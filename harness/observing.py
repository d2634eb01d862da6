"""The loop of a run that observes: a prefill a sample, and a line as it is measured.

Nothing is answered. As with answers, a killed run loses at most the sample it was at, a sample that
raises stops no other, and running again goes on with those that have no line.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.answering import Job, encode, place, prompt_hash
from harness.failures import Failure, Failures, is_of_run
from harness.given import Observe
from harness.maps import chosen_maps
from harness.observation import Observation, Observed, read_maps
from harness.progress import Step
from harness.ready import Pending, Ready
from harness.runner import COMPARED, Begun, carry_out, drop_finished
from harness.settings import Settings
from kvmerge.errors import UserError, is_out_of_memory, unknown
from kvmerge.families import local_windows
from kvmerge.files import write_atomically
from kvmerge.models import load
from kvmerge.observations import Maps, has_fixed_rotation, map_block, observe

logger = logging.getLogger(__name__)


def observe_all(settings: Settings) -> Observed:
    """Observe every sample that has no line yet and return what lies in `settings.results_dir` then.

    Samples that could not be observed are in `failures` of what is returned; the others are done.

    Raises:
        UserError: if data, weights or settings cannot be used, or the folder holds results made
            with other settings. What is finished stays.
    """
    results = Observed(settings.results_dir)

    @contextlib.contextmanager
    def begin(found: Ready) -> Iterator[Begun]:
        logger.info("loading %s", settings.model.name)
        model, tokenizer = load(settings.model, found.model)
        observer = _Observer(settings, results, model, tokenizer)

        def work(is_stopping: Callable[[], bool]) -> Iterator[Step]:
            for job in found.jobs:
                if is_stopping():
                    return
                _try(observer, job, results.failures)
                yield Step(job.task.name)

        yield Begun(work, _unobserved(model))

    found = carry_out(settings, results, lambda: pending_observations(settings, results), begin)
    drop_finished(results, found, lambda each: _is_observed(results, each))
    return results


def _try(observer: _Observer, job: Job, failures: Failures) -> None:
    """Observe one sample; if that fails for reasons of its own, write that down instead."""
    try:
        observer.observe(job)
    except Exception as error:
        if is_of_run(error):
            raise
        failures.add(Failure.of(job, error))
    else:
        failures.drop_sample(job.task.name, job.sample.id)


def _is_observed(results: Observed, failure: Failure) -> bool:
    return any(each.id == failure.id for each in results.observations(failure.task))


def pending_observations(settings: Settings, results: Observed) -> Pending:
    """Find the samples without a line, task by task in the benchmark's order.

    The sample of the maps is among them as long as its maps, as they are wanted, are not there.

    Raises:
        UserError: if the sample of the maps is not one that the run takes.
    """
    assert settings.observe is not None
    undrawn = _lacks_maps(settings, results)
    wanted = settings.observe.map_sample
    jobs: list[Job] = []
    compared: list[Job] = []
    ids = {}
    names = []
    for task in settings.benchmark.tasks:
        recorded = {each.id: each.prompt_hash for each in results.observations(task.name)}
        samples = settings.benchmark.samples(task)
        ids[task.name] = [sample.id for sample in samples]
        of_task = [Job(task, sample, (), recorded.get(sample.id)) for sample in settings.take(samples)]
        names += [_name(job) for job in of_task]
        for job in of_task:
            for_map = undrawn and _name(job) == (wanted or names[0])
            if job.recorded is None or for_map:
                jobs.append(job)
        compared += [job for job in of_task if job.recorded and job not in jobs][:COMPARED]
    if wanted is not None and wanted not in names and settings.num_shards == 1:
        raise unknown("observe.map_sample", wanted, names[:20])
    return Pending(jobs, compared if jobs else [], ids, len(names))


def _name(job: Job) -> str:
    return f"{job.task.name}/{job.sample.id}"


def _lacks_maps(settings: Settings, results: Observed) -> bool:
    """Return whether the maps of the sample, layers and heads that are asked for are still to be made.

    Where no sample is named it is the first one, which shard 0 takes.
    """
    assert settings.observe is not None
    if settings.observe.map_sample is None and settings.shard > 0:
        return False
    maps = read_maps(results.map_file)
    return maps is None or str(maps["asked"]) != _asked(settings.observe)


def _asked(wanted: Observe) -> str:
    return repr((wanted.map_sample, wanted.map_layers, wanted.map_heads))


class _Observer:
    """Observes samples with a loaded model."""

    def __init__(
        self,
        settings: Settings,
        results: Observed,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        assert settings.observe is not None
        self.settings, self.results, self.model, self.tokenizer = settings, results, model, tokenizer
        self.wanted = settings.observe
        self.layers, self.heads = chosen_maps(model.config, self.wanted)
        self.undrawn = _lacks_maps(settings, results)
        """Whether the maps are still to be made, of the first sample that is theirs."""

    def observe(self, job: Job) -> None:
        """Observe one sample, and write down what was seen: its maps before its line."""
        settings = self.settings
        prompt = encode(settings, self.tokenizer, job).prompt
        is_drawn = self.undrawn and self.wanted.map_sample in (None, _name(job))
        maps = Maps(self.layers, self.heads) if is_drawn else None
        started = time.perf_counter()
        where = place(job, len(prompt))
        try:
            layers = observe(
                self.model,
                torch.tensor([prompt], device=self.model.device),
                self.wanted,
                context=settings.model.context,
                may_overrun=job.task.may_overrun,
                maps=maps,
            )
        except UserError as error:
            raise type(error)(f"{where}: {error}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{where}: out of memory on {self.model.device}. Use a smaller model.max_length, or a "
                "larger device, and run the same command again: it resumes."
            ) from error
        seconds = time.perf_counter() - started
        if maps is not None:
            self._write(maps, job, len(prompt))
            self.undrawn = False
        if job.recorded is None:
            observation = Observation.of(
                layers,
                sample=job.sample.id,
                prompt_hash=prompt_hash(prompt),
                tokens=len(prompt),
                seconds=seconds,
            )
            self.results.add_observation(job.task.name, observation)

    def _write(self, maps: Maps, job: Job, tokens: int) -> None:
        drawn = [maps.drawn[layer].float().cpu().numpy() for layer in self.layers]
        content: dict[str, NDArray[np.generic]] = {
            "maps": np.array(drawn, dtype=np.float16),
            "layers": np.array(self.layers),
            "heads": np.array(self.heads),
            "tokens": np.array(tokens),
            "block": np.array(map_block(tokens)),
            "sample": np.array(_name(job)),
            "asked": np.array(_asked(self.wanted)),
        }
        file = io.BytesIO()
        np.savez_compressed(file, **content)  # type: ignore[arg-type]
        write_atomically(self.results.map_file, file.getvalue())


def _unobserved(model: PreTrainedModel) -> list[str]:
    """Return a note on what of the model is not observed."""
    windows = local_windows(model.config)
    local = [str(index) for index, window in enumerate(windows) if window is not None]
    notes = []
    if local:
        notes.append(f"Layers {', '.join(local)} are left to a window of their own: not observed.")
    if not has_fixed_rotation(model):
        notes.append("Keys before RoPE are not observed: the model's rotation cannot be undone.")
    return notes
