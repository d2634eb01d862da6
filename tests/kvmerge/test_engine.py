"""The engine against a naive one, and against transformers' own cache."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache

from baselines.cam import CaM
from baselines.full import Full
from baselines.h2o import H2O
from baselines.random import Random
from kvmerge import engine
from kvmerge.budget import Budget
from kvmerge.check import naive as naive_engine
from kvmerge.engine import (
    Comparison,
    Decoder,
    Request,
    Stop,
    Tally,
    run_sample,
    run_samples,
    score_continuations,
)
from kvmerge.errors import UserError
from kvmerge.hook import cache_name, hooked
from kvmerge.kvmerger import KVMerger
from kvmerge.method import Method, keep_all
from kvmerge.session import CacheSession, Policy, Row, seeded_generator
from tests.tiny import FAMILIES, new_model, prompt, replayed, shared_model

NEVER: frozenset[int] = frozenset()


def row(method, budget, **settings):
    return Row(method, Budget.parse(budget), **settings)


# caches of several lengths, several rows of one length, biases, draws, ragged heads
ROWS = [
    row(Full(), 1),
    row(KVMerger(), 0.5),
    row(H2O(), 0.5),
    row(CaM(), 0.35, seed=1),
    row(KVMerger(attn_bias="log_size"), 0.5),
    row(CaM(), 0.35, seed=2),
    row(KVMerger(attn_bias="log_size", sigma="mean_distance"), 0.35),
    row(KVMerger(budget_mode="eps_free", epsilon=0.3), 0.35),
    row(Random(), 7, seed=5),
    row(KVMerger(), 1),
    row(KVMerger(value_scale="size"), 0.35),
]
HELD = [
    row(H2O(), 0.5),
    row(CaM(), 0.35, seed=3),
    row(KVMerger(merge_every=3), 0.35),
    row(KVMerger(merge_every=1, attn_bias="log_size", rope="pre"), 0.35),
    row(KVMerger(merge_every=2, value_scale="size"), 0.5),
    row(Full(), 1),
    row(Random(), 7, seed=5),
]
APPEND, HOLD = Policy(), Policy("hold")
SKIP = Policy(layers_skip=(0,), skip_budget="plain")
COMPARISONS = pytest.mark.parametrize(
    ("rows", "policy"),
    [(ROWS, APPEND), ([*HELD, *ROWS[:4]], HOLD), (ROWS, SKIP)],
    ids=["append", "hold", "skip"],
)


def naive_answers(model, input_ids, rows, tokens, policy):
    return [naive_engine.greedy(model, input_ids, row, tokens, "s", policy) for row in rows]


def engine_answers(model, input_ids, rows, stop, **settings):
    results, _ = run_sample(model, input_ids, rows, stop, sample_id="s", **settings)
    return [result.token_ids for result in results]


# --- batches are rows alone


@COMPARISONS
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_batch_decodes_each_row_as_alone(kv_heads, rows, policy):
    """Rows of different length, leaving the batch at different steps."""
    model, input_ids = shared_model(kv_heads=kv_heads), prompt(43)
    naive = naive_answers(model, input_ids, rows, 14, policy)
    assert len({tuple(answer) for answer in naive}) > len(rows) // 2  # the rows do differ
    assert engine_answers(model, input_ids, rows, Stop(14, NEVER), policy=policy) == naive
    # stop at tokens of some answers, so that rows leave from the middle of their groups
    stops = frozenset({naive[1][4], naive[3][6], naive[-1][9], naive[0][12]})
    cut = [answer[: next((i + 1 for i, t in enumerate(answer) if t in stops), 14)] for answer in naive]
    assert len({len(answer) for answer in cut}) > 2
    found = engine_answers(model, input_ids, rows, Stop(14, stops), reference=0, policy=policy)
    assert found == cut


@pytest.mark.parametrize("chunk", [1, 3, 64])
@COMPARISONS
def test_replay_gives_the_logits_of_each_row_alone(monkeypatch, rows, policy, chunk):
    """After rows have left and the caches are rewound, in chunks of several tokens."""
    monkeypatch.setattr(engine, "REPLAY_TOKENS", chunk * len(rows))
    model, input_ids = shared_model(), prompt(43)
    answer = naive_engine.greedy(model, input_ids, rows[0], 8, "s", policy)
    comparison = Comparison(model, rows, "s", policy=policy)
    with hooked(model), torch.inference_mode():
        first = comparison.prefill(input_ids, 8)
        Decoder([comparison]).decode(Stop(8, frozenset(answer[3:5])))
        replays = [replayed(comparison, answer) for _ in range(2)]
    for index, each in enumerate(rows):
        wanted = naive_engine.step_logits(model, input_ids, each, answer[:-1], "s", policy)
        torch.testing.assert_close(first, wanted[0], atol=1e-4, rtol=0)
        for logits in replays:
            torch.testing.assert_close(logits[index], wanted[1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("limit", [5, 6, 7])
def test_an_answer_says_what_ended_it(limit):
    """The token that stops it comes after, with, and before the last that it may have."""
    model, input_ids = shared_model(), prompt(43)
    free = naive_engine.greedy(model, input_ids, ROWS[0], 20)
    place = next(i for i in range(5, 20) if free.index(free[i]) == i)  # it has not come before
    stop = Stop(limit + place - 5, frozenset({free[place]}))
    (result, *_), _ = run_sample(model, input_ids, ROWS, stop, sample_id="s")
    assert len(result.token_ids) == min(place + 1, stop.max_new_tokens)
    assert result.finish_reason == ("length" if limit == 5 else "stop")


def test_fidelity_is_the_divergence_along_the_references_answer():
    model, input_ids = shared_model(), prompt(43)
    free = naive_engine.greedy(model, input_ids, ROWS[0], 20)
    last = max(free.index(token) for token in free)  # the stop token has not come before
    results, _ = run_sample(
        model, input_ids, ROWS, Stop(20, frozenset(free[last : last + 1])), sample_id="s", reference=0
    )
    answer = results[0].token_ids
    assert answer == free[: last + 1]
    assert len(answer) > 2
    log_p = [
        naive_engine.step_logits(model, input_ids, each, answer[:-1], "s")[1:].log_softmax(-1)
        for each in ROWS
    ]
    for result, own in zip(results, log_p, strict=True):
        kl = (log_p[0].exp() * (log_p[0] - own)).sum(-1).mean()
        agree = (own.argmax(-1) == log_p[0].argmax(-1)).float().mean()
        assert result.fidelity.kl == pytest.approx(float(kl), abs=1e-4)
        assert result.fidelity.top1 == pytest.approx(float(agree))
        assert result.fidelity.tokens == len(answer) - 1
    assert results[0].fidelity.kl == pytest.approx(0, abs=1e-6)
    assert results[0].fidelity.top1 == 1
    assert max(result.fidelity.kl for result in results) > 0.1


def test_fidelity_takes_any_row_as_the_reference():
    model, input_ids = shared_model(), prompt(30)
    rows = [row(H2O(), 0.3), row(Full(), 1)]
    forwards, _ = run_sample(model, input_ids, rows, Stop(9, NEVER), reference=1)
    backwards, _ = run_sample(model, input_ids, rows[::-1], Stop(9, NEVER), reference=0)
    assert forwards[0].fidelity.kl == pytest.approx(backwards[1].fidelity.kl, abs=1e-6)
    assert forwards[1].fidelity.kl == pytest.approx(0, abs=1e-6)
    assert forwards[0].token_ids == backwards[1].token_ids


def test_an_answer_of_one_token_has_no_fidelity():
    model, input_ids = shared_model(), prompt(30)
    first = naive_engine.greedy(model, input_ids, ROWS[0], 1)
    results, _ = run_sample(model, input_ids, ROWS[:2], Stop(9, frozenset(first)), reference=0)
    assert [result.token_ids for result in results] == [first, first]
    assert [result.fidelity for result in results] == [None, None]


def test_a_tally_of_known_distributions():
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    first = torch.tensor([0.2, 0.8]).log()
    whole = Tally([1, 0, 1], [first, first], reference=0)
    whole.add([full, other])
    pieces = Tally([1, 0, 1], [first, first], reference=0)
    for n in range(2):
        pieces.add([full[n : n + 1], other[n : n + 1]])
    kl = (0.5 * torch.tensor([2.0, 2 / 3]).log()).sum().item() / 2
    for tally in (whole, pieces):
        figures = tally.fidelity()
        assert figures[0].kl == 0
        assert figures[1].kl == pytest.approx(kl, abs=1e-6)
        assert figures[1].top1 == 0.5
        assert figures[1].tokens == 2
        assert tally.nll == pytest.approx(
            [-math.log(0.8 * 0.5 * 0.1), -math.log(0.8 * 0.25 * 0.1)], abs=1e-6
        )


# --- several prompts in one batch


BATCH = [(43, ROWS, APPEND), (17, ROWS[:3], SKIP), (60, HELD, HOLD)]


def requests(reference=0):
    return [
        Request(prompt(length, seed=length), rows, f"s{length}", reference, policy=policy)
        for length, rows, policy in BATCH
    ]


def alone(model, stop):
    return [run_samples(model, [each], stop)[0][0] for each in requests()]


def test_samples_of_a_batch_are_answered_as_alone():
    model = shared_model()
    free = alone(model, Stop(12, NEVER))
    stops = frozenset(free[0][2].token_ids[3:5] + free[1][0].token_ids[6:7])
    for stop in (Stop(12, NEVER), Stop(12, stops, min_new_tokens=2)):
        wanted = alone(model, stop)
        found = [results for results, _ in run_samples(model, requests(), stop)]
        lengths = {len(each.token_ids) for results in wanted for each in results}
        assert len(lengths) > 1 or stop.token_ids == NEVER
        for one, batch in zip(wanted, found, strict=True):
            assert [each.token_ids for each in batch] == [each.token_ids for each in one]
            assert [each.stats for each in batch] == [each.stats for each in one]
            for lone, together in zip(one, batch, strict=True):
                assert (lone.fidelity is None) == (together.fidelity is None)
                if lone.fidelity is not None:
                    assert together.fidelity.kl == pytest.approx(lone.fidelity.kl, abs=1e-4)
                    assert together.fidelity.tokens == lone.fidelity.tokens


def test_logits_of_a_batch_are_those_of_each_sample_alone(monkeypatch):
    model = shared_model()
    texts = [prompt(n, seed=n)[0].tolist() for n in (9, 1, 14)]

    def comparisons():
        made = [Comparison(model, each.rows, each.sample_id, policy=each.policy) for each in requests()]
        for comparison, each in zip(made, requests(), strict=True):
            comparison.prefill(each.input_ids, 14)
        return made

    with hooked(model), torch.inference_mode():
        wanted = [
            replayed(each, text) if len(text) > 1 else None
            for each, text in zip(comparisons(), texts, strict=True)
        ]
        monkeypatch.setattr(engine, "REPLAY_TOKENS", 5 * sum(len(rows) for _, rows, _ in BATCH))
        parts = list(Decoder(comparisons()).replay(texts))
    for index, logits in enumerate(wanted):
        found = torch.cat([part[index] for part in parts], dim=1)
        if logits is None:
            assert found.shape[1] == 0
        else:
            torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


def test_continuations_of_a_batch_are_weighed_as_alone():
    model = shared_model()
    texts = [prompt(n, seed=n)[0].tolist() for n in (9, 1, 14)]
    together = score_continuations(model, requests(), texts)
    for each, text, (results, _) in zip(requests(), texts, together, strict=True):
        ((wanted, _),) = score_continuations(model, [each], [text])
        assert [r.nll for r in results] == pytest.approx([r.nll for r in wanted], abs=1e-3)
        assert [r.fidelity is None for r in results] == [len(text) == 1] * len(results)


def test_only_samples_with_a_reference_are_compared():
    model = shared_model()
    mixed = [requests(reference)[0] for reference in (None, 1)]
    first, second = (results for results, _ in run_samples(model, mixed, Stop(6, NEVER)))
    assert [each.fidelity for each in first] == [None] * len(ROWS)
    assert second[1].fidelity.kl == pytest.approx(0, abs=1e-6)
    assert second[0].fidelity.kl > 0


# --- the probability of a given text


@COMPARISONS
@pytest.mark.parametrize("reference", [None, 0])
def test_a_continuation_is_weighed_by_each_row_alone(monkeypatch, rows, policy, reference):
    monkeypatch.setattr(engine, "REPLAY_TOKENS", 4 * len(rows))
    model, input_ids, text = shared_model(), prompt(43), prompt(12, seed=5)[0]
    request = Request(input_ids, rows, "s", reference, policy=policy)
    ((results, _),) = score_continuations(model, [request], [text.tolist()])
    for result, each in zip(results, rows, strict=True):
        logits = naive_engine.step_logits(model, input_ids, each, text[:-1].tolist(), "s", policy)
        wanted = torch.nn.functional.cross_entropy(logits, text, reduction="sum")
        assert result.nll == pytest.approx(float(wanted), abs=1e-3)
        assert result.token_ids == []
        assert (result.fidelity is None) == (reference is None)
    assert len({round(result.nll, 3) for result in results}) > len(rows) // 2


def test_the_full_caches_continuation_equals_one_plain_forward():
    model, input_ids, text = shared_model(), prompt(43), prompt(12, seed=5)
    (((result,), _),) = score_continuations(model, [Request(input_ids, [ROWS[0]])], [text[0].tolist()])
    with torch.inference_mode():
        logits = model(torch.cat([input_ids, text], dim=1)).logits[0, 42:-1]
    wanted = torch.nn.functional.cross_entropy(logits, text[0], reduction="sum")
    assert result.nll == pytest.approx(float(wanted), abs=1e-3)


def test_fidelity_along_a_continuation():
    model, input_ids, text = shared_model(), prompt(43), prompt(12, seed=5)[0].tolist()
    ((results, _),) = score_continuations(model, [Request(input_ids, ROWS, "s", 0)], [text])
    log_p = [
        naive_engine.step_logits(model, input_ids, each, text[:-1], "s")[1:].log_softmax(-1)
        for each in ROWS
    ]
    for result, own in zip(results, log_p, strict=True):
        kl = (log_p[0].exp() * (log_p[0] - own)).sum(-1).mean()
        assert result.fidelity.kl == pytest.approx(float(kl), abs=1e-4)
        assert result.fidelity.tokens == len(text) - 1


def test_a_continuation_of_one_token_needs_no_cache():
    model, input_ids = shared_model(), prompt(43)
    ((results, _),) = score_continuations(model, [Request(input_ids, ROWS[:3], "", 0)], [[7]])
    assert len({result.nll for result in results}) == 1
    assert results[0].nll > 0
    assert [result.fidelity for result in results] == [None] * 3


def test_a_continuation_with_rows_that_alter_the_prefill():
    model, input_ids, text = shared_model(), prompt(40), prompt(9, seed=5)[0].tolist()
    rows = [row(Banded(5), 0.5), row(Full(), 1), row(Banded(99), 0.5)]
    ((results, _),) = score_continuations(model, [Request(input_ids, rows, "", 1)], [text])
    assert results[2].nll == pytest.approx(results[1].nll, abs=1e-4)
    assert abs(results[0].nll - results[1].nll) > 1e-3


# --- against transformers


def dynamic_cache_logits(model, input_ids, each, answer):
    """Decode from what the row kept, with transformers' own cache and explicit positions."""
    kept = {}
    run_sample(
        model,
        input_ids,
        [each],
        Stop(1, NEVER),
        sample_id="s",
        observer=lambda _, layer_idx, __, entries: kept.update({layer_idx: entries}),
    )
    cache = DynamicCache()
    for layer_idx, entries in kept.items():
        cache.update(entries.keys, entries.values, layer_idx)
    logits = []
    for step, token in enumerate(answer):
        stored = cache.get_seq_length()
        with torch.inference_mode():
            out = model(
                torch.tensor([[token]]),
                **{cache_name(model): cache},
                position_ids=torch.tensor([[input_ids.shape[1] + step]]),
                attention_mask=torch.zeros(1, 1, 1, stored + 1),
                use_cache=True,
            )
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "each",
    [row(Full(), 1), row(H2O(), 0.5), row(KVMerger(), 0.35), row(CaM(), 0.35)],
    ids=["full", "h2o", "kvmerger", "cam"],
)
def test_decode_from_the_entries_equals_transformers(family, each):
    model, input_ids = shared_model(family), prompt(40)
    results, _ = run_sample(model, input_ids, [each], Stop(8, NEVER), sample_id="s")
    answer = results[0].token_ids
    logits = dynamic_cache_logits(model, input_ids, each, answer[:-1])
    assert logits.argmax(-1).tolist() == answer[1:]
    comparison = Comparison(model, [each], "s")
    with hooked(model), torch.inference_mode():
        comparison.prefill(input_ids, 8)
        logits_again = replayed(comparison, answer)[0]
    torch.testing.assert_close(logits_again, logits, atol=1e-4, rtol=0)


