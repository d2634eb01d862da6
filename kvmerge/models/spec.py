"""What the harness must know about a model; its file in `configs/model` fills a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from kvmerge.errors import UserError, unknown
from kvmerge.models.checkpoints import Embedded, Random

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
    heads: int | None = None
    """Query heads; None: as many as KV heads."""
    vocabulary: int | None = None
    """Tokens that an answer chooses from; None: not stated."""


def attention_sizes(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the query heads, KV heads and head size that a model's configuration states or implies."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _holds_numbers(device: torch.device) -> bool:
    """Return whether a device other than a CPU or GPU can be used here; `meta` never can."""
    try:
        return float(torch.ones(1, device=device)) == 1.0
    except (RuntimeError, NotImplementedError):
        return False


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
    """On a CPU in float32, keep linear layers as oneDNN reads them (`kvmerge.kernels.packed_linear`):
    several times as fast on AMD, results equal to rounding."""
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
        if not isinstance(self.max_length, int) or self.max_length < 2:
            raise UserError(
                f"model.max_length={self.max_length} must be a whole number of tokens, 2 or more."
            )
        if self.context is not None and self.context < 1:
            raise UserError(f"model.context={self.context} must be 1 or more positions, or null.")
        if self.chat not in ("template", "none") and "{prompt}" not in self.chat:
            raise UserError(
                f"model.chat={self.chat!r} wraps no prompt. Give 'template' (the tokenizer's own), "
                "'none', or a text holding {prompt}, e.g. '[INST]{prompt}[/INST]'."
            )

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
        """Return the device to run on; of several, the kind."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"model.device={self.device!r} is not a torch device.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"model.device={self.device}: torch sees no GPU here; use auto or cpu.")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"model.device={self.device}: torch sees {torch.cuda.device_count()} GPUs here, "
                "numbered from 0."
            )
        if device.type not in ("cpu", "cuda") and not _holds_numbers(device):
            raise UserError(f"model.device={self.device}: torch cannot compute on it here; use auto.")
        return device

    def folder(self) -> Path | None:
        """Return the local checkpoint that `path` names; None if it is a hub id or not given.

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
        """Name what the weights are, for provenance: hub id with revision, path, digest, or seed."""
        if self.path is not None:
            local = Path(self.path).expanduser().is_dir()
            return self.path if local or not self.revision else f"{self.path}@{self.revision}"
        if self.embedded is not None:
            return f"{self.embedded.requirement}/{self.embedded.file} sha256:{self.embedded.sha256}"
        return f"{self.random}"
