"""From a `ModelSpec` to a model and its tokenizer, ready for inference.

Weights come from the hub, a local checkpoint, a file embedded in a package, or a seed; all of them go
through one loader.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from kvmerge.errors import UserError, first_line, is_out_of_memory
from kvmerge.families import check_family
from kvmerge.hub import Repository, explain
from kvmerge.kernels.packed_linear import pack_linear_layers
from kvmerge.models.checkpoints import (
    converted,
    outline_embedded,
    outline_random,
    save_random,
)
from kvmerge.models.folder import (
    AGAIN,
    CONFIG,
    GENERATION,
    INDEX,
    SINGLE,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    VOCABULARIES,
    check_folder,
    tensors,
)
from kvmerge.models.hub import offered, prepare, snapshot
from kvmerge.models.spec import DTYPES, ModelSpec
from kvmerge.models.tokenizer import load_tokenizer

_INSTEAD = "Without the hub: give the folder of a local copy with model.path=DIR."


@dataclass(frozen=True)
class Outline:
    """A model before its weights are read."""

    skeleton: PreTrainedModel | None
    """The model on the device `meta`, which holds no numbers; None where its files cannot be looked at
    apart from the hub."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where it would have to be downloaded."""
    cached: bool = False
    """Whether the hub was found to be of no need."""
    download: str = ""
    """What a run downloads first, in words; empty: nothing."""


def outline(spec: ModelSpec, *, downloads: bool = True) -> Outline:
    """Make every check of a model that needs no weight, and return what is known of it then.

    Args:
        spec: the model.
        downloads: whether the hub's cache may be filled; if not, the hub is only asked whether it would
            give the model.

    Raises:
        UserError: if the weights are not there or not whole, the engine cannot take the model over, or
            this machine lacks what the settings need.
    """
    return _look(spec, downloads)


def _look(spec: ModelSpec, downloads: bool = True, weigh: bool = True) -> Outline:
    """Do what `outline` does; without `weigh` the weights are left to who reads them at once."""
    if spec.quantize:
        _quantization(spec)
    with _outlined(spec) as (location, whole):
        if isinstance(location, str) and not downloads:
            offered = _offered(spec, location)
            if offered is not None:
                return offered
        with _reading(spec, location):
            cached = isinstance(location, str) and prepare(location, spec.revision)
        config = _check_files(spec, location, whole)
        tokenizer = _tokenizer(spec, location, cached)
        if weigh and (whole or cached):
            return Outline(_weighed(spec, location, tokenizer, cached), tokenizer, cached)
        skeleton = None if config is None else _skeleton(spec, location, config)
        return Outline(skeleton, tokenizer, cached)


def load(
    spec: ModelSpec, known: Outline | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, ready for inference.

    Args:
        spec: the model.
        known: its outline, where that was looked at already, with downloads.

    Raises:
        UserError: if the weights cannot be found, read or held, saying what to do.
    """
    known = known or _look(spec, weigh=False)
    tokenizer = known.tokenizer
    assert tokenizer is not None
    # Given only where the user asks for it: None would erase what the checkpoint says of itself.
    quantization = {"quantization_config": _quantization(spec)} if spec.quantize else {}
    with _checkpoint(spec) as location:
        device_map = spec.device_map or {"": spec.torch_device()}
        options = {"dtype": DTYPES[spec.dtype], "device_map": device_map} | quantization
        model = _read_weights(spec, location, tokenizer, known.cached, **options)
    _check_on_accelerators(spec, getattr(model, "hf_device_map", None) or {})
    if spec.pack_weights:
        pack_linear_layers(model)
    return model.eval(), tokenizer


def _weighed(
    spec: ModelSpec, location: Path | str, tokenizer: PreTrainedTokenizerBase, cached: bool
) -> PreTrainedModel:
    """Hold the weights that a model has against those that it needs, without reading one."""
    disable_progress_bar()
    return _read_weights(spec, location, tokenizer, cached, device_map={"": "meta"})


def _read_weights(
    spec: ModelSpec,
    location: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    cached: bool,
    **options: Any,
) -> PreTrainedModel:
    """Read a checkpoint's weights, and refuse it where they are not those of the model."""
    with _reading(spec, location, CONFIG, SINGLE, INDEX):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            revision=_revision(spec, location),
            local_files_only=cached,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # for the report to name them; they are refused
            **options,
        )
    model: PreTrainedModel
    model, report = loaded
    _check_complete(spec, location, report)
    with _reading(spec, location, GENERATION, CONFIG, TOKENIZER_CONFIG):
        _check_ends(model, tokenizer)
    return model


