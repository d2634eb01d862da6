"""How many samples are run at once, by the memory that their caches need.

Every sample has a prefill of its own; a batch shares the decode steps, which read all weights for a
few rows. So more rows cost little time, until memory runs out.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence

import psutil
import torch
from transformers import PreTrainedModel

from kvmerge.errors import Infeasible
from kvmerge.models import attention_sizes

logger = logging.getLogger(__name__)

_MOST_ROWS = 64
"""Rows decoded together under `auto`; beyond it a step takes longer for each row."""
_SHARE = 0.25
"""Part of the free memory that caches may take under `auto`; activations need the rest."""


class BatchSize:
    """The largest batch that is tried; under `auto` it halves whenever memory runs out."""

    def __init__(self, wanted: int | str, model: PreTrainedModel, rows: int) -> None:
        """Take `auto`, or a number that is kept to.

        Args:
            rows: rows that each sample brings.
        """
        self.auto = wanted == "auto"
        self.most = most_samples(wanted, rows)
        """Samples that may run together."""
        self._device = model.device
        self._entry = entry_bytes(model)

    def take(self, entries: Sequence[int]) -> int:
        """Return how many of the next samples to run together, at least one.

        Args:
            entries: entries that each sample's rows may hold in the end, per KV head and layer.
        """
        most = min(self.most, len(entries))
        if not self.auto:
            return most
        return samples_that_fit(entries[:most], self._entry, free_bytes(self._device))

    def shrink(self, used: int) -> None:
        """Lower the size after a batch of `used` samples ran out of memory, and say so.

        Raises:
            Infeasible: if the size was given, or one sample alone is too large.
        """
        if used == 1 or not self.auto:
            raise Infeasible(
                f"out of memory with batch_size={used} on {self._device}. Use "
                + ("batch_size=auto" if used > 1 else "fewer cells or a smaller model.max_length")
                + " and run the same command again: it resumes."
            )
        self.most = used // 2
        logger.warning("out of memory with %d samples at once; going on with %d", used, self.most)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def most_samples(wanted: int | str, rows: int) -> int:
    """Return how many samples of so many rows each may run together, whatever memory allows."""
    return max(1, _MOST_ROWS // rows) if wanted == "auto" else int(wanted)


def unit_numbers(contexts: Iterable[Hashable], most: int) -> list[int]:
    """Return the number of the unit that each sample is answered in.

    Args:
        contexts: what each sample's prefill is of; those of one context are answered together.
        most: contexts of a unit.
    """
    places: dict[Hashable, int] = {}
    return [places.setdefault(context, len(places)) // most for context in contexts]


def samples_that_fit(entries: Sequence[int], entry: int, free: float) -> int:
    """Return how many of some samples `auto` runs together, at least one.

    Args:
        entries: entries that each sample's rows may hold in the end, per KV head and layer.
        entry: bytes of one, over all layers and KV heads.
        free: bytes of memory that are free.
    """
    fitting = (n for n in range(len(entries), 1, -1) if sum(entries[:n]) * entry <= _SHARE * free)
    return next(fitting, 1)


def entry_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one entry, key and value, over all layers and KV heads."""
    _, kv_heads, head_dim = attention_sizes(model.config)
    return int(2 * model.config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free where caches live."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
