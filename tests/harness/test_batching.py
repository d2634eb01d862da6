from __future__ import annotations

import pytest
import torch

from harness import batching
from harness.batching import BatchSize, entry_bytes
from kvmerge.budget import Budget
from kvmerge.engine import Comparison
from kvmerge.errors import UserError
from kvmerge.hook import hooked
from kvmerge.resolve import load_method
from kvmerge.session import Row
from tests.tiny import FAMILIES, prompt, shared_model


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand entries are free for caches."""
    each = entry_bytes(shared_model())
    monkeypatch.setattr(batching, "free_bytes", lambda _: 4 * 1000 * each)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entrys_bytes_are_those_of_the_cache(family: str) -> None:
    model = shared_model(family)
    comparison = Comparison(model, [Row(load_method("full"), Budget.parse(1))])
    with hooked(model), torch.inference_mode():
        comparison.prefill(prompt(40), 3)
    assert sum(layer.nbytes() for layer in comparison.session.layers) == 40 * entry_bytes(model)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("entries", "taken"),
    [([300, 300, 300, 300], 3), ([1000, 1], 1), ([2000, 1], 1), ([1], 1), ([500, 500, 1], 2)],
)
def test_auto_takes_what_fits_a_quarter_of_the_free_memory(entries: list[int], taken: int) -> None:
    assert BatchSize("auto", shared_model(), rows=7).take(entries) == taken


def test_auto_takes_fewer_samples_the_more_rows_they_bring() -> None:
    sizes = [BatchSize("auto", shared_model(), rows).take([1] * 100) for rows in (1, 7, 40, 500)]
    assert sizes == [64, 9, 1, 1]


@pytest.mark.usefixtures("free")
def test_a_given_size_is_kept_to() -> None:
    assert BatchSize(5, shared_model(), rows=7).take([900] * 9) == 5
    assert BatchSize(5, shared_model(), rows=7).take([900] * 2) == 2


def test_only_auto_shrinks_and_not_below_one() -> None:
    size = BatchSize("auto", shared_model(), rows=7)
    size.shrink(9)
    assert size.take([1] * 9) == 4
    with pytest.raises(UserError, match=r"batch_size=1 .* fewer cells"):
        size.shrink(1)
    with pytest.raises(UserError, match=r"batch_size=5 .* batch_size=auto"):
        BatchSize(5, shared_model(), rows=7).shrink(5)