def _skeleton(spec: ModelSpec, location: Path | str, config: PretrainedConfig) -> PreTrainedModel:
    with _reading(spec, location, CONFIG), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@contextmanager
def _outlined(spec: ModelSpec) -> Iterator[tuple[Path | str, bool]]:
    """Yield where configuration and tokenizer are while they are looked at: a folder, or a hub id.

    And whether the weights must lie beside them: not where a download or a conversion is to come.
    """
    if spec.path is not None:
        local = spec.folder()
        yield local or spec.path, local is not None
        return
    with tempfile.TemporaryDirectory(prefix="kvmerge-outline-") as scratch:
        folder = Path(scratch)
        if spec.embedded is not None:
            disable_progress_bar()
            found = outline_embedded(folder, spec.name, spec.embedded)
            yield found, found != folder
            return
        assert spec.random is not None
        assert spec.context is not None
        outline_random(folder, spec.random, spec.context)
        yield folder, False


@contextmanager
def _checkpoint(spec: ModelSpec) -> Iterator[Path | str]:
    """Yield where the weights are while they are loaded: a folder, or a hub id."""
    if spec.path is not None:
        yield spec.folder() or spec.path
        return
    disable_progress_bar()  # of a second's work
    if spec.embedded is not None:
        yield converted(spec.name, spec.embedded)
        return
    assert spec.random is not None
    assert spec.context is not None
    with tempfile.TemporaryDirectory(prefix="kvmerge-random-") as scratch:
        save_random(Path(scratch), spec.random, spec.context)
        yield Path(scratch)


def _revision(spec: ModelSpec, location: Path | str) -> str | None:
    return spec.revision if isinstance(location, str) else None


def _offered(spec: ModelSpec, repository: str) -> Outline | None:
    """Return what the hub says of a model that its cache lacks; None where the cache holds it."""
    with tempfile.TemporaryDirectory(prefix="kvmerge-outline-") as scratch:
        folder = Path(scratch)
        with _reading(spec, repository):
            download = offered(repository, spec.revision, folder)
        if download is None:
            return None
        skeleton = _skeleton(spec, repository, _config(spec, repository, folder))
    held = _folder(spec, repository)
    has_tokenizer = held is not None and any((held / name).exists() for name in VOCABULARIES)
    tokenizer = _tokenizer(spec, repository, cached=True) if has_tokenizer else None
    return Outline(skeleton, tokenizer, download=download)


def _tokenizer(spec: ModelSpec, location: Path | str, cached: bool) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, checked."""
    with _reading(spec, location, *TOKENIZER_FILES):
        tokenizer = load_tokenizer(
            location,
            lambda: _folder(spec, location),
            revision=_revision(spec, location),
            local_files_only=cached,
        )
    _check_tokenizer(spec, location, tokenizer)
    return tokenizer


@contextmanager
def _reading(spec: ModelSpec, location: Path | str, *files: str) -> Iterator[None]:
    """Say of what a library raises on broken files which of a checkpoint's files it was reading.

    Whatever it raises: parsers of three languages report a wrong type by a dozen exceptions.

    Args:
        spec: the model.
        location: where the checkpoint is.
        files: those that are read in the block.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"model {spec.name}: {error}") from error
    except Exception as error:
        raise UserError(f"model {spec.name}: {_reason(error, spec, location, files)}") from error


def _folder(spec: ModelSpec, location: Path | str) -> Path | None:
    """Return the folder of a checkpoint's files; None for what the hub's cache does not hold yet."""
    return snapshot(location, spec.revision) if isinstance(location, str) else location


