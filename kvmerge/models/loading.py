"""From a `ModelSpec` to a model and its tokenizer, ready for inference.

Weights come from the hub, a local checkpoint, a file embedded in a package, or a seed; all of them go
through one loader.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from kvmerge.errors import UserError, causes, first_line
from kvmerge.hub import Repository, explain
from kvmerge.kernels.packed_linear import pack_linear_layers
from kvmerge.models.checkpoints import (
    check_folder,
    converted,
    damaged_files,
    save_random,
)
from kvmerge.models.hub import prepare
from kvmerge.models.spec import DTYPES, ModelSpec

_INSTEAD = "Without the hub: give the folder of a local copy with model.path=DIR."


def load(spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, ready for inference.

    Raises:
        UserError: if the weights cannot be found, read or held, saying what to do.
    """
    # Given only where the user asks for it: None would erase what the checkpoint says of itself.
    quantization = {"quantization_config": _quantization(spec)} if spec.quantize else {}
    failures = (
        OSError,
        ValueError,
        ImportError,  # a quantized checkpoint needs a package of its own
        HTTPError,
        SafetensorError,
        torch.OutOfMemoryError,
    )
    with _checkpoint(spec) as location:
        revision = spec.revision if isinstance(location, str) else None
        try:
            cached = isinstance(location, str) and prepare(location, revision)
            tokenizer = AutoTokenizer.from_pretrained(
                location, revision=revision, local_files_only=cached
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                location,
                revision=revision,
                local_files_only=cached,
                dtype=DTYPES[spec.dtype],
                device_map=spec.device_map or {"": spec.torch_device()},
                output_loading_info=True,
                **quantization,
            )
        except failures as error:
            raise UserError(f"model {spec.name}: {_reason(error, spec, location)}") from error
    model, report = loaded
    _check_complete(spec, "lacks weights of the model", report["missing_keys"])
    _check_complete(spec, "holds weights that the model has no place for", report["unexpected_keys"])
    _check_on_accelerators(spec, getattr(model, "hf_device_map", None) or {})
    if spec.pack_weights:
        pack_linear_layers(model)
    return model.eval(), tokenizer


@contextmanager
def _checkpoint(spec: ModelSpec) -> Iterator[Path | str]:
    """Yield where the weights are while they are loaded: a folder, or a hub id."""
    if spec.path is not None:
        folder = spec.folder()
        if folder is not None:
            check_folder(folder)
        yield folder or spec.path
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


def _reason(error: Exception, spec: ModelSpec, location: Path | str) -> str:
    """Explain why a model could not be loaded, and what to do."""
    if isinstance(error, ImportError):
        return (
            f"{location} is quantized. {first_line(error).rstrip('.')}. Or take a checkpoint that is "
            "not quantized."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "its weights do not fit into the memory of the device. Hold them in fewer bits "
            "(model.quantize=8bit or 4bit), divide them among GPUs (model.device_map=auto), or use "
            "model.device=cpu."
        )
    if isinstance(location, str):
        repository = Repository("model", location, spec.revision, _INSTEAD)
        if any(isinstance(cause, SafetensorError) for cause in causes(error)):
            return (
                f"a weight file of {location} is damaged. Delete {repository.cache} to download it "
                "again."
            )
        hint = explain(error, repository)
        if hint is not None:
            return hint
    elif damaged := damaged_files(location):
        return (
            f"{location} has damaged or truncated weight files: {', '.join(damaged)}. "
            "Copy or download them again."
        )
    return (
        f"cannot load {location}: {first_line(error).rstrip('.')}. A checkpoint in Hugging Face's "
        "format is needed: a hub id, or a folder given with model.path=DIR."
    )


def _check_complete(spec: ModelSpec, what: str, keys: set[str]) -> None:
    """Refuse a checkpoint of which some tensors were filled at random, or were passed over."""
    if keys:
        names = sorted(keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"model {spec.name}: {spec.source()} {what}: {', '.join(names[:3])}{more}. "
            "Its files are incomplete, or made for another architecture."
        )


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
    """Return the ids of tokens that end an answer: the generation config's, and those the spec adds."""
    ids: set[Any] = set(end_token_ids(model, tokenizer))
    for text in spec.stop:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id:
            raise UserError(f"model.stop: {text!r} is not a token of {spec.name}.")
        ids.add(token)
    return frozenset(int(i) for i in ids)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the generation config's end tokens, or else the tokenizer's."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    ids = set(eos) if isinstance(eos, list | tuple) else {eos} - {None}
    return frozenset(int(i) for i in ids)
