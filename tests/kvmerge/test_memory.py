"""What is alive during a prefill, counted tensor by tensor."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from kvmerge.budget import Budget
from kvmerge.engine import Comparison
from kvmerge.hook import hooked
from kvmerge.resolve import load_method
from kvmerge.session import Row
from tests.tiny import new_model, prompt

LAYERS, LENGTH = 6, 200
CELLS = [("kvmerger", 0.5), ("h2o", 0.5), ("cam", 0.5), ("kvmerger", 0.35), ("h2o", 0.35)]


def rows(*cells):
    return [Row(load_method(name), Budget.parse(budget)) for name, budget in cells]


@pytest.fixture(autouse=True, scope="module")
def only_what_the_test_makes_is_collected():
    """Take the thousands of modules and objects that are there already out of every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class FullLayers:
    """Counts the uncompressed layers that are alive whenever a layer is compressed."""

    def __init__(self):
        self.alive = weakref.WeakValueDictionary()
        self.most = 0

    def __call__(self, row, layer_idx, layer, kept):
        self.alive[layer_idx] = layer.keys
        gc.collect()
        self.most = max(self.most, len(self.alive))


@pytest.mark.parametrize("cells", [CELLS[:1], CELLS, [("full", 1), *CELLS]], ids=["1", "5", "full"])
def test_at_most_two_full_layers_are_alive_while_layers_are_compressed(cells):
    model = new_model(num_hidden_layers=LAYERS)
    count = FullLayers()
    comparison = Comparison(model, rows(*cells), "s", count)
    with hooked(model), torch.inference_mode():
        comparison.prefill(prompt(LENGTH), 4)
    assert 1 <= count.most <= 2
    gc.collect()
    assert len(count.alive) == 0  # nothing keeps a full layer afterwards


def test_a_method_that_divides_its_budget_holds_all_layers_until_the_last():
    model = new_model(num_hidden_layers=LAYERS)
    count = FullLayers()
    comparison = Comparison(model, rows(("pyramidkv", 0.5)), "s", count)
    with hooked(model), torch.inference_mode():
        comparison.prefill(prompt(LENGTH), 4)
    assert count.most == LAYERS
    gc.collect()
    assert len(count.alive) == 0


@pytest.mark.parametrize(("name", "budget"), CELLS)
def test_stored_bytes_are_the_budget_to_the_entry(name, budget):
    model = new_model(num_hidden_layers=LAYERS)
    comparison = Comparison(model, rows(("full", 1), (name, budget)), "s")
    with hooked(model), torch.inference_mode():
        comparison.prefill(prompt(LENGTH), 4)
    full, kept = (stats.kv_bytes for stats in comparison.stats)
    assert kept == full * int(budget * LENGTH) // LENGTH
    assert sum(layer.nbytes() for layer in comparison.session.layers) == full + kept
