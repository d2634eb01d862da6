"""Whether what a GPU computes is right: its kernels against float64, the engine against `generate`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvmerge.budget import Budget
from kvmerge.engine import Stop, run_sample
from kvmerge.errors import UserError
from kvmerge.kernels.attention import prefill_attention
from kvmerge.resolve import load_method
from kvmerge.scores import column_sums
from kvmerge.session import Row
from scripts.bench.measure import random_states

Sums = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int]
"""Query heads, KV heads, tokens and head size."""


@dataclass(frozen=True)
class Check:
    """A result beside what it should be."""

    what: str
    states: str
    """The input: dtype and shape."""
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within bounds; NaN is not."""
        return self.error <= self.allowed


def check_kernels(shapes: Iterable[Shape], device: str) -> Iterator[Check]:
    """Compare attention, its log-sum-exp and the column sums with float64 on the same rounded states.

    Without a card there is no kernel to check, only the torch version of the column sums.

    Args:
        shapes: of the random states that are tried, each in three dtypes.
        device: `cuda` or `cpu`.

    Raises:
        UserError: on a card without Triton, or where torch gives no log-sum-exp.
    """
    versions = _versions(device)
    for shape in shapes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield from _check_states(shape, dtype, device, versions)


def _versions(device: str) -> dict[str, Sums]:
    """Return the implementations of the column sums, of queries, keys and log-sum-exp each."""
    versions: dict[str, Sums] = {"torch": lambda queries, keys, _: column_sums(queries, keys)}
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError("the package triton is missing; install the version that torch asks for.")
        from kvmerge.kernels import column_sums_triton

        versions["Triton"] = column_sums_triton.column_sums
    return versions


def _check_states(
    shape: Shape, dtype: torch.dtype, device: str, versions: Mapping[str, Sums]
) -> Iterator[Check]:
    heads, kv_heads, length, head_dim = shape
    kind = str(dtype).removeprefix("torch.")
    states = f"{kind}, {heads}/{kv_heads} heads, {length} x {head_dim}"
    queries, keys, values = random_states(*shape, dtype, device)
    exact = _exact(queries, keys, values)
    out, lse = prefill_attention(queries, keys, values, head_dim**-0.5)
    if lse is None:
        raise UserError(f"no attention kernel of torch gives a log-sum-exp here ({states}).")
    half = dtype != torch.float32
    yield Check("attention", states, _worst(out.double() - exact.out), 2e-2 if half else 1e-4)
    # The CPU's kernel rounds the logits of half-precision states, a card's does not.
    allowed = 1e-2 if half and device == "cpu" else 1e-4
    yield Check("log-sum-exp", states, _worst(lse.double() - exact.lse), allowed)
    for version, sums in versions.items():
        received = sums(queries, keys, exact.lse.float()).double()
        error = _worst((received - exact.sums) / exact.sums)
        yield Check(f"column sums, {version} (relative)", states, error, 1e-4)


def _worst(errors: Tensor) -> float:
    return float(errors.abs().max())


@dataclass(frozen=True)
class _Exact:
    """Attention in float64."""

    out: Tensor
    lse: Tensor
    sums: Tensor


def _exact(queries: Tensor, keys: Tensor, values: Tensor) -> _Exact:
    """Compute one query head after the other: a whole float64 map takes much memory."""
    length, head_dim = queries.shape[2:]
    group = queries.shape[1] // keys.shape[1]
    future = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    out, lse, sums = [], [], []
    for head in range(queries.shape[1]):
        key, value = keys[0, head // group].double(), values[0, head // group].double()
        logits = queries[0, head].double() @ key.T * head_dim**-0.5
        logits.masked_fill_(future, -torch.inf)
        weights = logits.softmax(-1)
        out.append(weights @ value)
        lse.append(logits.logsumexp(-1))
        sums.append(weights.sum(0))
    by_head = torch.stack(sums).unflatten(0, (-1, group))
    return _Exact(torch.stack(out)[None], torch.stack(lse)[None], by_head.sum(1)[None])


def check_engine(model: PreTrainedModel, ids: Tensor, tokens: int = 24) -> Check:
    """Compare the engine's full cache with transformers' own `generate`: the same tokens.

    Args:
        model: whose choices must not be close, so that rounding cannot change them.
        ids: `(1, T)` prompt.
        tokens: how many each generates.
    """
    full = Row(load_method("full"), Budget.parse(1))
    answer = run_sample(model, ids, [full], Stop(tokens, frozenset()))[0][0].token_ids
    model.generation_config.eos_token_id = None  # what is compared is `tokens` long
    generated = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    wanted = generated[0, ids.shape[1] :].tolist()
    differing = sum(a != b for a, b in zip(answer, wanted, strict=True))
    states = f"{ids.shape[1]} prompt tokens, {tokens} generated"
    return Check("full cache against generate (tokens that differ)", states, differing, 0)
