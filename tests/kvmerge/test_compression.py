"""The handle of a `compressed` block: what it says of each generation is what the tensors hold."""

from __future__ import annotations

import gc
import threading
import weakref

import pandas as pd
import pytest
import torch

from kvmerge import CompressedCache, Compression, UserError, compressed
from kvmerge.budget import Budget
from kvmerge.compression import COLUMNS, LAYER_COLUMNS
from kvmerge.engine import Stop, run_sample
from kvmerge.hook import CACHE_NAMES
from kvmerge.resolve import choices, load_method
from kvmerge.session import Row
from tests import tiny
from tests.tiny import prompt

METHODS = choices("method")
PER_ENTRY = 2 * tiny.HEAD_DIM * 4
"""Bytes of a key and a value in float32."""


@pytest.fixture(scope="module")
def model():
    made = tiny.new_model()
    made.generation_config.eos_token_id = None
    return made


def generate(model, input_ids, tokens=4, **options):
    given = {"attention_mask": torch.ones_like(input_ids), "do_sample": False} | options
    return model.generate(input_ids, max_new_tokens=tokens, **given)


def with_cache(model, input_ids, **options):
    out = generate(model, input_ids, return_dict_in_generate=True, **options)
    return out.sequences, next(out[name] for name in CACHE_NAMES if name in out)


def budget_of(name):
    return 1 if name == "full" else 0.5


