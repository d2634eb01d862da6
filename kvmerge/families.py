"""Which models the engine can take over, by their configuration alone: before any weight is read.

The engine replaces a model's attention function, so it must know everything that this function knows.
What a configuration says of it is read here, and what the engine does not know is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

from kvmerge.errors import UserError

SUPPORTED = (
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "helium",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
    "vaultgemma",
)
"""Model types whose full cache is `generate`'s, token for token (`tests/contract/test_families.py`)."""

_LAYERS = ("full_attention", "sliding_attention")
_UNKNOWN: Mapping[str, Callable[[Any], object]] = {
    "attends to an encoder's output": lambda of: (
        of("is_encoder_decoder") or of("add_cross_attention") or of("cross_attention_layers")
    ),
    "adds a bias by distance to its logits (ALiBi)": lambda of: (
        of("alibi") or of("position_embedding_type") == "alibi" or of("model_type") in ("bloom", "mpt")
    ),
    "caches one latent state for all heads (MLA)": lambda of: of("kv_lora_rank"),
    "attends within chunks": lambda of: of("attention_chunk_size"),
    "attends to later tokens too": lambda of: of("use_bidirectional_attention"),
    "shares keys and values between layers": lambda of: of("num_kv_shared_layers"),
    "chooses the tokens that it attends to itself": lambda of: of("index_topk"),
}
"""What an attention function may have to know that the engine does not, and how a configuration says
so."""


def check_family(config: PretrainedConfig) -> None:
    """Refuse a model whose attention the engine cannot take over.

    Raises:
        UserError: naming what the engine does not know, or the model types that it does.
    """
    text = text_config(config)
    kind = str(text.model_type)
    for what, says in _UNKNOWN.items():
        if says(lambda name: getattr(text, name, None)):
            raise UserError(f"model type {kind!r} is not supported: it {what}.")
    others = set(getattr(text, "layer_types", None) or ()) - set(_LAYERS)
    if others:
        raise UserError(
            f"model type {kind!r} is not supported: its layers of kind {', '.join(sorted(others))} "
            "have no cache of keys and values."
        )
    if kind not in SUPPORTED:
        raise UserError(
            f"model type {kind!r} is not supported: it has not been compared with plain transformers. "
            f"Supported: {', '.join(SUPPORTED)}."
        )


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a configuration that describes the decoder of text."""
    return config.get_text_config(decoder=True)


def windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Return for each layer the last tokens that a token sees there, itself among them; None: all."""
    text = text_config(config)
    window = getattr(text, "sliding_window", None)
    layers = int(text.num_hidden_layers)
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def local_windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Return the windows of layers that are left to them beside others that see all; None: all.

    In a model whose every layer has a window there is nothing to compress but within it: see
    `kvmerge.limits`, which holds the text to that window.
    """
    found = windows(config)
    return found if None in found else (None,) * len(found)


def rope_parameters(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """Return the settings of a model's rotations: one, one a kind of layers, or none."""
    given = getattr(text_config(config), "rope_parameters", None) or {}
    if "rope_type" in given:
        return [given]
    return [each for each in given.values() if isinstance(each, Mapping)]
