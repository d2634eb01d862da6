"""Model files: what they may say, where weights come from, and which tokens end an answer."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvmerge import models
from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.models import ModelSpec, load, loading, stop_token_ids
from kvmerge.models import spec as specs
from kvmerge.models.checkpoints import Embedded, Random
from kvmerge.models.folder import INDEX
from kvmerge.resolve import load_method
from kvmerge.session import Row
from tests.tiny import new_model, prompt
from tests.tiny_run import save_checkpoint

RANDOM = Random(layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32)


def spec(**changes):
    return ModelSpec(**({"name": "toy", "max_length": 100, "chat": "none", "path": "a/b"} | changes))


def local(folder, **changes):
    return spec(**({"path": str(folder), "device": "cpu"} | changes))


# --- what a file may say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float23"}, r"unknown dtype 'float23'\. Did you mean 'float32'\?.*bfloat16"),
        ({"path": None}, r"model toy has no weights: give model\.path=DIR or a hub id"),
        ({"path": None, "random": RANDOM}, r"model toy is random: model\.context must say"),
        ({"max_length": 0}, r"model\.max_length=0 must be a whole number"),
        ({"max_length": 3.5}, r"model\.max_length=3\.5 must be a whole number"),
        ({"max_length": None}, r"model\.max_length=None must be a whole number"),
        ({"quantize": "4bits"}, r"unknown model\.quantize '4bits'\. Did you mean '4bit'\?"),
        ({"quantize": True}, r"unknown model\.quantize 'True'.*4bit, 8bit"),
        ({"quantize": "8bit", "dtype": "bfloat16"}, r"8bit computes in float16.*model\.dtype=float16"),
        ({"device_map": "even"}, r"unknown model\.device_map 'even'.*auto, balanced"),
        (
            {"device_map": "auto", "device": "cpu"},
            r"model\.device=cpu and model\.device_map=auto both say where",
        ),
    ],
)
def test_a_spec_that_cannot_be_is_refused_with_its_setting(changes, message):
    with pytest.raises(UserError, match=message):
        spec(**changes)


def test_source_names_the_weights(tmp_path):
    assert spec().source() == "a/b"
    assert spec(revision="abc").source() == "a/b@abc"
    assert spec(path=str(tmp_path), revision="abc").source() == str(tmp_path), "of the hub's copy"
    embedded = Embedded("pkg", "m.gguf", "f00", "pkg==1")
    assert spec(path=None, embedded=embedded).source() == "pkg==1/m.gguf sha256:f00"
    drawn = spec(path=None, random=RANDOM, context=64).source()
    assert "layers=2" in drawn
    assert "seed=0" in drawn


def test_the_device_is_the_one_given_or_else_a_gpu_where_there_is_one():
    assert spec(device="cpu").torch_device() == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert spec().torch_device() == torch.device(expected)


# --- local checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_checkpoint_is_loaded_for_answering_in_the_dtype_given(checkpoint, dtype):
    model, tokenizer = load(local(checkpoint, dtype=dtype))
    assert model.dtype == models.DTYPES[dtype]
    assert not model.training
    assert tokenizer.decode(tokenizer.encode("the bridge"), skip_special_tokens=True) == "the bridge"
    assert stop_token_ids(model, tokenizer, spec()) == {2}


def test_a_checkpoint_keeps_its_weights(tmp_path, checkpoint):
    model = new_model()
    model.save_pretrained(tmp_path)
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loaded, _ = load(local(tmp_path))
    # oneDNN's kernels may round otherwise than MKL's.
    torch.testing.assert_close(loaded(prompt(9)).logits, model(prompt(9)).logits)


def test_bfloat16_answers_on_a_cpu(checkpoint):
    model, tokenizer = load(local(checkpoint, dtype="bfloat16"))
    ids = torch.tensor([tokenizer.encode("The river was high in spring " * 4)])
    row = Row(load_method("kvmerger", {}), Budget.parse(0.5))
    (result,), _ = run_sample(model, ids, [row], Stop(5, frozenset()))
    assert len(result.token_ids) == 5
    assert result.stats.kv_bytes % 2 == 0


def test_a_revision_of_the_hub_is_not_asked_of_a_folder(checkpoint, monkeypatch):
    seen = []
    read = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda *given, **named: seen.append(named["revision"]) or read(*given, **named),
    )
    load(local(checkpoint, revision="0" * 40))
    assert seen == [None]


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/no-such-checkpoint", "a/b/c"])
def test_a_folder_that_is_not_there_is_refused_without_a_request(path):
    """Such a path is never taken for a hub id: no request is made."""
    with pytest.raises(UserError, match=rf"model\.path={path} is not a directory"):
        load(spec(path=path))


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of several weight files."""
    folder = save_checkpoint(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    new_model(vocab_size=320).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_a_family_that_the_engine_does_not_know_is_refused_before_its_weights_are_read(
    checkpoint, tmp_path, monkeypatch
):
    folder = shutil.copytree(checkpoint, tmp_path / "bloom")
    (folder / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    monkeypatch.setattr(
        loading.AutoModelForCausalLM,
        "from_pretrained",
        lambda *_, **__: pytest.fail("weights were read"),
    )
    with pytest.raises(
        UserError, match=r"model .*: model type 'bloom' is not supported: it adds a bias"
    ):
        load(local(folder))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no whole checkpoint: config\.json is missing"):
        load(local(tmp_path))


def test_missing_shards_are_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"{gone.name} is missing \({INDEX} asks for it\)\. Copy"):
        load(local(sharded))


def test_a_truncated_file_is_named(sharded):
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{cut.name} is damaged or truncated .*Copy"):
        load(local(sharded))


def test_missing_tensors_are_refused_not_drawn_at_random(tmp_path):
    folder = save_checkpoint(tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model toy: .* lacks weights .*layers\.1\.self_attn\.q_proj"):
        load(local(folder))


def test_weights_that_the_model_has_no_place_for_are_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "more")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.adapter.weight"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no place for: model\.layers\.0\.mlp\.adapter\.weight"):
        load(local(folder))


