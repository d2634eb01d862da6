"""Models: what the harness must know about each, and how one is loaded."""

from kvmerge.models.checkpoints import Embedded, Random
from kvmerge.models.loading import (
    Outline,
    added_stop_ids,
    end_token_ids,
    load,
    outline,
    stop_token_ids,
)
from kvmerge.models.spec import DTYPES, ModelSpec, Shape, attention_sizes

__all__ = [
    "DTYPES",
    "Embedded",
    "ModelSpec",
    "Outline",
    "Random",
    "Shape",
    "added_stop_ids",
    "attention_sizes",
    "end_token_ids",
    "load",
    "outline",
    "stop_token_ids",
]
