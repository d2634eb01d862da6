"""What do attention scores add to a prefill, and are they right?"""

from __future__ import annotations

import torch

from kvmerge.hook import forward, hooked
from kvmerge.method import PrefillLayer
from kvmerge.session import session_for
from scripts.bench.measure import Bench, Report, against

_PLAIN = "plain SDPA"


def prefill(bench: Bench, length: int) -> Report:
    """Time a prompt through plain transformers, and through the engine without and with scores."""
    ids = bench.prompt(length)

    @torch.inference_mode()
    def plain(packed: bool) -> None:
        model = bench.model if packed else bench.plain
        model(ids, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def engine(cell: str) -> None:
        with hooked(bench.model):
            session = session_for(bench.model, bench.rows([cell]), ["bench"])
            session.begin([length], 1)
            positions = torch.arange(length, device=ids.device).unsqueeze(0)
            forward(bench.model, session, ids, positions, logits_to_keep=1)

    seconds = bench.in_turn(
        {
            _PLAIN: lambda: plain(packed=False),
            "plain SDPA, packed weights": lambda: plain(packed=True),
            "engine, no scores (full cache)": lambda: engine("full@1"),
            "engine, scores and H2O at 35%": lambda: engine("h2o@0.35"),
            "engine, scores and KVMerger at 35%": lambda: engine("kvmerger@0.35"),
        }
    )
    return Report(
        f"prefill_{length}",
        f"Prefill of {length:,} tokens",
        "One prompt through all layers. Largest relative error of the column sums against float64, "
        f"over the KV heads and columns of one layer: {score_error(bench, length):.1e}.",
        against(seconds, _PLAIN),
        "with scores at most 1.25 times plain; error at most 1e-4",
        {"seconds": seconds},
    )


@torch.inference_mode()
def score_error(bench: Bench, length: int) -> float:
    """Return the largest relative error of one layer's column sums against float64."""
    layers: list[PrefillLayer] = []
    ids = bench.prompt(length)
    with hooked(bench.model):
        session = session_for(
            bench.model,
            bench.rows(["h2o@0.35"]),
            ["bench"],
            lambda _, index, layer, __: layers.append(layer) if index == 1 else None,
        )
        session.begin([length], 1)
        positions = torch.arange(length, device=ids.device).unsqueeze(0)
        forward(bench.model, session, ids, positions, logits_to_keep=1)
    queries, keys, scores = layers[0].queries, layers[0].keys, layers[0].scores
    assert scores is not None
    group = queries.shape[1] // keys.shape[1]
    wide = keys[0].double().repeat_interleave(group, dim=0)
    exact = torch.zeros(queries.shape[1], length, dtype=torch.float64, device=keys.device)
    columns = torch.arange(length, device=keys.device)
    # In slices of rows: a whole float64 map takes much memory.
    for begin in range(0, length, 256):
        end = min(begin + 256, length)
        logits = queries[0, :, begin:end].double() @ wide[:, :end].mT * layers[0].softmax.scale
        logits.masked_fill_(columns[:end] > columns[begin:end, None], -torch.inf)
        exact[:, :end] += logits.softmax(dim=-1).sum(dim=1)
    wanted = exact.unflatten(0, (-1, group)).sum(dim=1)
    return float(((scores[0].double() - wanted).abs() / wanted).max())
