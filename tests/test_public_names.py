"""The Python names that other tools rely on, with their parameters and defaults."""

from __future__ import annotations

import importlib
import inspect

import pytest

CONTRACT = {
    "kvmerge.compare": (
        "(model, tokenizer, prompts, cells, *, max_new_tokens=64, chat=True, seed=0, fidelity=True)"
    ),
    "benchmarks.longbench.prompt": "(row)",
    "benchmarks.longbench.score": "(dataset, prediction, answers, all_classes=None)",
    "kvmerge.scores.column_sums": "(queries, keys, lse=None, *, causal=True, scale=None, lengths=None)",
    "kvmerge.merging.merging_sets": (
        "(keys, protected, *, budget=None, threshold=None, scores=None, linkage='adjacent')"
    ),
    "kvmerge.merging.gaussian_merge": (
        "(keys, values, set_ids, scores, *, sigma=5.0, value_scale='none', pivot='score', sizes=None)"
    ),
    "kvmerge.merging.set_summary": "(set_ids, scores)",
    "baselines.h2o.keep": "(scores, *, heavy, recent)",
    "baselines.cam.merge_probabilities": "(attention, *, start, recent)",
    "baselines.cam.merge_values": ("(values, attention, *, start, recent, merge_budget, generator)"),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_signature_starts_as_promised(name):
    module, _, function = name.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    promised = CONTRACT[name].removesuffix(")")
    found = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    assert found.startswith(promised)
    extra = bare[len([p for p in promised.split(",") if p.strip() != "*"]) :]
    assert all(p.default is not p.empty for p in extra), "further parameters must be optional"


def test_compressed_is_the_package_s_own_name():
    from kvmerge import compressed

    parameters = inspect.signature(compressed).parameters
    assert list(parameters)[:3] == ["model", "method", "budget"]
    assert parameters["method"].default == "kvmerger"