def test_the_full_cache_equals_a_forward_without_cache():
    model, input_ids = shared_model(), prompt(30)
    answer = engine_answers(model, input_ids, [ROWS[0]], Stop(8, NEVER))[0]
    with torch.inference_mode():
        wanted = model(torch.cat([input_ids, torch.tensor([answer])], dim=1)).logits[0, 29:-1]
    assert wanted.argmax(-1).tolist() == answer
    comparison = Comparison(model, [ROWS[0]])
    with hooked(model), torch.inference_mode():
        first = comparison.prefill(input_ids, 8)
        logits_again = replayed(comparison, answer)[0]
    torch.testing.assert_close(first, wanted[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_again, wanted[1:], atol=1e-4, rtol=0)


# --- stopping


def test_no_stop_token_before_the_minimum():
    model, input_ids = shared_model(), prompt(43)
    free = engine_answers(model, input_ids, ROWS[:3], Stop(9, NEVER))
    stops = frozenset({free[0][0], free[1][2]})
    for minimum in (0, 1, 4):
        found = engine_answers(model, input_ids, ROWS[:3], Stop(9, stops, minimum))
        for answer in found:
            at = [i for i, token in enumerate(answer) if token in stops]
            assert at in ([], [len(answer) - 1])
            assert all(i >= minimum for i in at)
            assert at or len(answer) == 9
    assert engine_answers(model, input_ids, ROWS[:1], Stop(9, stops))[0] == free[0][:1]


def test_no_more_tokens_than_allowed():
    model, input_ids = shared_model(), prompt(43)
    free = engine_answers(model, input_ids, ROWS[:2], Stop(6, NEVER))
    assert [len(answer) for answer in free] == [6, 6]
    assert engine_answers(model, input_ids, ROWS[:2], Stop(1, NEVER)) == [a[:1] for a in free]


# --- what the session hands over


def test_the_observer_sees_every_row_and_layer():
    seen = []
    model, input_ids = shared_model(), prompt(30)
    results, _ = run_sample(
        model,
        input_ids,
        ROWS[:3],
        Stop(1, NEVER),
        observer=lambda *arguments: seen.append(arguments),
    )
    assert [(index, layer_idx) for index, layer_idx, _, _ in seen] == [
        (index, layer_idx) for layer_idx in range(2) for index in range(3)
    ]
    for index, layer_idx, layer, kept in seen:
        assert layer.layer_idx == layer_idx
        assert (layer.num_layers, layer.length, layer.softmax.scale) == (2, 30, 0.25)
        assert results[index].stats.entries[layer_idx] == [kept.keys.shape[2]] * 2


def test_scores_are_those_of_the_map():
    """The engine's scores come from the kernel's log-sum-exp; each sums to G * T."""
    layers = []
    run_sample(
        shared_model(),
        prompt(60),
        [row(H2O(), 0.5)],
        Stop(1, NEVER),
        observer=lambda _, __, layer, ___: layers.append(layer),
    )
    for layer in layers:
        wanted = naive_engine.map_column_sums(layer.queries, layer.keys, layer.softmax.scale)
        torch.testing.assert_close(layer.scores, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(layer.scores.sum(-1), torch.full((1, 2), 120.0))


@pytest.mark.parametrize(
    ("rows", "policy", "scored"),
    [
        ([row(Full(), 1), row(Random(), 0.5)], APPEND, False),
        ([row(H2O(), 1), row(KVMerger(), 1000)], APPEND, False),
        ([row(Full(), 1), row(H2O(), 0.5)], APPEND, True),
        ([row(H2O(), 1)], HOLD, True),
    ],
)
def test_scores_are_computed_only_where_they_are_read(rows, policy, scored):
    layers = []
    run_sample(
        shared_model(),
        prompt(20),
        rows,
        Stop(1, NEVER),
        observer=lambda _, __, layer, ___: layers.append(layer),
        policy=policy,
    )
    assert all((layer.scores is not None) == scored for layer in layers)


def test_stages_are_entered_and_left_one_after_the_other():
    events = []

    @contextmanager
    def watched(stage):
        events.append(f"enter {stage}")
        yield
        events.append(f"leave {stage}")

    rows = [row(Full(), 1), row(H2O(), 0.5)]
    results, _ = run_sample(shared_model(), prompt(20), rows, Stop(3, NEVER), stages=watched)
    assert results == run_sample(shared_model(), prompt(20), rows, Stop(3, NEVER))[0]
    a_layer = ["enter attention", "leave attention"] + ["enter compression", "leave compression"] * 2
    assert events == a_layer * 2 + ["enter cache", "leave cache"] * 2 * 2  # layers, then steps of each


def test_statistics_count_real_entries():
    model, input_ids = shared_model(), prompt(60)
    rows = [
        row(H2O(), 0.35),
        row(KVMerger(), 0.35),
        row(KVMerger(attn_bias="log_size"), 0.35),
        row(KVMerger(budget_mode="eps_free", epsilon=0.2), 0.35),
    ]
    kept = []
    results, _ = run_sample(
        model,
        input_ids,
        rows,
        Stop(1, NEVER),
        observer=lambda index, _, __, entries: kept.append((index, entries)),
    )
    per_entry = 2 * 16 * 4
    for index in range(3):
        assert results[index].stats.entries == [[21, 21]] * 2
        assert results[index].stats.kv_bytes == 4 * 21 * per_entry
    assert results[0].stats.size_bytes == 0
    assert results[1].stats.size_bytes == 4 * 21 * 8
    assert results[2].stats.size_bytes == 4 * 21 * (8 + 4)
    ragged = [entries for index, entries in kept if index == 3]
    counts = [(entries.sizes[0] > 0).sum(-1).tolist() for entries in ragged]
    assert results[3].stats.entries == counts
    assert counts[0][0] != counts[0][1]  # padding was left out
    assert results[3].stats.kv_bytes == sum(map(sum, counts)) * per_entry
    assert results[0].stats.represented is None
    assert results[1].stats.represented == [[60, 60]] * 2  # merged, not evicted
    assert results[3].stats.represented == [entries.sizes[0].sum(-1).tolist() for entries in ragged]


def test_a_layer_that_is_not_finite_is_named():
    model = new_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[16:32] = torch.nan
    before = model.config._attn_implementation
    message = r"keys of layer 1, KV head 1 are not finite.*float32 or bfloat16"
    with pytest.raises(UserError, match=message):
        run_sample(model, prompt(9), [row(Full(), 1)], Stop(1, NEVER))
    assert model.config._attn_implementation == before
    model = new_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:16] = torch.inf
    with pytest.raises(UserError, match="values of layer 0, KV head 0"):
        run_sample(model, prompt(9), [row(Full(), 1)], Stop(1, NEVER))


def test_large_finite_sums_are_not_mistaken_for_overflow():
    """The sum of a half-precision tensor may overflow where none of its elements does."""
    model = new_model().half()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.abs_()
        model.model.embed_tokens.weight.abs_()
        model.model.layers[0].input_layernorm.weight.mul_(500)
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-4)
    results, _ = run_sample(model, prompt(200), [row(Full(), 1)], Stop(2, NEVER))
    assert len(results[0].token_ids) == 2


