"""A question after the compression: what is kept of a context, how every question about it is read."""

from dataclasses import replace

import pytest
import torch

import kvmerge.engine
from kvmerge.budget import Budget
from kvmerge.check import naive as naive_engine
from kvmerge.engine import Request, Stop, run_samples, score_continuations
from kvmerge.errors import UserError
from kvmerge.proof import UnprovenError
from kvmerge.resolve import choices, load_method
from kvmerge.session import Policy, Row
from tests.tiny import prompt, shared_model

NEVER = frozenset()
CONTEXT, QUESTIONS = prompt(50), [prompt(7, seed=1), prompt(4, seed=2), prompt(7, seed=3)]
METHODS = [name for name in choices("method") if not load_method(name).acts_on_decode]


@pytest.fixture(autouse=True, scope="module")
def no_end_token():
    shared_model().generation_config.eos_token_id = None
    yield
    shared_model().generation_config.eos_token_id = 2


def row(name, budget=0.35):
    return Row(load_method(name), Budget.parse(1 if name == "full" else budget))


def request(question, *names, **more):
    return Request(
        CONTEXT, [row("full"), *map(row, names)], "s", reference=0, question=question, **more
    )


def answers(requests, tokens=8):
    model = shared_model()
    return [results for results, _ in run_samples(model, requests, Stop(tokens, NEVER))]


def test_the_full_cache_answers_as_if_prompt_and_question_had_been_one():
    whole = torch.cat([CONTEXT, QUESTIONS[0]], dim=1)
    found = answers([request(QUESTIONS[0])])[0][0]
    plain = answers([Request(whole, [row("full")])])[0][0]
    assert found.token_ids == plain.token_ids


@pytest.mark.parametrize("name", [n for n in METHODS if not load_method(n).allocates])
def test_a_question_is_read_after_the_context_was_compressed_and_stored_whole(name):
    """As the naive engine does: compress the context, feed the question token by token, go on."""
    each = row(name)
    model = shared_model()
    found = answers([Request(CONTEXT, [each], "s", question=QUESTIONS[0])], tokens=5)[0][0]
    fed = QUESTIONS[0][0].tolist()
    logits = naive_engine.step_logits(model, CONTEXT, each, [*fed, *found.token_ids], "s")
    assert found.token_ids == logits[len(fed) : -1].argmax(-1).tolist()


def kept(question, names):
    seen = {}

    def note(index, layer_idx, layer, entries):
        seen[index, layer_idx] = layer.length, entries

    answers([request(question, *names, observer=note)], tokens=1)
    return seen


def test_nothing_of_the_question_reaches_what_is_kept():
    names = [name for name in METHODS if not load_method(name).alters_prefill and name != "full"]
    one, other = (kept(question, names) for question in QUESTIONS[:2])
    assert one.keys() == other.keys()
    assert len(one) == 2 * (1 + len(names))
    for place, (length, entries) in one.items():
        assert length == CONTEXT.shape[1]
        again = other[place][1]
        for part in ("keys", "values", "positions", "bias"):
            left, right = getattr(entries, part), getattr(again, part)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)


def test_budgets_are_fractions_of_the_context():
    stats = answers([request(QUESTIONS[0], "h2o")])[0][1].stats
    assert stats.entries == [[17, 17]] * 2
    assert stats.read == [[17, 17]] * 2


def test_the_first_token_differs_between_cells_and_counts():
    """Inside the prompt the question is read by the full cache, so that one token tells nothing."""
    after = answers([request(QUESTIONS[0], "h2o")], tokens=1)[0]
    whole = torch.cat([CONTEXT, QUESTIONS[0]], dim=1)
    inside = answers([Request(whole, [row("full"), row("h2o")], "s", reference=0)], tokens=1)[0]
    assert inside[1].fidelity is None
    assert inside[0].token_ids == inside[1].token_ids
    assert after[1].fidelity.tokens == 1
    assert after[1].fidelity.kl > 1e-3
    firsts = {
        name: answers([request(QUESTIONS[0], name)], tokens=1)[0][1].token_ids[0] for name in METHODS
    }
    assert len(set(firsts.values())) > 1


def test_fidelity_is_of_every_token_of_the_full_caches_answer():
    found = answers([request(QUESTIONS[0], "snapkv")])[0]
    assert found[1].fidelity.tokens == 8
    text = found[0].token_ids
    model, fed = shared_model(), QUESTIONS[0][0].tolist()
    full, own = (
        naive_engine.step_logits(model, CONTEXT, row(name), [*fed, *text], "s")[len(fed) : -1]
        .double()
        .log_softmax(-1)
        for name in ("full", "snapkv")
    )
    kl = (full.exp() * (full - own)).sum(-1).mean()
    assert found[1].fidelity.kl == pytest.approx(float(kl), rel=1e-3)


# --- questions that share a context


@pytest.fixture
def prefills(monkeypatch):
    """Counts prefills."""
    seen = []
    honest = kvmerge.engine.Comparison.prefill

    def counted(self, *arguments):
        seen.append(self)
        return honest(self, *arguments)

    monkeypatch.setattr(kvmerge.engine.Comparison, "prefill", counted)
    return seen


