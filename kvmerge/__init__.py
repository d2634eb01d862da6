"""The engine that every cache method runs on, and KVMerger itself."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmerge.api import NothingCompressedWarning, compressed
    from kvmerge.budget import Budget
    from kvmerge.comparison import compare
    from kvmerge.compressed_cache import CompressedCache
    from kvmerge.compression import Compression, Generation
    from kvmerge.errors import UserError
    from kvmerge.method import Allowance, DecodeStep, Entries, Method, PrefillLayer
    from kvmerge.proof import UnprovenError

__all__ = [
    "Allowance",
    "Budget",
    "CompressedCache",
    "Compression",
    "DecodeStep",
    "Entries",
    "Generation",
    "Method",
    "NothingCompressedWarning",
    "PrefillLayer",
    "UnprovenError",
    "UserError",
    "compare",
    "compressed",
]

_HOMES = {
    "CompressedCache": "compressed_cache",
    "Compression": "compression",
    "Generation": "compression",
    "compressed": "api",
    "NothingCompressedWarning": "api",
    "Budget": "budget",
    "compare": "comparison",
    "UserError": "errors",
    "UnprovenError": "proof",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    # Late, because most of the package needs torch and transformers, which take seconds to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'method')}"), name)
