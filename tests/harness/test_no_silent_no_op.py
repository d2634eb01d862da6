"""Faults that would leave a cell with the answers of another cache, planted below `run.py`.

Each is put where such a fault would come in, and must end the run with an error that names the cell,
the sample and what is wrong, before a line of it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import kvmerge.cache
import kvmerge.engine
import kvmerge.hook
from baselines.h2o import H2O
from kvmerge.cache import LayerCache, RowGroup, SteppedRow
from kvmerge.engine import Decoder
from kvmerge.hook import NAME
from kvmerge.method import keep_all
from tests.conftest import Output
from tests.tiny_run import read_lines

Run = Callable[..., str]
SAMPLE = "longbench/trec/trec-0"


@pytest.fixture
def error(
    command: Callable[..., Output], checkpoint: Path, data: Path, tmp_path: Path
) -> Callable[..., str]:
    """What `run.py` says before it ends with exit status 2, having written nothing of the sample."""

    def run(*given: str) -> str:
        folder = tmp_path / "out"
        output = command(
            "benchmark=longbench",
            f"benchmark.data_dir={data}",
            "benchmark.tasks=[trec]",
            f"model.path={checkpoint}",
            "limit=1",
            f"output_dir={folder}",
            *given,
        )
        assert output.status == 2
        assert not read_lines(folder)
        return " ".join(output.err.partition("error: ")[2].split())

    return run


# --- the five


def test_a_method_that_returns_everything(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(H2O, "compress", lambda self, layer, allowance: keep_all(layer))
    found = error("cells=[full@1,h2o@0.5]")
    assert f"h2o@0.5 on {SAMPLE}: layer 0: attention reads" in found
    assert "where 69 were asked for" in found


@pytest.mark.parametrize("policy", ["append", "hold"])
def test_a_bias_that_is_ignored(error: Run, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    for name in ("cached_attention", "weighted_attention"):
        honest = getattr(kvmerge.cache, name)

        def without(
            queries: Tensor, keys: Tensor, values: Tensor, softmax: Any, bias: Any, *more: Any,
            honest: Any = honest,
        ) -> Any:  # fmt: skip
            return honest(queries, keys, values, softmax, None, *more)

        monkeypatch.setattr(kvmerge.cache, name, without)
    found = error("cells=[full@1,kvmerger@0.5,kvmerger_log@0.5]", f"decode_policy={policy}")
    assert f"kvmerger_log@0.5 on {SAMPLE}: layer 0: its entries carry a logit bias" in found
    assert "attention is given none" in found


@pytest.mark.parametrize("state", ["keys", "values"])
def test_a_buffer_of_another_row(error: Run, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    honest = RowGroup.attend

    def mixed(self: RowGroup, *arguments: Any) -> Tensor:
        if self.active > 1:  # two rows of the same length
            setattr(self, state, getattr(self, state).flip(0))
        return honest(self, *arguments)

    monkeypatch.setattr(RowGroup, "attend", mixed)
    found = error("cells=[full@1,h2o@0.5,streaming_llm@0.5]")
    assert f"h2o@0.5 on {SAMPLE}: layer 0: the {state} that attention reads are not" in found


def test_a_buffer_of_the_prompt_cut_to_the_same_length(
    error: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LayerCache.__init__

    def uncompressed(self: LayerCache, entries: Any, *arguments: Any, **named: Any) -> None:
        full, *others = entries
        cut = [
            kvmerge.cache.Entries(
                full.keys[:, :, : each.keys.shape[2]],
                full.values[:, :, : each.keys.shape[2]],
                each.positions,
            )
            for each in others
        ]
        honest(self, [full, *cut], *arguments, **named)

    monkeypatch.setattr(LayerCache, "__init__", uncompressed)
    found = error("cells=[full@1,h2o@0.5]")
    assert f"h2o@0.5 on {SAMPLE}: layer 0: the keys that attention reads are not" in found


def test_positions_by_the_length_of_the_cache(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = kvmerge.engine.forward

    def numbered(model: Any, session: Any, tokens: Tensor, positions: Tensor, **named: Any) -> Any:
        if isinstance(session, Decoder):
            positions = torch.tensor([[length] for length in stored_lengths(session)])
        return honest(model, session, tokens, positions, **named)

    monkeypatch.setattr(kvmerge.engine, "forward", numbered)
    found = error("cells=[h2o@0.5,full@1]")
    assert f"h2o@0.5 on {SAMPLE}: the model places a token at position 69" in found
    assert "that stands at 139 of its text" in found


def stored_lengths(decoder: Decoder) -> list[int]:
    """Entries that each row of a batch stores in its first layer."""
    lengths = {}
    for comparison in decoder.comparisons:
        for group in comparison.session.layers[0].groups:
            assert isinstance(group, RowGroup)
            lengths |= dict.fromkeys(group.rows, group.length)
    return [lengths[row] for row in sorted(lengths)]


def test_a_hook_that_never_fires(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, sdpa_attention_forward)
    found = error("cells=[full@1,h2o@0.5]")
    assert f"full@1 on {SAMPLE}: attention of 2 of 2 layers never came to kvmerge" in found


# --- and what else would give the answers of another cache


def test_a_method_that_never_drops_what_it_holds(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(H2O, "hold", lambda self, entries, step: entries)
    found = error("cells=[full@1,h2o@0.5]", "decode_policy=hold")
    assert f"h2o@0.5 on {SAMPLE}: layer 0: attention reads 71 entries per KV head" in found
    assert "where at most 70 are due after 2 tokens" in found


def test_positions_that_the_model_counts_itself(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = kvmerge.engine.forward

    def unplaced(model: Any, session: Any, tokens: Tensor, positions: Tensor, **named: Any) -> Any:
        return honest(model, session, tokens, None, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(kvmerge.engine, "forward", unplaced)
    assert f"full@1 on {SAMPLE}: the model is given no positions" in error("cells=[full@1]")


def test_positions_that_nobody_looks_at(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvmerge.hook, "_before_layers", lambda *_: None)
    assert f"full@1 on {SAMPLE}: nobody saw at which positions" in error("cells=[full@1]")


def test_a_layer_that_reads_nothing(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LayerCache.attend

    def idle(self: LayerCache, order: Any, queries: Tensor, *states: Any) -> Tensor:
        assert self.proof is not None
        if self.proof.layer_idx == 1:
            return queries
        return honest(self, order, queries, *states)

    monkeypatch.setattr(LayerCache, "attend", idle)
    found = error("cells=[full@1,h2o@0.5]")
    assert f"full@1 on {SAMPLE}: layer 1: attention reads its cache for 0 of 1 new" in found


def test_an_output_that_is_thrown_away(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LayerCache.attend

    def from_the_full_cache(self: LayerCache, order: Any, *states: Any) -> Tensor:
        out = honest(self, order, *states)
        return out[:1].expand_as(out)  # the first row is the full cache

    monkeypatch.setattr(LayerCache, "attend", from_the_full_cache)
    found = error("cells=[full@1,h2o@0.5]")
    assert f"h2o@0.5 on {SAMPLE}: it reads less than the prompt, and has the full" in found


def test_a_full_budget_that_is_not_the_full_cache(error: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LayerCache.attend

    def nudged(self: LayerCache, order: Any, *states: Any) -> Tensor:
        out = honest(self, order, *states)
        ours = torch.tensor([row == 1 for row in order])
        return out + 1e-6 * ours.view(-1, 1, 1, 1)

    monkeypatch.setattr(LayerCache, "attend", nudged)
    found = error("cells=[full@1,h2o@1]")
    assert f"h2o@1 on {SAMPLE}: its budget holds the whole prompt, and its logits" in found


def test_entries_of_a_row_that_decides_at_every_step_are_compared_too(
    error: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SteppedRow.__init__

    def mixed(self: SteppedRow, row: int, entries: Any, *arguments: Any) -> None:
        turned = kvmerge.cache.Entries(
            entries.keys, entries.values.flip(2), entries.positions, scores=entries.scores
        )
        honest(self, row, turned, *arguments)

    monkeypatch.setattr(SteppedRow, "__init__", mixed)
    found = error("cells=[full@1,h2o@0.5]", "decode_policy=hold")
    assert f"h2o@0.5 on {SAMPLE}: layer 0: the values that attention reads are not" in found
