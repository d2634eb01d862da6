"""Models: what the harness must know about each, and how one is loaded.

A model is data: its file in `configs/model` fills a `ModelSpec`. Weights come from the hub, a local
checkpoint, a file embedded in a package, or a seed; all of them go through one loader.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from kvmerge.checkpoints import (
    Embedded,
    Random,
    cache_dir,
    check_folder,
    converted,
    damaged_files,
    save_random,
)
from kvmerge.errors import UserError, first_line, unknown
from kvmerge.hub import explain, prepare
from kvmerge.onednn import pack_linear_layers

__all__ = [
    "DTYPES",
    "Embedded",
    "ModelSpec",
    "Random",
    "Shape",
    "cache_dir",
    "load",
    "stop_token_ids",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Accelerate's ways to divide a model's layers among the GPUs."""
QUANTIZATIONS = ("4bit", "8bit")


@dataclass(frozen=True)
class Shape:
    """The size of a model, for plans made before its weights are there."""

    parameters: float
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """One model as its file in `configs/model` describes it."""

    name: str
    max_length: int
    """Most tokens of a benchmark prompt, before the chat wrap."""
    chat: str
    """How prompts are wrapped (see `benchmarks.task.PromptFormat`)."""
    path: str | None = None
    """Hub id, or the directory of a local checkpoint. None: the embedded file or a random model."""
    revision: str | None = None
    """Commit of the hub repository; None for the newest. A local checkpoint has none."""
    dtype: str = "float32"
    device: str = "auto"
    """`auto`: a GPU where there is one; otherwise a torch device."""
    device_map: str | None = None
    """How the layers are divided among several GPUs (`DEVICE_MAPS`); None: one device holds all."""
    quantize: str | None = None
    """Weights held in `4bit` (nf4) or `8bit` by bitsandbytes; None: in `dtype`."""
    pack_weights: bool = True
    """On a CPU in float32, keep linear layers as oneDNN reads them (`kvmerge.onednn`): several times
    as fast on AMD, results equal to rounding."""
    stop: Sequence[str] = ()
    """Texts of tokens that end an answer, beside the model's own end tokens."""
    context: int | None = None
    """Positions that the model was trained for, prompt and answer together; None: not stated."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """What the tokenizer's chat template is called with."""
    embedded: Embedded | None = None
    random: Random | None = None
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.device != "auto":
            self.torch_device()
        self._check_placement()
        if self.path is None and self.embedded is None and self.random is None:
            raise UserError(f"model {self.name} has no weights: give model.path=DIR or a hub id.")
        if self.random is not None and self.context is None:
            raise UserError(f"model {self.name} is random: model.context must say its positions.")
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise UserError(f"model.max_length={self.max_length} must be a whole number of tokens.")

    def _check_placement(self) -> None:
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise unknown("model.quantize", str(self.quantize), QUANTIZATIONS)
        if self.quantize == "8bit" and self.dtype != "float16":
            raise UserError(
                f"model.quantize=8bit computes in float16, and model.dtype={self.dtype}. Give "
                "model.dtype=float16 as well, or use model.quantize=4bit."
            )
        if self.device_map is None:
            return
        if self.device_map not in DEVICE_MAPS:
            raise unknown("model.device_map", str(self.device_map), DEVICE_MAPS)
        if self.device != "auto":
            raise UserError(
                f"model.device={self.device} and model.device_map={self.device_map} both say where "
                "the model goes. Leave one of them out."
            )

    def torch_device(self) -> torch.device:
        """The device to run on; of several, the kind."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"model.device={self.device!r} is not a torch device.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"model.device={self.device}: torch sees no GPU here; use auto or cpu.")
        return device

    def folder(self) -> Path | None:
        """The local checkpoint that `path` names; None if it is a hub id or not given.

        Raises:
            UserError: for what cannot be a hub id and is no directory.
        """
        if self.path is None:
            return None
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            return folder
        if self.path.startswith((".", "/", "~")) or self.path.count("/") > 1:
            raise UserError(f"model.path={self.path} is not a directory with a checkpoint.")
        return None

    def source(self) -> str:
        """What the weights are, for provenance: hub id with revision, path, digest, or seed."""
        if self.path is not None:
            local = Path(self.path).expanduser().is_dir()
            return self.path if local or not self.revision else f"{self.path}@{self.revision}"
        if self.embedded is not None:
            return f"{self.embedded.requirement}/{self.embedded.file} sha256:{self.embedded.sha256}"
        return f"{self.random}"


def load(spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, ready for inference.

    Raises:
        UserError: if the weights cannot be found, read or held, saying what to do.
    """
    quantization = _quantization(spec)
    failures = (OSError, ValueError, HTTPError, SafetensorError, torch.OutOfMemoryError)
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
                quantization_config=quantization,
                output_loading_info=True,
            )
        except failures as error:
            raise UserError(f"model {spec.name}: {_reason(error, spec, location)}") from error
    model, report = loaded
    _check_complete(spec, report["missing_keys"])
    _check_on_accelerators(spec, getattr(model, "hf_device_map", None) or {})
    if spec.pack_weights:
        pack_linear_layers(model)
    return model.eval(), tokenizer


@contextmanager
def _checkpoint(spec: ModelSpec) -> Iterator[Path | str]:
    """Where the weights are while they are loaded: a folder, or a hub id."""
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


def _quantization(spec: ModelSpec) -> BitsAndBytesConfig | None:
    """What bitsandbytes is told. Raises `UserError` where it or a GPU is missing."""
    if spec.quantize is None:
        return None
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
    """Why a model could not be loaded, and what to do."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "its weights do not fit into the memory of the device. Hold them in fewer bits "
            "(model.quantize=8bit or 4bit), divide them among GPUs (model.device_map=auto), or use "
            "model.device=cpu."
        )
    if isinstance(location, str):
        hint = explain(error, location, spec.revision)
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


def _check_complete(spec: ModelSpec, missing: set[str]) -> None:
    """Refuse a checkpoint without some of its tensors, which transformers fills at random."""
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"model {spec.name}: {spec.source()} lacks weights of the model: "
            f"{', '.join(names[:3])}{more}. Its files are incomplete, or made for another architecture."
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
    """Ids of the tokens that end an answer: the generation config's, and those the spec adds."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    ids = set(eos) if isinstance(eos, list | tuple) else {eos} - {None}
    for text in spec.stop:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id:
            raise UserError(f"model.stop: {text!r} is not a token of {spec.name}.")
        ids.add(token)
    return frozenset(int(i) for i in ids)