# --- layers left out


@pytest.mark.parametrize(
    ("layers", "budget", "share"),
    [(32, 0.5, 0.448276), (32, 0.35, 0.282759), (40, 0.5, 0.459459), (40, 0.35, 0.297297)],
)
def test_skipped_layers_are_paid_for_by_the_others(layers, budget, share):
    policy = Policy(layers_skip=(0, 1, -1))
    kept = Budget.parse(budget)
    found = [policy.allowance(kept, 3500, layer_idx, layers) for layer_idx in range(layers)]
    assert [n_keep for n_keep, _ in found].count(3500) == 3
    assert found[0] == found[1] == found[-1] == (3500, 1.0)
    assert found[2][1] == pytest.approx(share, abs=1e-6)
    assert found[2][0] == int(share * 3500 + 1e-3)
    mean = sum(n_keep for n_keep, _ in found) / layers / 3500
    assert mean == pytest.approx(budget, abs=1 / 3500)
    plain = replace(policy, skip_budget="plain")
    assert plain.allowance(kept, 3500, 2, layers) == (int(budget * 3500), budget)


def test_skipped_layers_must_exist_and_leave_something_to_the_others():
    with pytest.raises(UserError, match=r"\[0, 1, -1\] alone keeps more than the budget 0.05"):
        Policy(layers_skip=(0, 1, -1)).allowance(Budget(0.05), 3500, 5, 32)
    for layers in ((2,), (-3,)):
        with pytest.raises(UserError, match="the model has 2 layers"):
            Policy(layers_skip=layers).allowance(Budget(0.5), 100, 0, 2)