@pytest.fixture
def no_collection():
    """Nothing is freed here but what nobody refers to."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_each_generation_has_a_line_with_a_records_figures(model):
    with compressed(model, "h2o", 0.5) as c:
        generate(model, prompt(30))
        generate(model, prompt(21), tokens=7)
    assert isinstance(c, Compression)
    table = c.summary()
    assert tuple(table.columns) == COLUMNS
    assert table.drop(columns=["row", "turn", "compressed"]).to_dict("list") == {
        "generation": [0, 1],
        "prompt_tokens": [30, 21],
        "appended_tokens": [3, 6],  # the last token is never fed
        "decode_steps": [3, 6],
        "kept_entries": [15.0, 10.0],
        "budget_achieved": [0.5, 10 / 21],
        "kv_bytes": [15 * 4 * PER_ENTRY, 10 * 4 * PER_ENTRY],
        "size_bytes": [0, 0],
        "kv_bytes_full": [30 * 4 * PER_ENTRY, 21 * 4 * PER_ENTRY],
    }
    assert table.turn.tolist() == [1, 1]
    assert table.compressed.all()
    assert str(c).splitlines()[0].split() == list(COLUMNS)


def test_each_row_of_a_padded_batch_has_a_line(model):
    batch = torch.cat([prompt(30), torch.cat([torch.zeros(1, 10, dtype=torch.long), prompt(20)], 1)])
    with compressed(model, "h2o", 0.5) as c:
        generate(model, batch, attention_mask=(batch != 0).long())
    table = c.summary()
    assert table[["generation", "row", "prompt_tokens"]].values.tolist() == [[0, 0, 30], [0, 1, 20]]
    assert [row.entries for row in c.last.rows] == [[[15, 15]] * 2, [[10, 10]] * 2]
    for row, entries in enumerate((15, 10)):
        with compressed(model, "h2o", 0.5, keep=True) as kept:
            generate(model, batch, attention_mask=(batch != 0).long())
        assert kept.last.kept(1, row).keys.shape == (1, 2, entries, tiny.HEAD_DIM)


@pytest.mark.parametrize("name", METHODS)
def test_what_was_kept_is_what_the_method_returned(model, name):
    """Bit for bit, and the statistics count it."""
    returned = {}
    row = Row(load_method(name), Budget.parse(budget_of(name)))
    run_sample(
        model,
        prompt(40),
        [row],
        Stop(1, frozenset()),
        sample_id="0",
        observer=lambda _, layer_idx, __, kept: returned.update({layer_idx: kept}),
    )
    with compressed(model, name, budget_of(name), keep=True) as c:
        generate(model, prompt(40))
    table = c.summary(by_layer=True)
    assert tuple(table.columns) == LAYER_COLUMNS
    assert table.layer.tolist() == sorted(returned) == [0, 1]
    for layer, line in zip(sorted(returned), table.itertuples(), strict=True):
        wanted, found = returned[layer], c.last.kept(layer)
        for part in ("keys", "values", "positions", "sizes", "bias"):
            if getattr(wanted, part) is None:
                assert getattr(found, part) is None
            else:
                assert torch.equal(getattr(found, part), getattr(wanted, part))
        counts = torch.full((2,), wanted.keys.shape[2])
        if wanted.sizes is not None:
            counts = (wanted.sizes[0] > 0).sum(-1)
        assert c.last.rows[0].entries[layer] == counts.tolist()
        assert line.kept_entries == counts.float().mean()
        assert (line.kept_entries_min, line.kept_entries_max) == (counts.min(), counts.max())
        assert line.kv_bytes == counts.sum() * PER_ENTRY
    assert table.kv_bytes.sum() == c.summary().kv_bytes[0]
    assert table.size_bytes.sum() == c.summary().size_bytes[0]


def test_sizes_and_biases_are_counted_beside_keys_and_values(model):
    with compressed(model, "kvmerger_log", 0.5) as c:
        generate(model, prompt(40))
    assert c.summary().size_bytes[0] == 20 * 4 * (8 + 4)  # an int64 and a float32 an entry


def test_layers_with_a_window_are_counted_and_not_compressed():
    model = tiny.any_model("gemma2")
    plain_bytes = 30 * 2 * PER_ENTRY + 3 * 15 * 2 * PER_ENTRY  # windows of 16 keep 15 for the next
    with compressed(model, "h2o", 0.5, keep=True) as c:
        generate(model, prompt(30))
    (line,) = c.summary().to_dict("records")
    assert line["kv_bytes_full"] == plain_bytes
    assert line["kv_bytes"] == plain_bytes - 15 * 2 * PER_ENTRY
    assert line["kept_entries"] == 15
    assert c.summary(by_layer=True).layer.tolist() == [3]
    assert c.last.kept(-1).keys.shape[2] == 15
    with pytest.raises(UserError, match="layer 0 is none that is compressed; these are: 3"):
        c.last.kept(0)


@pytest.mark.parametrize(
    ("layer", "row", "message"),
    [
        (2, 0, "layer 2 is none"),
        (-3, 0, "layer -3 is none"),
        (0, 1, "row 1 is none: the batch has 1 rows"),
        (0, -1, "row -1 is none"),
    ],
)
def test_a_layer_or_row_that_is_none_is_named(model, layer, row, message):
    with compressed(model, "h2o", 0.5, keep=True) as c:
        generate(model, prompt(30))
        with pytest.raises(UserError, match=message):
            c.last.kept(layer, row)


@pytest.mark.parametrize("policy", ["append", "hold"])
def test_many_generations_leave_numbers_and_no_tensors(model, no_collection, policy):
    alive = weakref.WeakSet()
    with compressed(model, "h2o", 0.5, decode_policy=policy) as c:
        for length in range(5, 105):
            _, cache = with_cache(model, prompt(length), tokens=2)
            alive.update([cache, cache.session, *cache.session.layers])
            del cache
        assert len(alive) == 0
    assert c.summary().prompt_tokens.tolist() == list(range(5, 105))
    with pytest.raises(UserError, match=r"gone with its cache.*keep=True"):
        c.last.kept(0)


def test_keep_holds_the_last_cache_and_no_other(model, no_collection):
    with compressed(model, "h2o", 0.5, keep=True) as c:
        for length in (20, 30, 40):
            generate(model, prompt(length))
    assert [generation.cache() is not None for generation in c.generations] == [False, False, True]
    assert c.last.kept(0).keys.shape[2] == 20


def test_a_cache_that_is_held_on_to_can_be_looked_at(model):
    with compressed(model, "kvmerger", 0.5) as c:
        _, cache = with_cache(model, prompt(30))
        generate(model, prompt(20))
    assert c.generations[0].kept(0).positions.max() == 29
    assert isinstance(cache, CompressedCache)


def test_a_manual_loop_is_one_generation(model):
    with torch.no_grad(), compressed(model, "h2o", 0.5) as c:
        out = model(prompt(30), use_cache=True)
        for _ in range(5):
            name = next(name for name in CACHE_NAMES if name in out)
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, use_cache=True, **{name: out[name]})
    assert c.summary()[["decode_steps", "appended_tokens", "turn"]].values.tolist() == [[5, 5, 1]]


def test_before_the_first_generation_the_handle_says_so(model):
    with compressed(model, "h2o", 0.5) as c:
        with pytest.raises(UserError, match="nothing has been compressed"):
            c.last  # noqa: B018
        assert str(c) == "nothing was compressed"
        assert c.summary().columns.tolist() == list(COLUMNS)
        assert isinstance(c.summary(by_layer=True), pd.DataFrame)
        generate(model, prompt(30))
        assert c.last is c.generations[0]
        c.generations.clear()  # what a long-lived block does; it did compress


def test_a_failed_prompt_is_no_generation(model):
    with compressed(model, "h2o", 0.5) as c:
        generate(model, prompt(30))
        with pytest.raises(UserError, match="512 positions"):
            generate(model, prompt(600))
    assert len(c.generations) == 1


def test_threads_add_a_generation_each(model):
    lengths = [20, 24, 28, 32]
    with compressed(model, "h2o", 0.5) as c:
        threads = [
            threading.Thread(target=generate, args=(model, prompt(length))) for length in lengths
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    table = c.summary().sort_values("prompt_tokens")
    assert table.prompt_tokens.tolist() == lengths
    assert table.kept_entries.tolist() == [length // 2 for length in lengths]
    assert table.decode_steps.tolist() == [3] * 4


def test_each_entrance_of_a_block_has_its_own_statistics(model):
    block = compressed(model, "h2o", 0.5)
    with block as first:
        generate(model, prompt(30))
    with block as second:
        generate(model, prompt(20))
        with pytest.raises(UserError, match="inside another block"), block:
            pass
    assert first.summary().prompt_tokens.tolist() == [30]
    assert second.summary().prompt_tokens.tolist() == [20]
