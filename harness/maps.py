"""Which layers and KV heads a run that observes draws maps of."""

from __future__ import annotations

import numpy as np
from transformers import PretrainedConfig

from harness.given import Observe
from kvmerge.errors import UserError
from kvmerge.families import local_windows
from kvmerge.models import attention_sizes

_MAPS = 4
"""Layers, and KV heads, whose maps are drawn unless others are named."""


def chosen_maps(config: PretrainedConfig, wanted: Observe) -> tuple[list[int], list[int]]:
    """Return the layers and KV heads whose maps are made.

    Raises:
        UserError: if the model does not have them, or leaves a layer to a window of its own.
    """
    windows = local_windows(config)
    seen = [index for index, window in enumerate(windows) if window is None]
    count = len(windows)
    if wanted.map_layers is None:
        places = np.linspace(0, len(seen) - 1, min(_MAPS, len(seen))).round().astype(int)
        layers = [seen[place] for place in places]
    else:
        if not all(-count <= layer < count for layer in wanted.map_layers):
            raise UserError(
                f"observe.map_layers={list(wanted.map_layers)}: the model has {count} layers, 0 to "
                f"{count - 1}."
            )
        layers = list(dict.fromkeys(layer % count for layer in wanted.map_layers))
        if local := [layer for layer in layers if layer not in seen]:
            raise UserError(
                f"observe.map_layers={list(wanted.map_layers)}: layer {local[0]} is left to its window "
                f"and not observed; those that are: {seen}."
            )
    _, kv_heads, _ = attention_sizes(config)
    heads = list(wanted.map_heads if wanted.map_heads is not None else range(min(_MAPS, kv_heads)))
    if not all(head < kv_heads for head in heads):
        raise UserError(
            f"observe.map_heads={heads}: the model has {kv_heads} KV heads, 0 to {kv_heads - 1}."
        )
    return layers, list(dict.fromkeys(heads))
