"""How large a model is: by its configuration where that is at hand, else by `model.shape`."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from kvmerge.families import text_config
from kvmerge.models import DTYPES, ModelSpec, Outline, attention_sizes

_BYTES_QUANTIZED = {"4bit": 0.5, "8bit": 1.0}
_WIDENING = 8 / 3
"""Of a Llama's feed-forward layers, where no configuration says it."""


@dataclass(frozen=True)
class Sizes:
    """What the cost of a model's work is counted from."""

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    """Width of the feed-forward layers."""
    vocabulary: int
    itemsize: int
    """Bytes of a number of the cache."""
    weight_bytes: float

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry, key and value, over all layers and KV heads."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize


def sizes_of(spec: ModelSpec, known: Outline | None) -> Sizes | None:
    """Return a model's sizes; None where neither its configuration nor `shape` tells them.

    Args:
        spec: the model as its file describes it.
        known: its outline, where it was looked at.
    """
    itemsize = DTYPES[spec.dtype].itemsize
    each = _BYTES_QUANTIZED.get(spec.quantize or "", itemsize)
    model = None if known is None else known.skeleton
    if model is not None:
        return _configured(model, text_config(model.config), itemsize, each)
    shape = spec.shape
    if shape is None:
        return None
    heads = shape.heads or shape.kv_heads
    hidden = heads * shape.head_dim
    return Sizes(
        parameters=shape.parameters,
        layers=shape.layers,
        heads=heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden=hidden,
        intermediate=round(_WIDENING * hidden),
        vocabulary=shape.vocabulary or 0,
        itemsize=itemsize,
        weight_bytes=shape.parameters * each,
    )


def _configured(model: PreTrainedModel, config: PretrainedConfig, itemsize: int, each: float) -> Sizes:
    heads, kv_heads, head_dim = attention_sizes(config)
    parameters = model.num_parameters()
    return Sizes(
        parameters=parameters,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        itemsize=itemsize,
        weight_bytes=parameters * each,
    )