def test_a_switch_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"unknown decode_policy 'held'.*'hold'"):
        Policy(decode_policy="held")
    with pytest.raises(UserError, match=r"unknown pos 'relative'.*absolute, rolled"):
        Policy(pos="relative")
    with pytest.raises(UserError, match=r"unknown skip_budget 'none'.*compensated, plain"):
        Policy(skip_budget="none")
    with pytest.raises(UserError, match=r"layers_skip=\['first'\] must be a list of layer numbers"):
        Policy(layers_skip=("first",))  # type: ignore[arg-type]


# --- positions by place in the cache


def test_rolled_positions_change_nothing_where_nothing_is_evicted():
    model, input_ids = shared_model(), prompt(30)
    rows, text = [row(Full(), 1)], prompt(12, seed=5)[0].tolist()
    each = [Request(input_ids, rows, policy=Policy(pos=pos)) for pos in ("absolute", "rolled")]
    ((absolute,), _), ((rolled,), _) = run_samples(model, each, Stop(8, NEVER))
    assert absolute.token_ids == rolled.token_ids
    ((absolute,), _), ((rolled,), _) = score_continuations(model, each, [text, text])
    assert rolled.nll == pytest.approx(absolute.nll, abs=1e-4)


def test_rolled_positions_are_undefined_for_ragged_heads():
    ragged = row(KVMerger(budget_mode="eps_free", epsilon=0.2), 0.35)
    with pytest.raises(UserError, match="pos=rolled is undefined"):
        run_sample(shared_model(), prompt(60), [ragged], Stop(2, NEVER), policy=Policy(pos="rolled"))


