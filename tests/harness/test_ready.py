"""A plan refuses what the run refuses, in the same words, and neither leaves anything behind."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import cli
from harness.lock import only_writer
from harness.runner import run
from harness.settings import Settings
from kvmerge.models import loading
from tests.conftest import Output

Command = Callable[..., Output]

BASE = ("model=tiny-random", "benchmark=mini", "benchmark.tasks=[passkey]", "limit=1")
"""A run that works, of prompts of 3,518 tokens on two layers with two KV heads."""

REFUSED = [
    # settings
    ("limits=1", "unknown setting 'limits'"),
    ("+limits=1", "unknown setting 'limits'. Did you mean 'limit'?"),
    ("++limits=1", "unknown setting 'limits'"),
    ("+model.foo=1", "unknown setting of model 'foo'"),
    ("methd=h2o", "Did you mean 'method'?"),
    ("model.pth=x", "Did you mean 'path'?"),
    ("budgt=0.3", "Did you mean 'budget'?"),
    ("batch_size=yes", "batch_size='yes' must be"),
    ("seed=1.5", "seed=1.5 must be a whole number"),
    ("cells=[]", "lists nothing to run"),
    ("cells=[full@1,full@1]", "listed twice"),
    ("cells=[full@1,h2o@0.5,h2o@.5]", "listed twice"),
    # layers and budgets
    ("layers_skip=[99]", "layers_skip=[99]: the model has 2 layers, 0 to 1"),
    ("layers_skip=[-3]", "layers_skip=[-3]: the model has 2 layers"),
    ("layers_skip=[0]", "layers_skip=[0] alone keeps more than the budget 0.5"),
    ("layers_skip=[0] budget=1700", "layers_skip=[0] alone keeps more than the budget 1700"),
    ("budget=0.0001", "KVMerger needs a budget of at least 2 entries"),
    ("budget=0.0001 method=cam method.start=1", "CaM needs at least 1 recent token"),
    ("budget=8 method=h2o method.heavy=3 method.recent=4", "sample 'passkey-00' (3518 prompt tokens)"),
    ("budget=2 method=fold method.keep=h2o method.fold=values layers_skip=[2]", "the model has 2"),
    # the model
    ("model.path=/nope", "model.path=/nope is not a directory with a checkpoint"),
    ("model.path=/proc", "is no whole checkpoint: config.json is missing"),
    ("model.quantize=4bit", "model.quantize=4bit needs "),
    ("model.quantize=8bit model.dtype=float16", "model.quantize=8bit needs "),
    ("model.device=meta", "torch cannot compute on it here"),
    ("model.device=cuda:99", "model.device=cuda:99: torch sees "),
    ("model.stop=[nope]", "model.stop: 'nope' is not a token of tiny-random"),
    ("model.chat=foo", "model.chat='foo' wraps no prompt"),
    ("model.max_length=1", "must be a whole number of tokens, 2 or more"),
    ("model.context=100", "llama has 100 positions; the prompt has 3518"),
    ("model.context=0", "model.context=0 must be 1 or more"),
    # data
    ("benchmark.data_dir=/nope", "benchmark.data_dir /nope is not a folder"),
    ("benchmark=longbench benchmark.data_dir=/nope", "benchmark.data_dir /nope is not a folder"),
    ("benchmark=perplexity benchmark.prompt_tokens=10000", "need 10512 tokens, the model has 8192"),
    ("benchmark=perplexity benchmark.samples=100000", "give a longer text"),
    ("benchmark=needle benchmark.lengths=[10000]", "10000 is too long for the model"),
    ("benchmark=needle benchmark.lengths=[205]", "205 leaves no room for text"),
    # where it goes
    ("output_dir=/proc/x", "nothing can be written to /proc/x: "),
    ("output_dir=/proc/version", "nothing can be written to /proc/version: "),
    ("output_dir=/dev/null/x", "nothing can be written to /dev/null/x: Not a directory"),
    (f"output_dir=/tmp/{'x' * 300}/y", "File name too long"),
    ("noise=/nope", "/nope holds no noise.json"),
    ("num_shards=3 shard=3", "shard=3 must be below num_shards=3"),
    # other kinds
    ("experiment=observations benchmark=mini observe.map_layers=[9]", "the model has 2 layers"),
    ("experiment=observations benchmark=mini observe.map_heads=[9]", "the model has 2 KV heads"),
    ("experiment=observations benchmark=mini model.context=9", "llama has 9 positions"),
    ("experiment=selfcheck benchmark=mini layers_skip=[9]", "the model has 2 layers"),
    ("experiment=selfcheck benchmark=mini cells=[h2o@0.5]", "add full@1 to the cells"),
    ("experiment=noise benchmark=mini layers_skip=[9]", "the model has 2 layers"),
    ("experiment=noise benchmark=mini output_dir=/proc/x", "nothing can be written to /proc/x"),
]
"""Command lines beside `BASE` that a run refuses in its first seconds, and what it says."""


def words(line: str, folder: Path) -> list[str]:
    """The whole command line."""
    given = shlex.split(line)
    keys = {word.partition("=")[0] for word in given}
    if {"benchmark", "experiment"} & keys:
        keys |= {"benchmark.tasks"}
    base = [*BASE, f"output_dir={folder}"]
    return [*(word for word in base if word.partition("=")[0] not in keys), *given]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are read: what is refused must be refused before."""
    read = loading.AutoModelForCausalLM.from_pretrained

    def watched(*given: object, **named: object) -> object:
        assert named["device_map"] == {"": "meta"}, "weights were read"
        return read(*given, **named)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", watched)