def as_one(results):
    return [(r.token_ids, r.stats.entries, r.fidelity) for r in results]


def test_questions_about_a_context_share_its_prefill_and_are_answered_as_alone(prefills):
    names = ["kvmerger", "random", "cam", "tova"]
    together = answers([request(question, *names) for question in QUESTIONS])
    assert len(prefills) == 1
    alone = [answers([request(question, *names)])[0] for question in QUESTIONS]
    assert len(prefills) == 4
    for shared, own in zip(together, alone, strict=True):
        for one, other in zip(shared, own, strict=True):
            assert one.token_ids == other.token_ids
            assert one.stats.entries == other.stats.entries
            assert one.fidelity.kl == pytest.approx(other.fidelity.kl, abs=1e-5)


def test_rolled_positions_begin_anew_with_every_question():
    rolled = Policy(pos="rolled")
    together = answers([request(question, "h2o", policy=rolled) for question in QUESTIONS])
    alone = [answers([request(question, "h2o", policy=rolled)])[0] for question in QUESTIONS]
    assert [as_one(each) for each in together] == [as_one(each) for each in alone]


def test_answers_that_end_early_leave_the_next_question_whole():
    """A finished row swaps its place in the buffers with another."""
    first = answers([request(QUESTIONS[0], "h2o", "snapkv", "tova")])[0]
    stop = Stop(8, frozenset({first[1].token_ids[1], first[3].token_ids[0]}))
    requests = [request(question, "h2o", "snapkv", "tova") for question in QUESTIONS]
    together = [results for results, _ in run_samples(shared_model(), requests, stop)]
    alone = [run_samples(shared_model(), [each], stop)[0][0] for each in requests]
    for shared, own in zip(together, alone, strict=True):
        assert [each.token_ids for each in shared] == [each.token_ids for each in own]
        assert [each.stats.read for each in shared] == [each.stats.read for each in own]


@pytest.mark.parametrize(
    "change",
    [
        {"input_ids": prompt(50, seed=9)},
        {"sample_id": "t"},
        {"rows": [row("full"), row("h2o", 0.5)]},
        {"policy": Policy(pos="rolled")},
    ],
    ids=["context", "draws", "rows", "policy"],
)
def test_nothing_else_is_shared(prefills, change):
    other = replace(request(QUESTIONS[1], "h2o"), **change)
    answers([request(QUESTIONS[0], "h2o"), other], tokens=1)
    assert len(prefills) == 2


def test_prompts_without_a_question_are_never_shared(prefills):
    answers([request(None, "h2o"), request(None, "h2o")], tokens=1)
    assert len(prefills) == 2


def test_a_given_continuation_is_scored_after_the_question():
    text = [5, 6, 7]
    ((results, _),) = score_continuations(shared_model(), [request(QUESTIONS[0], "h2o")], [text])
    fed = QUESTIONS[0][0].tolist()
    for each, found in zip((row("full"), row("h2o")), results, strict=True):
        logits = naive_engine.step_logits(shared_model(), CONTEXT, each, [*fed, *text], "s")
        wanted = logits[len(fed) : -1].log_softmax(-1)[range(3), text].sum()
        assert found.nll == pytest.approx(-float(wanted), rel=1e-4)


def test_long_questions_are_fed_in_pieces(monkeypatch):
    wanted = as_one(answers([request(QUESTIONS[0], "h2o")])[0])
    monkeypatch.setattr(kvmerge.engine, "REPLAY_TOKENS", 4)  # two tokens of two rows
    found = as_one(answers([request(QUESTIONS[0], "h2o")])[0])
    assert [each[:2] for each in found] == [each[:2] for each in wanted]
    assert found[1][2].kl == pytest.approx(wanted[1][2].kl, abs=1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "policy"),
    [("h2o", Policy("hold")), ("h2o_sim_decode", Policy())],
    ids=["hold", "simulated"],
)
def test_a_row_that_would_drop_parts_of_the_question_is_refused(name, policy):
    with pytest.raises(UserError, match="decides again after each"):
        answers([request(QUESTIONS[0], name, policy=policy)])


def test_a_question_counts_towards_the_models_positions():
    long = prompt(470)
    with pytest.raises(UserError, match="512 positions"):
        answers([Request(long, [row("full")], question=prompt(40))])
    answers([Request(long, [row("full")], question=prompt(34))])


def test_a_row_that_reads_all_of_the_context_is_found_out(monkeypatch):
    """The proof goes on: a method that keeps everything is no method at 35%."""
    monkeypatch.setattr(
        "kvmerge.session.CacheSession._compress",
        lambda self, index, layer: self._keep(index, layer),
    )
    from kvmerge.method import keep_all

    def keep(self, index, layer):
        kept = keep_all(layer)
        self.stats[index].add_layer(kept)
        return kept

    monkeypatch.setattr("kvmerge.session.CacheSession._keep", keep, raising=False)
    with pytest.raises(UnprovenError, match="where 17 were asked for"):
        answers([request(QUESTIONS[0], "h2o")])