# --- methods that need more of the engine


@dataclass(frozen=True)
class Banded(Method):
    """Prompt tokens see only the last few; what is stored is everything."""

    width: int

    alters_prefill = True
    meets_budget = False

    def compress(self, layer, allowance):
        return keep_all(layer)

    def visible(self, layer, allowance):
        tokens = torch.arange(layer.length)
        age = tokens[:, None] - tokens
        return ((age >= 0) & (age < self.width)).expand(1, layer.keys.shape[1], -1, -1)


@dataclass(frozen=True)
class Sloped(Method):
    """The first layer keeps one entry more than the second gives up."""

    allocates = True

    def compress(self, layer, allowance):
        return H2O().compress(layer, allowance)

    def allocate(self, layers, allowance):
        assert [layer.layer_idx for layer in layers] == [0, 1]
        return [allowance.n_keep + 3, allowance.n_keep - 3]


def test_a_method_that_alters_the_prefill_gets_one_of_its_own():
    model, input_ids = shared_model(), prompt(40)
    rows = [row(Banded(5), 0.5), row(Full(), 1), row(Banded(99), 0.5), row(H2O(), 0.5)]
    seen = set()
    results, _ = run_sample(
        model,
        input_ids,
        rows,
        Stop(8, NEVER),
        reference=1,
        observer=lambda index, layer_idx, _, kept: seen.add((index, layer_idx, kept.keys.shape[2])),
    )
    assert seen == {(i, n, 20 if i == 3 else 40) for i in range(4) for n in range(2)}
    shared, _ = run_sample(model, input_ids, [rows[1], rows[3]], Stop(8, NEVER), reference=0)
    for index, alone in ((1, shared[0]), (3, shared[1])):
        assert results[index].token_ids == alone.token_ids
        assert results[index].fidelity == alone.fidelity
    assert results[2].token_ids == results[1].token_ids  # a band over everything hides nothing
    assert results[2].fidelity.kl == pytest.approx(0, abs=1e-5)
    assert results[0].fidelity.kl > 1e-3