@pytest.mark.parametrize(("line", "why"), REFUSED, ids=[line[:60] for line, _ in REFUSED])
def test_a_plan_refuses_what_the_run_refuses_before_any_weight_is_read(
    command: Command, tmp_path: Path, line: str, why: str
) -> None:
    folder = tmp_path / "out"
    ran = command(*words(line, folder))
    planned = command(*words(line, folder), "dry_run=true")
    for output in (ran, planned):
        assert output.status == cli.USER_ERROR, output.err
        assert why in output.err
        assert "Traceback" not in output.err
    assert planned.err == ran.err
    assert not folder.exists(), "neither leaves anything behind"


@pytest.mark.parametrize("given", ["yep", "yes", "on", "1", "null", "[true]"])
def test_only_true_and_false_are_truth_values(command: Command, tmp_path: Path, given: str) -> None:
    refused = command(*words("", tmp_path / "out"), f"dry_run={given}")
    assert refused.status == cli.USER_ERROR
    assert "must be true or false" in refused.err


# what only a folder or a checkpoint of its own can show


def assert_alike(command: Command, given: list[str], why: str) -> None:
    ran, planned = command(*given), command(*given, "dry_run=true")
    assert ran.status == planned.status == cli.USER_ERROR
    assert why in ran.err
    assert planned.err == ran.err


def test_a_folder_of_another_seed_is_refused_by_both(
    command: Command, tiny: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    settings = tiny("benchmark.tasks=[trec]", "limit=1", "cells=[h2o@0.5]")
    monkeypatch.undo()  # this run reads weights
    run(settings)
    given = [
        f"model.path={settings.model.path}",
        "benchmark=longbench",
        f"benchmark.data_dir={data}",
        "benchmark.tasks=[trec]",
        "cells=[h2o@0.5]",
        f"output_dir={settings.output_dir}",
    ]
    assert_alike(command, [*given, "seed=1"], "another seed: 0 then, 1 now")
    assert_alike(command, [*given, "num_shards=2"], "cannot be added to it")
    with only_writer(settings.output_dir):
        assert_alike(command, given, f"is being written by process {os.getpid()} on ")
    planned = command(*given, "dry_run=true")
    assert planned.status == 0
    assert "counted with the model's tokenizer" in planned.out


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_checkpoint_without_a_file_is_refused_by_both(
    command: Command, checkpoint: Path, tmp_path: Path, broken: str
) -> None:
    folder = tmp_path / "partial"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != broken:
            (folder / file.name).symlink_to(file)
    given = words(f"model.path={folder}", tmp_path / "out")
    assert_alike(command, given, f"is no whole checkpoint: {broken} is missing")


def test_a_checkpoint_that_lacks_a_layer_is_refused_by_both(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shallow"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    given = words(f"model.path={folder} model.chat=none", tmp_path / "out")
    assert_alike(command, given, "lacks weights of the model")


def test_a_model_whose_keys_cannot_be_turned_is_refused_by_both(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "dynamic"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "config.json"
    content = json.loads(config.read_text())
    content["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    content["max_position_embeddings"] = 8192
    config.write_text(json.dumps(content))
    given = words(f"model.path={folder} pos=rolled method=h2o", tmp_path / "out")
    assert_alike(command, given, "cannot rotate cached keys")