def _check_files(spec: ModelSpec, location: Path | str, whole: bool) -> PretrainedConfig | None:
    """Refuse broken files before the weights are read, by their look and by what they configure.

    Also a model that the engine cannot take over. Returns its configuration, None where there is none
    yet.

    Args:
        spec: the model.
        location: where the checkpoint is.
        whole: whether a missing file is a fault.
    """
    folder = _folder(spec, location)
    if folder is None:
        return None
    with _reading(spec, location):
        check_folder(folder, _again(spec, location), whole=whole)
    config = _config(spec, location, folder)
    if (folder / GENERATION).exists():  # transformers takes one that it cannot read for an absent one
        with _reading(spec, location, GENERATION):
            GenerationConfig.from_pretrained(folder)
    return config


def _config(spec: ModelSpec, location: Path | str, folder: Path) -> PretrainedConfig:
    """Read a folder's configuration. Raises `UserError` for a model that cannot be taken over."""
    with _reading(spec, location, CONFIG):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    try:
        check_family(config)
    except UserError as error:
        raise UserError(f"model {spec.name}: {folder / CONFIG}: {error}") from error
    return config


def _again(spec: ModelSpec, location: Path | str) -> str:
    if isinstance(location, Path):
        return AGAIN if spec.path is not None else f"Delete {location} to make it again."
    return f"Delete {_repository(spec, location).cache} to download it again."


def _repository(spec: ModelSpec, location: str) -> Repository:
    return Repository("model", location, spec.revision, _INSTEAD)


def _quantization(spec: ModelSpec) -> BitsAndBytesConfig:
    """Return what bitsandbytes is told. Raises `UserError` where it or a GPU is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize={spec.quantize} needs the package bitsandbytes: "
            "`pip install bitsandbytes`, or leave model.quantize out."
        )
    if spec.torch_device().type != "cuda":
        raise UserError(
            f"model.quantize={spec.quantize} needs a GPU, and the model is to run on "
            f"{spec.torch_device().type}. Leave model.quantize out."
        )
    if spec.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[spec.dtype],
    )


def _reason(error: Exception, spec: ModelSpec, location: Path | str, files: Sequence[str]) -> str:
    """Explain why a model could not be loaded, and what to do."""
    if isinstance(error, ImportError) and SINGLE in files:
        return (
            f"{location} is quantized. {first_line(error).rstrip('.')}. Or take a checkpoint that is "
            "not quantized."
        )
    if is_out_of_memory(error):
        return (
            "its weights do not fit into the memory of the device. Hold them in fewer bits "
            "(model.quantize=8bit or 4bit), divide them among GPUs (model.device_map=auto), or use "
            "model.device=cpu."
        )
    if isinstance(location, str):
        hint = explain(error, _repository(spec, location))
        if hint is not None:
            return hint
    folder = _folder(spec, location)
    what = location if folder is None else f"{_present(folder, files)} of {folder}"
    return (
        f"cannot load {what}: {_said(error)}. {_again(spec, location)} If its files are whole, this "
        "version of transformers cannot read them."
    )


def _said(error: Exception) -> str:
    """Return what an error says in one line, with its kind where that is half of it."""
    line = first_line(error).rstrip(".")
    if line.endswith(":") and error.__cause__ is not None:
        line = f"{line} {first_line(error.__cause__).rstrip('.')}"
    return line if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {line}"


def _present(folder: Path, files: Sequence[str]) -> str:
    """Name those of some files that are there; of a tokenizer's, the one that its parser refuses."""
    there = [name for name in files if (folder / name).exists()]
    if TOKENIZER in there:
        try:
            Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception:  # it raises nothing narrower
            return TOKENIZER
    return " or ".join(there or files)


