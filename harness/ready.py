"""What must hold before a run pays for anything: a run and its plan ask here, so that they agree.

What costs nothing is looked at first: the folder, the data, what its lines were made with. Where
samples are left, the model is looked at without its weights, and some of their prompts are made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.source import NeedsDownload
from harness.answering import Job, encode, place
from harness.maps import chosen_maps
from harness.provenance import check_resumable, fingerprint, stale_cells
from harness.results import OBSERVATIONS, Results
from harness.settings import Settings
from harness.variants import check_noise
from kvmerge.budget import Budget
from kvmerge.errors import UserError
from kvmerge.families import local_windows
from kvmerge.limits import check_fits
from kvmerge.models import Outline, added_stop_ids, outline
from kvmerge.rope import Rope

logger = logging.getLogger(__name__)

_LONG = 10**9
"""Tokens of a prompt of which only the layers' shares of a budget are asked."""


@dataclass(frozen=True)
class Pending:
    """What a run finds to do."""

    jobs: list[Job]
    finished: list[Job]
    """A few finished samples of the same tasks, to compare their prompts."""
    ids: Mapping[str, Sequence[str]]
    """Each task's samples in the benchmark's order: all, whatever this run takes of them."""
    taken: int
    """Samples that this run takes, finished or not."""

    @property
    def counts(self) -> dict[str, int]:
        """Samples that each task has in all."""
        return {task: len(ids) for task, ids in self.ids.items()}


@dataclass(frozen=True)
class Ready(Pending):
    """A run that nothing is known to stand in the way of."""

    prints: Mapping[str, Any]
    """Fingerprint of the run and of what its folder holds."""
    stale: Mapping[str, str]
    """Cells whose lines are to be answered anew, and why."""
    model: Outline | None
    """None where nothing is left, so that nobody looked."""


def get_ready(
    settings: Settings,
    results: Results,
    find: Callable[[], Pending],
    known: Outline | None = None,
    *,
    downloads: bool = True,
) -> Ready:
    """Make every check that needs no weights, and return what there is to do. Writes nothing.

    Args:
        settings: the run.
        results: the folder that it writes into; lines that are to be answered anew are left out of it.
        find: returns what is left.
        known: the model's outline, where that was looked at already.
        downloads: whether caches may be filled with what the run needs.

    Raises:
        UserError: naming the setting, file or sample with which the run would end.
    """
    refuse_mixed(settings)
    if settings.judgement.noise is not None:
        folder = Path(settings.judgement.noise).expanduser()
        check_noise(folder, settings.model.name, settings.benchmark.name)
    try:
        current = fingerprint(settings, settings.benchmark.fingerprint())
        stale = stale_cells(results, current) if settings.stale == "rerun" else {}
        for cell, why in stale.items():
            logger.warning("%s is answered anew: %s", cell, why)
            results.leave_out(cell)
        found = find()  # before what is there is compared, as it names the line of a bad row
    except NeedsDownload:
        _check_model(settings, known or outline(settings.model, downloads=downloads))
        raise
    prints = check_resumable(results, current)
    if found.jobs:
        known = known or outline(settings.model, downloads=downloads)
        _check_model(settings, known)
        _check_prompts(settings, known, found)
    return Ready(**vars(found), prints=prints, stale=stale, model=known if found.jobs else None)


def refuse_mixed(settings: Settings) -> None:
    """Refuse to share an output_dir between a whole run and shards, between two splits, or between a
    run that answers and one that observes.

    They would overlap, and the report could not merge them.
    """
    folder = settings.output_dir
    kept, other = (
        ("predictions", OBSERVATIONS) if settings.observe is None else (OBSERVATIONS, "predictions")
    )
    if (folder / other).exists() or any(folder.glob(f"shards/*/{other}")):
        raise UserError(f"{folder} holds {other}, so no {kept} go there. Choose another output_dir.")
    found = {path.name.partition("-of-")[2] for path in folder.glob("shards/*-of-*")}
    if (folder / kept).exists():
        found.add("1")
    others = sorted(found - {str(settings.num_shards)})
    if others:
        raise UserError(
            f"{folder} holds results of num_shards={others[0]}, so num_shards={settings.num_shards} "
            "cannot be added to it. Go on with the former, or choose another output_dir."
        )


def _check_model(settings: Settings, known: Outline) -> None:
    """Refuse what the model's layers and tokens cannot do, whatever the prompts."""
    if known.tokenizer is not None:
        added_stop_ids(known.tokenizer, settings.model)
    model = known.skeleton
    if model is None:
        return
    settings.policy.check_layers(len(local_windows(model.config)))
    if settings.observe is not None:
        chosen_maps(model.config, settings.observe)
    if model.device.type == "meta" and _turns(settings):
        Rope.check(model)
    for cell in settings.cells:
        if isinstance(cell.budget.value, float):
            _check_shares(settings, model, cell.budget)


def _turns(settings: Settings) -> bool:
    """Return whether any cell turns keys that are cached."""
    return settings.policy.rolled or any(cell.method.needs_rope for cell in settings.cells)


def _check_shares(settings: Settings, model: PreTrainedModel, budget: Budget) -> None:
    """Refuse to skip layers that are more than a fraction leaves, by any length of prompt."""
    windows = local_windows(model.config)
    local = frozenset(index for index, window in enumerate(windows) if window is not None)
    for layer in sorted(set(range(len(windows))) - local):
        settings.policy.allowance(budget, _LONG, layer, len(windows), local)


def _check_prompts(settings: Settings, known: Outline, found: Pending) -> None:
    """Refuse samples that the model or a method could not take, and those that are others today.

    Of each task the first, the shortest and the longest are looked at.
    """
    tokenizer = known.tokenizer
    if tokenizer is None:
        return
    for job in found.finished:
        encode(settings, tokenizer, job)  # refuses a prompt that would be another today
    for job in _telling(found.jobs):
        _check_prompt(settings, known.skeleton, tokenizer, job)


def _telling(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield of each task the jobs whose prompts are the first, the shortest and the longest."""
    for _, of_task in groupby(jobs, key=lambda job: job.task):
        listed = list(of_task)
        lengths = [len(job.sample.prompt) for job in listed]
        places = [0, lengths.index(min(lengths)), lengths.index(max(lengths))]
        yield from (listed[place] for place in dict.fromkeys(places))


def _check_prompt(
    settings: Settings,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
) -> None:
    encoded = encode(settings, tokenizer, job)
    if model is None:
        return
    length = len(encoded.prompt)
    answer = len(encoded.continuation or ()) or job.task.max_new_tokens
    windows = local_windows(model.config)
    try:
        check_fits(
            model.config,
            length,
            answer if settings.observe is None else 1,
            context=settings.model.context,
            may_overrun=job.task.may_overrun,
        )
        for cell, _ in job.missing:
            settings.policy.check_prompt(cell.method, cell.budget, len(encoded.context), windows)
    except UserError as error:
        raise type(error)(f"{place(job, length)}: {error}") from error