def marked_quantized(checkpoint, folder, **config):
    """A copy of a checkpoint whose configuration says that its weights are quantized."""
    shutil.copytree(checkpoint, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def test_a_quantized_checkpoint_is_read_as_transformers_reads_it(checkpoint, tmp_path):
    config = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    folder = marked_quantized(checkpoint, tmp_path / "fp8", quant_method="fp8", **config)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" in name:
            scale = weight.abs().max() / 448
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in weight.shape]
            weights[f"{name}_scale_inv"] = torch.full(blocks, float(scale))
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(20).unsqueeze(0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    ours = load(local(folder, pack_weights=False))[0](ids).logits
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("config", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_quantized_checkpoint_names_the_package_that_it_needs(checkpoint, tmp_path, config, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    folder = marked_quantized(checkpoint, tmp_path / "quantized", **config)
    with pytest.raises(UserError, match=rf"is quantized\. .*{package}.*not quantized"):
        load(local(folder))


def test_weights_that_fit_nowhere_name_the_ways_out(checkpoint, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match=r"model\.quantize=8bit or 4bit.*model\.device_map=auto"):
        load(local(checkpoint))


# --- the hub


def test_a_hub_id_is_prepared_and_its_failure_explained(monkeypatch):
    asked = []

    def unreachable(repository, revision):
        asked.append((repository, revision))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(loading, "prepare", unreachable)
    with pytest.raises(UserError, match=r"model toy: a/b is not whole in the cache.*model\.path=DIR"):
        load(spec(revision="f00"))
    assert asked == [("a/b", "f00")]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_damaged_weight_file_in_the_hubs_cache_names_the_folder_to_delete(monkeypatch, wrapped):
    error: Exception = SafetensorError("header")
    if wrapped:  # as transformers reports it
        cause, error = error, OSError("header")
        error.__cause__ = cause

    def damaged(*_, **__):
        raise error

    monkeypatch.setattr(loading, "prepare", lambda *_: True)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", damaged)
    with pytest.raises(UserError, match=r"cannot load a/b: .*header\. Delete /.*/models--a--b to"):
        load(spec())


def test_what_the_hub_is_not_to_blame_for_keeps_its_reason(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("The checkpoint has model type `nosuch`\nsecond line")

    monkeypatch.setattr(loading, "prepare", lambda *_: None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match="model toy: cannot load a/b: The checkpoint has") as caught:
        load(spec())
    assert "second line" not in str(caught.value)


@pytest.mark.parametrize("cached", [True, False])
def test_what_the_cache_holds_is_not_asked_of_the_hub(checkpoint, monkeypatch, cached):
    asked = []
    for reader in (AutoTokenizer, loading.AutoModelForCausalLM):
        read = reader.from_pretrained

        def from_hub(_, *, local_files_only, read=read, **named):
            asked.append((local_files_only, named.pop("revision")))
            return read(checkpoint, **named)

        monkeypatch.setattr(reader, "from_pretrained", from_hub)
    monkeypatch.setattr(loading, "prepare", lambda *_: cached)
    load(spec(revision="f00", device="cpu"))
    assert asked == [(cached, "f00")] * 2


def test_a_folder_asks_nothing_of_the_hub(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "prepare", lambda *_: pytest.fail("the hub was asked"))
    load(local(checkpoint))


# --- random models


def test_a_random_model_is_the_same_at_every_load():
    first, tokenizer = load(spec(path=None, random=RANDOM, context=64, device="cpu"))
    second, _ = load(spec(path=None, random=RANDOM, context=64, device="cpu"))
    other, _ = load(spec(path=None, random=Random(2, 4, 2, 8, 32, seed=1), context=64, device="cpu"))
    ids = torch.tensor([tokenizer.encode("the bridge")])
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert not torch.equal(first(ids).logits, other(ids).logits)
    assert first.config.max_position_embeddings == 64


def test_a_given_path_comes_before_a_random_model(checkpoint):
    model, _ = load(local(checkpoint, random=RANDOM, context=64))
    assert model.config.hidden_size != RANDOM.hidden


# --- several devices, and fewer bits


@pytest.mark.parametrize("device_map", specs.DEVICE_MAPS)
def test_a_device_map_is_accelerates_to_follow(checkpoint, monkeypatch, device_map):
    """Without several GPUs it is one device."""
    asked = []
    read = loading.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*given, **named):
        asked.append(named["device_map"])
        return read(*given, **named)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model, _ = load(spec(path=str(checkpoint), device_map=device_map))
    assert asked == [device_map]
    assert len({parameter.device for parameter in model.parameters()}) == 1


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_weights_outside_the_gpus_are_refused(checkpoint, monkeypatch, place):
    read = loading.AutoModelForCausalLM.from_pretrained

    def offloaded(*given, **named):
        model, report = read(*given, **named | {"device_map": {"": "cpu"}})
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": place}
        return model, report

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", offloaded)
    with pytest.raises(UserError, match=r"leaves 1 of its 2 parts outside \(first: model\.layers\.1\)"):
        load(spec(path=str(checkpoint), device_map="auto"))


@pytest.mark.parametrize("method", ["full", "kvmerger", "cam", "pyramidkv"])
def test_the_engine_runs_through_the_hooks_of_a_divided_model(method):
    """Accelerate moves the inputs of each part to its device; here all devices are the CPU."""
    budget = Budget.parse(1 if method == "full" else 0.5)
    rows = [Row(load_method(method, {}), budget)]
    stop = Stop(6, frozenset())
    whole, divided = new_model(), new_model()
    parts = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    dispatch_model(divided, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert divided.model.layers[0]._hf_hook is not None
    ((expected,), _), ((found,), _) = (run_sample(m, prompt(40), rows, stop) for m in (whole, divided))
    assert found.token_ids == expected.token_ids


def quantized(monkeypatch, quantize, installed=True, device="cuda"):
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: object() if installed else None
    )
    monkeypatch.setattr(ModelSpec, "torch_device", lambda _: torch.device(device))
    return loading._quantization(spec(quantize=quantize, dtype="float16"))


def test_four_bits_are_nf4_and_compute_in_the_models_dtype(monkeypatch):
    settings = quantized(monkeypatch, "4bit")
    assert (settings.load_in_4bit, settings.load_in_8bit) == (True, False)
    assert settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_compute_dtype == torch.float16


def test_eight_bits_are_asked_for_without_four(monkeypatch):
    settings = quantized(monkeypatch, "8bit")
    assert (settings.load_in_4bit, settings.load_in_8bit) == (False, True)


@pytest.mark.parametrize(
    ("installed", "device", "message"),
    [
        (False, "cuda", r"model\.quantize=4bit needs the package bitsandbytes: `pip install"),
        (True, "cpu", r"model\.quantize=4bit needs a GPU, and the model is to run on cpu"),
    ],
)
def test_fewer_bits_need_bitsandbytes_and_a_gpu(monkeypatch, installed, device, message):
    with pytest.raises(UserError, match=message):
        quantized(monkeypatch, "4bit", installed, device)


def test_the_loader_is_told_of_the_fewer_bits(checkpoint, monkeypatch):
    given = {}

    def refuse(*_, **named):
        given.update(named)
        raise OSError("seen")

    monkeypatch.setattr(loading, "_quantization", lambda of: f"settings for {of.quantize}")
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match="seen"):
        load(local(checkpoint, quantize="8bit", dtype="float16"))
    assert given["quantization_config"] == "settings for 8bit"
    assert given["device_map"] == {"": torch.device("cpu")}


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
def test_an_answer_ends_at_the_configured_tokens_or_else_the_tokenizers(eos, tokenizer_eos, stop, ids):
    assert stop_token_ids(*ending(eos, tokenizer_eos), spec(stop=stop)) == ids


@pytest.mark.parametrize("unk", [3, None])
def test_a_stop_text_that_is_no_token_is_refused(unk):
    with pytest.raises(UserError, match=r"model\.stop: '<\|end\|>' is not a token of toy"):
        stop_token_ids(*ending(2, unk=unk), spec(stop=("<|end|>",)))