def test_a_method_that_alters_the_prefill_cannot_share_it():
    with pytest.raises(UserError, match="cannot share it"):
        CacheSession([row(Banded(5), 0.5), row(Full(), 1)], 2)


def test_a_method_that_allocates_divides_its_budget_over_the_layers():
    model, input_ids = shared_model(), prompt(40)
    rows = [row(Full(), 1), row(Sloped(), 0.5), row(H2O(), 0.5)]
    results, _ = run_sample(model, input_ids, rows, Stop(8, NEVER))
    assert results[1].stats.entries == [[23, 23], [17, 17]]
    alone, _ = run_sample(model, input_ids, [rows[0], rows[2]], Stop(8, NEVER))
    assert [results[0].token_ids, results[2].token_ids] == [r.token_ids for r in alone]
    whole, _ = run_sample(model, input_ids, [row(Sloped(), 1)], Stop(8, NEVER))
    assert whole[0].token_ids == results[0].token_ids


# --- seeds


def test_generators_depend_on_their_arguments_and_nothing_else():
    """A change here changes every published draw: the number is fixed."""
    assert seeded_generator(42, "qasper/0", 3).initial_seed() == 8724727620849476711
    settings = [
        (1, "a", 0, None),
        (2, "a", 0, None),
        (1, "b", 0, None),
        (1, "a", 1, None),
        (1, "a", 0, 0),
        (1, "a", 0, 1),
    ]
    assert len({seeded_generator(*each).initial_seed() for each in settings}) == len(settings)
