"""`compare`: the engine's answers and figures as one table, on prompts of anyone's own."""

from __future__ import annotations

import pytest
import torch
import transformers

import kvmerge
from harness.records import Record
from kvmerge import UserError, compare
from kvmerge.comparison import COLUMNS
from kvmerge.models import load
from tests import tiny
from tests.tiny_run import compose

TEXT = "The river was high in spring and the old mill stood still."
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
CELLS = ["full@1", "kvmerger@0.5", "h2o@10"]


@pytest.fixture(scope="module")
def loaded():
    """The random model that needs no weights, and its tokenizer: a token a byte."""
    return load(compose("model=tiny-random").model)


def test_the_full_cache_answers_as_generate_does(loaded):
    model, tokenizer = loaded
    for prompt, chat in ((TEXT, False), (TEXT, True), (CHAT, True)):
        if not chat:
            inputs = tokenizer(TEXT, return_tensors="pt")
        else:
            messages = CHAT if prompt is CHAT else CHAT[1:]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = plain[0, inputs["input_ids"].shape[1] :]
        table = compare(model, tokenizer, [prompt], ["full@1"], max_new_tokens=12, chat=chat)
        assert table.text[0] == tokenizer.decode(new, skip_special_tokens=True)
        assert table.prompt_tokens[0] == inputs["input_ids"].shape[1]
        assert table.generated_tokens[0] == len(new)


def test_a_line_a_prompt_and_cell_in_the_order_given(loaded):
    table = compare(*loaded, [TEXT, TEXT[:20], CHAT], CELLS, max_new_tokens=4)
    assert tuple(table.columns) == COLUMNS
    assert list(zip(table.prompt, table.cell, strict=True)) == [
        (prompt, cell) for prompt in range(3) for cell in CELLS
    ]
    assert table.method.tolist() == ["full", "kvmerger", "h2o"] * 3
    assert table.budget.tolist() == [1, 0.5, 10] * 3


def test_entries_and_bytes_are_the_budget_s(loaded):
    table = compare(*loaded, [TEXT], CELLS, max_new_tokens=4)
    tokens = table.prompt_tokens[0]
    assert table.kept_entries.tolist() == [tokens, tokens // 2, 10]
    per_entry = 2 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head size, float32
    assert (table.kv_bytes == table.kept_entries * per_entry).all()


def test_figures_are_taken_against_the_full_cache_whether_or_not_it_is_a_cell(loaded):
    listed = compare(*loaded, [TEXT], CELLS, max_new_tokens=8)
    alone = compare(*loaded, [TEXT], CELLS[1:], max_new_tokens=8)
    assert listed.kl_to_full[0] == pytest.approx(0, abs=1e-6)
    assert listed.top1_agreement[0] == 1
    assert (listed.kl_to_full[1:] > 0).all()
    assert alone.kl_to_full.tolist() == pytest.approx(listed.kl_to_full[1:].tolist(), rel=1e-3)
    without = compare(*loaded, [TEXT], CELLS, max_new_tokens=8, fidelity=False)
    assert without[["kl_to_full", "top1_agreement"]].isna().all(axis=None)
    assert without.text.tolist() == listed.text.tolist()


def test_figures_have_the_names_of_a_record(loaded):
    own = {"prompt", "cell", "method", "budget", "text"}
    assert set(COLUMNS) - own <= set(Record.__dataclass_fields__)


def test_the_seed_decides_what_a_random_method_keeps(loaded):
    def figure(seed: int) -> float:
        return compare(*loaded, [TEXT], ["random@0.3"], seed=seed, max_new_tokens=8).kl_to_full[0]

    assert figure(1) == figure(1) != figure(2)


def test_the_model_is_left_as_it_was(loaded):
    model, tokenizer = loaded
    before = model.config._attn_implementation
    compare(model, tokenizer, [TEXT], ["h2o@0.5"], max_new_tokens=2)
    assert model.config._attn_implementation == before


def test_an_error_of_the_engine_names_the_prompt_and_leaves_the_model_as_it_was(loaded):
    model = tiny.new_model("mistral", vocab_size=259, sliding_window=32)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=r"^prompt 1 \(59 tokens\): .*window of 32"):
        compare(model, loaded[1], ["short", TEXT], ["h2o@0.5"], max_new_tokens=2, chat=False)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": TEXT}, r"prompts must be a list.*\[prompt\]"),
        ({"prompts": CHAT}, "prompt 0 is one message; a chat is a list"),
        ({"prompts": [TEXT, ""], "chat": False}, "prompt 1 is empty"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"cells": []}, "nothing to run"),
        ({"cells": "full@1"}, r"cells must be a list.*\[cell\]"),
        ({"cells": ["h2o@0.5", "h2o@0.50"]}, "h2o@0.5 is listed twice"),
        ({"cells": ["h2p@0.5"]}, "Did you mean 'h2o'"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_said(loaded, changes, message):
    given = {"prompts": [TEXT], "cells": ["full@1"]} | changes
    with pytest.raises(UserError, match=message):
        compare(*loaded, **given)


def test_a_model_that_cannot_generate_or_is_of_another_family_is_refused(loaded):
    _, tokenizer = loaded
    with pytest.raises(UserError, match="LlamaModel cannot generate"):
        compare(tiny.new_model().model, tokenizer, [TEXT], ["full@1"])
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=1)
    )
    with pytest.raises(UserError, match="'bloom' is not supported: it adds a bias by distance"):
        compare(bloom, tokenizer, [TEXT], ["full@1"])


def test_a_tokenizer_without_a_template_takes_texts_and_refuses_chats(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", None)
    bare = compare(model, tokenizer, [TEXT], ["full@1"], max_new_tokens=2)
    assert bare.prompt_tokens[0] == len(tokenizer(TEXT)["input_ids"])
    with pytest.raises(UserError, match=r"prompt 0 is a chat.* no chat template"):
        compare(model, tokenizer, [CHAT], ["full@1"])


def test_the_name_stays_a_function_after_its_module_is_imported(loaded):
    assert callable(kvmerge.compare)
    assert kvmerge.compare is compare


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_compared_there():
    model, tokenizer = load(compose("model=tiny-random", "model.device=cuda").model)
    table = compare(model, tokenizer, [TEXT], CELLS, max_new_tokens=4)
    assert table.kept_entries.tolist()[2] == 10