def _check_complete(spec: ModelSpec, location: Path | str, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of which some tensors were filled at random, or were passed over."""
    sizes = {key: f"{key} of {list(has)}, not {list(wants)}" for key, has, wants in _misfits(report)}
    for what, keys in (
        ("holds weights of another size than the model's", sizes),
        ("lacks weights of the model", dict.fromkeys(report["missing_keys"])),
        ("holds weights that the model has no place for", dict.fromkeys(report["unexpected_keys"])),
    ):
        if keys:
            names = sorted(keys)
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = ", ".join(keys[name] or name for name in names[:3])
            raise UserError(
                f"model {spec.name}: {spec.source()} {what}: {listed}{more}. "
                f"{_belonging(spec, location, names)} {_again(spec, location)}"
            )
    if report.get("error_msgs"):
        raise UserError(
            f"model {spec.name}: {spec.source()} cannot be loaded: {report['error_msgs'][0]}. "
            f"{_belonging(spec, location, [])} {_again(spec, location)}"
        )


def _misfits(report: Mapping[str, Any]) -> Iterable[tuple[str, Sequence[int], Sequence[int]]]:
    return report.get("mismatched_keys") or ()


def _belonging(spec: ModelSpec, location: Path | str, keys: Sequence[str]) -> str:
    """Say which files do not belong together: the configuration, and those that hold some tensors."""
    folder = _folder(spec, location)
    held = tensors(folder) if folder is not None else {}
    files = sorted({held[key] for key in keys if key in held} or set(held.values()) or {SINGLE})
    if folder is not None and (folder / INDEX).exists():
        files = [INDEX, *files]
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{CONFIG} and {', '.join(files[:3])}{more} are not of one model, or are incomplete."


def _check_tokenizer(spec: ModelSpec, location: Path | str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that makes nothing of a text, and a chat template that loses what is said."""
    text = "bridge"
    with _reading(spec, location, *TOKENIZER_FILES):
        if not set(tokenizer.encode(text, add_special_tokens=False)) - {tokenizer.unk_token_id}:
            raise ValueError(f"it has no tokens for {text!r}")
    if tokenizer.chat_template is None:
        return
    folder = _folder(spec, location)
    in_file = folder is not None and (folder / TEMPLATE).exists()
    with _reading(spec, location, TEMPLATE if in_file else TOKENIZER_CONFIG):
        said = [{"role": "user", "content": text}]
        options = {"tokenize": False, "add_generation_prompt": True} | spec.template_options
        if text not in str(tokenizer.apply_chat_template(said, **options)):
            raise ValueError("the chat template does not hold what the user says")


def _check_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` for an end token that the model cannot write."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    eos = model.generation_config.eos_token_id
    given = eos if eos is not None else tokenizer.eos_token_id
    ids = given if isinstance(given, list | tuple) else [given]
    wrong = [each for each in ids if each is not None and not (type(each) is int and 0 <= each < rows)]
    if wrong or not ids:
        raise ValueError(f"eos_token_id {given!r} is no token of the model, which has {rows}")


def _check_on_accelerators(spec: ModelSpec, device_map: dict[str, Any]) -> None:
    """Refuse weights that wait in host memory or on disk, to be copied at every step.

    Times would mean nothing, and a run would take days.
    """
    waiting = sorted(module for module, device in device_map.items() if device in ("cpu", "disk"))
    if waiting:
        raise UserError(
            f"model {spec.name} does not fit into the GPUs: model.device_map={spec.device_map} leaves "
            f"{len(waiting)} of its {len(device_map)} parts outside (first: {waiting[0]}). Hold the "
            "weights in fewer bits (model.quantize=4bit), use more GPUs, or model.device=cpu."
        )


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec
) -> frozenset[int]:
    """Return the ids of tokens that end an answer: the generation config's, and those the spec adds.

    Raises `UserError` as `added_stop_ids` does.
    """
    return end_token_ids(model, tokenizer) | added_stop_ids(tokenizer, spec)


def added_stop_ids(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> frozenset[int]:
    """Return the ids of the tokens of `model.stop`. Raises `UserError` for a text that is no token."""
    ids: set[int] = set()
    for text in spec.stop:
        token: Any = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id:
            raise UserError(f"model.stop: {text!r} is not a token of {spec.name}.")
        ids.add(int(token))
    return frozenset(ids)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the generation config's end tokens, or else the tokenizer's."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    ids = set(eos) if isinstance(eos, list | tuple) else {eos} - {None}
    return frozenset(int(i) for i in ids)
