from __future__ import annotations

from dataclasses import asdict

import pytest

from baselines.fold import Fold
from harness.plan.cards import CARDS
from harness.plan.published import _SHARES, FAIR, GOOD, POOR, PublishedSpeed, share
from harness.plan.sizes import Sizes
from harness.plan.speed import Batch
from kvmerge.cells import parse_cell
from kvmerge.models import DTYPES
from kvmerge.places import choices
from kvmerge.resolve import load_method

SMALL = Sizes(
    parameters=1e9,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=32,
    intermediate=64,
    vocabulary=100,
    itemsize=2,
    weight_bytes=2e9,
)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_every_figure_and_where_it_was_read(name: str) -> None:
    card = CARDS[name]
    assert set(card.tflops) == set(DTYPES)
    assert all(0 < value < 2000 for value in card.tflops.values())
    assert 100 < card.bandwidth_gb_s < 10_000
    assert card.memory == card.memory_gb * 1e9
    assert "NVIDIA" in card.source


def test_a_prefill_counts_each_product_of_each_weight_and_pair() -> None:
    tokens, operations = 20, 0.0
    for row in range(tokens):
        operations += 2 * SMALL.parameters
        for _ in range(SMALL.layers * SMALL.heads):
            operations += 3 * 2 * SMALL.head_dim * (row + 0.5)  # half of the diagonal
    speed = PublishedSpeed(CARDS["l4"], SMALL, "bfloat16", FAIR)
    assert speed.prefill(tokens) == pytest.approx(operations / (121e12 * FAIR.products))


def test_a_step_takes_what_is_slowest_of_it() -> None:
    card = CARDS["a100-80"]
    speed = PublishedSpeed(card, SMALL, "float32", FAIR)
    reading = (2e9 + 5000 * SMALL.entry_bytes) / (2039e9 * FAIR.bandwidth)
    assert speed.step(Batch(1, 1, 5000)) == pytest.approx(reading)
    rows = 100_000
    attention = 4 * 5000 * 4 * 8 * 3
    computing = (2e9 * rows + attention) / (19.5e12 * FAIR.products)
    assert speed.step(Batch(rows, 1, 5000)) == pytest.approx(computing)
    starting = 3 * (35 + 10 * 9000) * FAIR.launch
    assert speed.step(Batch(1, 9000, 5000)) == pytest.approx(starting)


@pytest.mark.parametrize("cell", ["full@1", "kvmerger@0.5", "tova@0.5"])
def test_what_is_assumed_orders_every_time(cell: str) -> None:
    good, fair, poor = (
        PublishedSpeed(CARDS["h100"], SMALL, "bfloat16", assumed) for assumed in (GOOD, FAIR, POOR)
    )
    for ask in (
        lambda of: of.prefill(900),
        lambda of: of.step(Batch(7, 3, 9000)),
        lambda of: of.replay(Batch(7, 3, 9000), 70),
        lambda of: of.store(9000),
    ):
        assert 0 < ask(good) < ask(fair) < ask(poor)
    method = parse_cell(cell)
    assert good.compress(method, 900) <= fair.compress(method, 900) <= poor.compress(method, 900)
    assert asdict(GOOD).keys() == asdict(POOR).keys()


METHODS = choices("method")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_share(name: str) -> None:
    known = share(load_method(name))
    assert known is not None, f"put {name} into _SHARES, with its figure in docs/performance.md"
    assert 0 < known < 1 or name == "full"


def test_every_share_is_some_methods() -> None:
    folds = {share(Fold(route=route)) for route in ("position", "cosine", "attention")}
    folds |= {share(Fold(fold="drop", refit=refit)) for refit in ("values", "bias", "both")}
    kinds = {kind.__name__ for name in METHODS for kind in type(load_method(name)).__mro__}
    assert {name for name in _SHARES if not name.startswith("Fold")} <= kinds
    assert folds == {part for name, part in _SHARES.items() if name.startswith("Fold")}


def test_of_the_users_own_methods_nothing_is_known() -> None:
    assert share(parse_cell("tests.kvmerge.test_check.Sound@0.5").method) is None


def test_a_share_is_of_the_whole_prefill_compression_included() -> None:
    speed = PublishedSpeed(CARDS["l4"], SMALL, "bfloat16", FAIR)
    spent, prefill = speed.compress(parse_cell("keepkv@0.5"), 900), speed.prefill(900)
    assert spent / (prefill + spent) == pytest.approx(0.20)
