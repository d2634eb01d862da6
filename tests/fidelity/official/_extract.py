"""Single classes and functions of the authors' files, run without what the files import.

Their code was written for transformers versions that no longer install; what is compared needs little
of it. An attention module's `forward` runs on a stand-in for the module whose projections hand given
queries, keys and values through.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional


def definitions(path: Path, names: Sequence[str], **given: Any) -> SimpleNamespace:
    """Execute some top-level definitions of a file.

    Args:
        path: the file.
        names: classes and functions to execute.
        given: what else they refer to, beside torch and typing.
    """
    body = [node for node in _tree(path).body if getattr(node, "name", None) in names]
    missing = set(names) - {getattr(node, "name", "") for node in body}
    assert not missing, f"{path} has no {missing}"
    return SimpleNamespace(**_execute(path, body, given))


def branch(path: Path, where: Sequence[str], mentions: str, **given: Any) -> dict[str, Any]:
    """Execute the one `if` statement of a method that mentions a name.

    Args:
        path: the file.
        where: class and method.
        mentions: text of its condition.
        given: the local variables it starts from.

    Returns:
        its variables afterwards.
    """
    body: Sequence[ast.stmt] = _tree(path).body
    for name in where:
        [node] = [node for node in body if getattr(node, "name", None) == name]
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        body = node.body
    found = [node for node in body if isinstance(node, ast.If) and mentions in ast.unparse(node.test)]
    assert len(found) == 1
    return _execute(path, found, given)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _execute(path: Path, body: Sequence[ast.stmt], given: dict[str, Any]) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": functional, "math": math}
    names |= {"Any": Any, "Optional": Optional, "Dict": dict, "List": list, "Tuple": tuple}
    names |= {"print": lambda *_: None} | given
    exec(compile(ast.Module(list(body), []), str(path), "exec"), names)
    return names


def attention_module(heads: int, kv_heads: int, head_dim: int, rotary: Any) -> SimpleNamespace:
    """A stand-in for a Llama attention module; its input is what `hidden` makes."""
    ends = [heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim]
    return SimpleNamespace(
        config=SimpleNamespace(pretraining_tp=1),
        num_heads=heads,
        num_key_value_heads=kv_heads,
        num_key_value_groups=heads // kv_heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
        q_proj=lambda states: states[..., : ends[0]],
        k_proj=lambda states: states[..., ends[0] : ends[1]],
        v_proj=lambda states: states[..., ends[1] :],
        o_proj=lambda states: states,
        rotary_emb=rotary,
    )


def hidden(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Input of the stand-in: `(1, n, (heads + 2 kv_heads) head_dim)` from `(1, heads, n, head_dim)`."""
    return torch.cat([states.transpose(1, 2).flatten(2) for states in (queries, keys, values)], dim=-1)


class SlicedCache:
    """What the caches of AsymKV and KVSlimmer need of their base class, StreamingLLM's."""

    k_seq_dim = v_seq_dim = 2

    def __init__(self, start_size: int, cache_size: int) -> None:
        self.start_size, self.cache_size = start_size, cache_size

    def k_slice(self, states: Tensor, begin: int, end: int) -> Tensor:
        """Some tokens of `(1, heads, n, head_dim)`."""
        return states[:, :, begin:end]

    v_slice = k_slice


def positions_in(kept: Tensor, states: Tensor) -> list[list[int]]:
    """Where each of the kept states `(1, heads, k, head_dim)` stands in `(1, heads, n, head_dim)`.

    Returns:
        one sorted list a head.
    """
    same = (kept[0].unsqueeze(2) == states[0].unsqueeze(1)).all(dim=-1)  # (heads, k, n)
    assert bool((same.sum(dim=-1) == 1).all())
    return same.int().argmax(dim=-1).sort(dim=-1).values.tolist()


def softmax_row(query: Tensor, keys: Tensor) -> Tensor:
    """Weights `(1, heads, 1, n)` of one query `(1, heads, 1, head_dim)` over `(1, kv_heads, n, …)`."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    return (query @ keys.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(dim=-1)
