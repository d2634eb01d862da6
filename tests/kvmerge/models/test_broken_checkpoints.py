"""Every file of a checkpoint, broken in every way: it is refused by name, or the same model loads."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvmerge.errors import UserError
from kvmerge.models import ModelSpec, load, loading, stop_token_ids
from kvmerge.models.checkpoints import Random, save_random
from kvmerge.models.folder import INDEX, TEMPLATE

SIZES = Random(layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32)
CHAT = [{"role": "user", "content": "How long is it?"}]
TEXT = "The bridge of 1834,\n  and <s> what é 桥 cost."
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 142800\n".format("ab" * 32)
HTML = "<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>messages</body></html>\n"
SHARD = "model-00001-of-00002.safetensors"
TABLE = "special_tokens_map.json"
"""What older versions of transformers wrote beside; read where it is there."""

Way = Callable[[Path], object]


def instead(make: Callable[[Path], object]) -> Way:
    """Put something else in a file's place."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def content(make: Callable[[bytes], bytes]) -> Way:
    return lambda path: path.write_bytes(make(path.read_bytes()))


def unreadable(path: Path) -> None:
    path.chmod(0)


ANY_FILE: dict[str, Way] = {
    "absent": Path.unlink,
    "empty": content(lambda _: b""),
    "cut": content(lambda whole: whole[: len(whole) // 2]),
    "lfs": content(lambda _: LFS.encode()),
    "html": content(lambda _: HTML.encode()),
    "zeros": content(lambda whole: bytes(len(whole))),
    "random": content(lambda whole: random.Random(0).randbytes(len(whole))),
    "not-utf8": content(lambda whole: b"\xff\xfe" + whole),
    "list": content(lambda _: b"[1, 2]"),
    "number": content(lambda _: b"3"),
    "object": content(lambda _: b"{}"),
    "folder": instead(Path.mkdir),
    "dangling": instead(lambda path: path.symlink_to("nowhere")),
    "unreadable": unreadable,
}


def setting(**changes: Any) -> Way:
    """Change fields of a JSON file; `a__b` is a field of a field, `...` takes a field away."""

    def change(path: Path) -> None:
        whole = json.loads(path.read_text())
        for name, value in changes.items():
            *outer, last = name.split("__")
            place = whole
            for key in outer:
                place = place[key]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        path.write_text(json.dumps(whole))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Way:
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


def misfit(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[-1]
    tensors[name] = torch.zeros(*tensors[name].shape, 2)


def each(name: str, *values: Any) -> dict[str, Way]:
    return {f"{name}={value!r}": setting(**{name: value}) for value in values}


OF_WEIGHTS: dict[str, Way] = {
    "tensor-lost": weights(lambda tensors: tensors.pop(sorted(tensors)[0])),
    "tensor-added": weights(lambda tensors: tensors.update(extra=torch.zeros(2))),
    "tensor-misfit": weights(misfit),
    "longer": content(lambda whole: whole + bytes(8)),
    "cut-by-one": content(lambda whole: whole[:-1]),
    "no-header": content(lambda whole: whole[:8]),
}
OF_FILE: dict[str, dict[str, Way]] = {
    "config.json": each("hidden_size", "wide", 48, 0, -32, None, 32.5)
    | each("vocab_size", 200, 300, "many", None)
    | each("num_hidden_layers", 1, 3, 0, "two", None)
    | each("num_attention_heads", 5, 2, 0, "four")
    | each("num_key_value_heads", 3, 4, "two")
    | each("head_dim", 4, "eight", ...)
    | each("intermediate_size", 65, "x")
    | each("model_type", "nosuch", "bert", 7, None, ...)
    | each("architectures", ["NoSuch"], 3)
    | each("hidden_act", "nosuch", 3)
    | each("rms_norm_eps", "small", None)
    | each("rope_parameters", [1], 3, {"rope_type": "nosuch"}, {"rope_theta": "x"})
    | each("max_position_embeddings", "long")
    | each("eos_token_id", "two", [2, "two"], 9999, -1, True)
    | each("pad_token_id", "none", 9999)
    | each("tie_word_embeddings", True, "perhaps")
    | each("dtype", "float99", 3)
    | each("quantization_config", 3, {}, {"quant_method": "nosuch"}),
    "generation_config.json": each("eos_token_id", "two", [2, "two"], 9999, -1, {"a": 2}, [], 2.5, True)
    | each("temperature", "hot")
    | each("cache_implementation", "nosuch"),
    "tokenizer.json": each("model", None, 3, ...)
    | each("model__type", "NoSuch", 3)
    | each("model__vocab", [1], {"a": "x"}, {}, ...)
    | each("model__merges", 3, [["zz", "yy"]])
    | each("added_tokens", 3, [3])
    | each("pre_tokenizer", 3, {"type": "NoSuch"})
    | each("post_processor", 3)
    | each("decoder", {"type": "NoSuch"})
    | each("version", 3, "9.9"),
    "tokenizer_config.json": each("tokenizer_class", "NoSuch", 7, ..., None)
    | each("eos_token", 7, [1], "<none>", None, ...)
    | each("bos_token", 7, {"content": 3})
    | each("model_max_length", "long")
    | each("chat_template", 3, "{% for", "constant")
    | each("added_tokens_decoder", 3, {"x": 1})
    | each("auto_map", 3),
    TEMPLATE: {
        "syntax": content(lambda whole: whole + b"{% endfor %}"),
        "constant": content(lambda _: b"Hello"),
    },
    TABLE: each("eos_token", 7, "<none>"),
    "model.safetensors": OF_WEIGHTS,
    SHARD: OF_WEIGHTS,
    INDEX: each("weight_map", [1], 3, {}, {"a": 3}, {"a": "nosuch.safetensors"}, {"a": SHARD}, ...)
    | each("metadata", 3, ...),
}
CASES = [
    (file, way, break_it)
    for file, ways in OF_FILE.items()
    for way, break_it in (ANY_FILE | ways).items()
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one weight file."""
    folder = tmp_path_factory.mktemp("whole")
    save_random(folder, SIZES, context=64)
    return folder


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in two weight files, with a file that older versions wrote."""
    folder = tmp_path_factory.mktemp("sharded") / "of-two"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="80KB")
    assert (folder / SHARD).is_file()
    (folder / TABLE).write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    )
    return folder


def loaded(folder: Path) -> dict[str, Any]:
    """Load a checkpoint, and return what tells it from another."""
    spec = ModelSpec("toy", 60, "none", path=str(folder), device="cpu", pack_weights=False)
    model, tokenizer = load(spec)
    ids = tokenizer.encode(TEXT)
    return {
        "ids": ids,
        "logits": model(torch.tensor([ids])).logits.tolist(),
        "text": tokenizer.decode(ids),
        "ends": stop_token_ids(model, tokenizer, spec),
        "prompt": tokenizer.chat_template and tokenizer.apply_chat_template(CHAT, tokenize=False),
    }


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, Any]:
    return loaded(whole)


def test_shards_are_the_same_model(sharded: Path, expected: dict[str, Any]) -> None:
    assert loaded(sharded) == expected


@pytest.mark.parametrize(
    ("file", "break_it"),
    [pytest.param(file, break_it, id=f"{file}-{way}") for file, way, break_it in CASES],
)
def test_a_broken_file_is_named_or_makes_no_difference(
    whole: Path,
    sharded: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    file: str,
    break_it: Way,
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(whole if (whole / file).exists() else sharded, folder)
    break_it(folder / file)
    if break_it is unreadable and os.access(folder / file, os.R_OK):
        pytest.skip("this user may read everything")
    try:
        found = loaded(folder)
    except UserError as error:
        said = str(error)
    else:
        said = None
    if said is not None:
        assert said.startswith("model toy: ")
        assert file in said.replace(str(folder), "")
        return
    without_template = {"prompt": None} if file == TEMPLATE and break_it is Path.unlink else {}
    assert found == expected | without_template


@pytest.mark.parametrize("name", ["README.md", "training_args.json", "optimizer.safetensors"])
def test_files_that_are_not_read_may_be_anything(
    whole: Path, expected: dict[str, Any], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(whole, folder)
    (folder / name).write_text(LFS)
    assert loaded(folder) == expected


def test_all_broken_files_are_named_at_once(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(sharded, folder)
    for name in ("tokenizer.json", SHARD, "config.json"):
        (folder / name).write_text(LFS)
    with pytest.raises(UserError, match=rf"config\.json is a Git LFS pointer.*{SHARD} is a Git LFS"):
        loaded(folder)


@pytest.mark.parametrize(("file", "way"), [(SHARD, "cut"), ("config.json", "html"), (INDEX, "list")])
def test_a_broken_file_in_the_hubs_cache_names_the_folder_to_delete(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, way: str
) -> None:
    folder = tmp_path / "snapshot"
    shutil.copytree(sharded, folder)
    ANY_FILE[way](folder / file)
    monkeypatch.setattr(loading, "prepare", lambda *_: True)
    monkeypatch.setattr(loading, "snapshot", lambda *_: folder)
    spec = ModelSpec("toy", 60, "none", path="a/b", device="cpu")
    with pytest.raises(UserError, match=rf"{file} .*Delete /.*models--a--b to download it again"):
        load(spec)
