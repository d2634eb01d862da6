"""A chat, turn after turn on one cache: what is compressed when, by `recompress`."""

from __future__ import annotations

import pytest
import torch

from kvmerge import UserError, compressed
from kvmerge.hook import CACHE_NAMES, cache_name
from tests import tiny
from tests.tiny import prompt

PAD, END = 0, 2


@pytest.fixture(scope="module")
def model():
    made = tiny.new_model()
    made.generation_config.eos_token_id = None
    return made


def say(model, text, cache=None, tokens=6, **options):
    """Answer a text of all turns; the text with the answer, and the cache."""
    given = {} if cache is None else {cache_name(model): cache}
    given |= {"attention_mask": torch.ones_like(text), "do_sample": False} | options
    out = model.generate(text, max_new_tokens=tokens, return_dict_in_generate=True, **given)
    return out.sequences, next(out[name] for name in CACHE_NAMES if name in out)


def chat(model, turns):
    """The text after each turn, each going on from the cache of the one before; and the cache."""
    texts, text, cache = [], prompt(30), None
    for turn in turns:
        text, cache = say(model, text, cache)
        texts.append(text)
        text = torch.cat([text, prompt(7 + turn, seed=turn)], 1)
    return texts, cache


def entries(compression):
    kept = [compression.last.kept(layer) for layer in range(tiny.LAYERS)]
    return [(each.keys, each.values, each.positions) for each in kept]


@pytest.mark.parametrize("recompress", ["never", "each_turn"])
def test_a_chat_at_a_full_budget_is_plain_transformers(model, recompress):
    plain, _ = chat(model, range(3))
    with compressed(model, "kvmerger", 1, recompress=recompress):
        found, _ = chat(model, range(3))
    assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def test_never_compresses_the_first_prompt_and_appends_the_rest(model):
    with compressed(model, "h2o", 0.5) as c:
        texts, cache = chat(model, range(3))
    assert c.summary()[["turn", "compressed", "prompt_tokens"]].values.tolist() == [
        [1, True, 30],
        [2, False, 30],
        [3, False, 30],
    ]
    fed = [text.shape[1] - 1 for text in texts]  # the last token of a turn is fed in the next
    assert c.summary().appended_tokens.tolist() == [length - 30 for length in fed]
    assert c.summary().decode_steps.tolist() == [5, 5, 5]
    per_entry = 2 * 2 * 2 * tiny.HEAD_DIM * 4
    assert cache.nbytes() == (15 + fed[-1] - 30) * per_entry


@pytest.mark.parametrize(
    ("method", "budget", "policy"),
    [
        ("kvmerger", 0.5, "append"),
        ("kvmerger_log", 12, "append"),
        ("h2o", 0.5, "hold"),
        ("random", 0.5, "append"),
        ("pyramidkv", 0.5, "append"),
        ("cam", 0.35, "append"),
    ],
)
def test_each_turn_is_as_if_the_chat_had_been_one_prompt(model, method, budget, policy):
    """Answers, entries bit for bit, and statistics are those of a fresh prompt of the whole text."""
    settings = {"decode_policy": policy, "keep": True}
    with compressed(model, method, budget, recompress="each_turn", **settings) as c:
        text, cache = prompt(30), None
        for turn in range(3):
            before, (text, cache) = text, say(model, text, cache)
            kept, rows = entries(c), c.last.rows
            fresh_text, _ = say(model, before)
            assert torch.equal(fresh_text, text)
            assert c.last.rows == rows
            for one, other in zip(entries(c), kept, strict=True):
                assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
            text = torch.cat([text, prompt(7 + turn, seed=turn)], 1)
    assert cache is not None
    with pytest.raises(UserError, match="gone with its cache"):
        c.generations[2].kept(0)  # the cache lives, and holds another text
    chats = c.generations[::2]
    assert [each.turn for each in chats] == [1, 2, 3]
    assert all(each.compressed for each in chats)
    assert [each.rows[0].prompt_tokens for each in chats] == [30, 30 + 6 + 7, 43 + 6 + 8]
    assert [each.appended_tokens for each in chats] == [5, 5, 5]


def test_answers_of_several_turns_are_one_cache(model):
    """The cache that was given is the one that goes on: a chat may hold on to its first."""
    with compressed(model, "h2o", 0.5, recompress="each_turn"):
        text, first = say(model, prompt(30))
        for turn in range(2):
            text, cache = say(model, torch.cat([text, prompt(7, seed=turn)], 1), first)
            assert cache is first
        assert cache.get_seq_length() == text.shape[1] - 1
        assert cache.stats[0].entries == [[(text.shape[1] - 6) // 2] * 2] * 2


def left_padded(rows):
    width = max(len(row) for row in rows)
    text = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return text, mask


def test_a_batch_of_chats_is_padded_anew_at_each_turn():
    """Rows whose answers end early and whose turns differ in length: each as it is alone."""
    model = tiny.new_model()
    with torch.no_grad():
        model.lm_head.weight[END] = model.lm_head.weight[14]  # one answer ends in its third token
    model.generation_config.pad_token_id = PAD
    first = [prompt(30)[0].tolist(), prompt(20, seed=4)[0].tolist()]
    with compressed(model, "h2o", 0.5, recompress="each_turn"):
        text, mask = left_padded(first)
        said, cache = say(model, text, attention_mask=mask)
        answers = [row[text.shape[1] :] for row in said.tolist()]
        ended = [row.index(END) + 1 if END in row else len(row) for row in answers]
        assert len(set(ended)) == 2  # one row was padded while the other went on
        turns = [prompt(9, seed=1)[0].tolist(), prompt(4, seed=2)[0].tolist()]
        second = [
            row + answer[:end] + turn
            for row, answer, end, turn in zip(first, answers, ended, turns, strict=True)
        ]
        text, mask = left_padded(second)
        together, _ = say(model, text, cache, attention_mask=mask)
        for row, alone in enumerate(second):
            wanted, _ = say(model, torch.tensor([alone]))
            wanted = wanted[0, len(alone) :]
            assert torch.equal(together[row, text.shape[1] :][: len(wanted)], wanted)


def test_a_batch_of_chats_whose_turns_differ_in_length_is_refused_where_they_are_appended(model):
    with compressed(model, "h2o", 0.5):
        text, cache = say(model, torch.cat([prompt(30), prompt(30, seed=1)]))
        longer = torch.cat([text, prompt(2 * 7).view(2, 7)], 1)
        mask = torch.ones_like(longer)
        mask[1, -9:-7] = 0
        with pytest.raises(UserError, match="tokens after the prompt cannot be padding"):
            say(model, longer, cache, attention_mask=mask)
        say(model, longer, cache)  # nothing has happened to it


@pytest.mark.parametrize("recompress", ["never", "each_turn"])
def test_another_text_is_refused_and_the_chat_goes_on(model, recompress):
    with compressed(model, "h2o", 0.5, recompress=recompress) as c:
        text, cache = say(model, prompt(30))
        more = torch.cat([text, prompt(7)], 1)
        changed = more.clone()
        changed[0, 32] += 1
        with pytest.raises(UserError, match="row 0: from its token 32 on, the text is not what"):
            say(model, changed, cache)
        shorter = {"never": "35 tokens, and 7 were given", "each_turn": "from its token 0 on"}
        with pytest.raises(UserError, match=shorter[recompress]):
            say(model, prompt(7, seed=8), cache)
        with pytest.raises(UserError, match="the batch has 2 rows, and its cache 1"):
            say(model, more.expand(2, -1), cache)
        say(model, more, cache)
    assert len(c.generations) == 2


def test_padding_is_no_part_of_the_text_that_must_be_the_same(model):
    batch, mask = left_padded([prompt(30)[0].tolist(), prompt(20)[0].tolist()])
    with compressed(model, "h2o", 0.5):
        text, cache = say(model, batch, attention_mask=mask)
        more = torch.cat([text, prompt(14).view(2, 7)], 1)
        masked = torch.cat([mask, torch.ones(2, 13, dtype=torch.long)], 1)
        more[1, 12] += 1
        with pytest.raises(UserError, match="row 1: from its token 2 on"):
            say(model, more, cache, attention_mask=masked)
        more[1, 12] -= 1
        more[1, :10] = 5
        say(model, more, cache, attention_mask=masked)


def test_embeddings_begin_a_chat_and_each_turn_needs_ids(model):
    embeddings = model.get_input_embeddings()(prompt(30))
    for recompress in ("never", "each_turn"):
        with compressed(model, "h2o", 0.5, recompress=recompress):
            out = model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(1, 30, dtype=torch.long),
                max_new_tokens=4,
                return_dict_in_generate=True,
            )
            cache = next(out[name] for name in CACHE_NAMES if name in out)
            text = torch.cat([prompt(30), out.sequences, prompt(7)], 1)
            if recompress == "never":
                say(model, text, cache)
                continue
            with pytest.raises(UserError, match="needs the token ids of the whole text"):
                say(model, text, cache)


def test_a_turn_that_is_fed_by_hand_is_refused_where_all_is_to_be_compressed(model):
    with torch.no_grad(), compressed(model, "h2o", 0.5, recompress="each_turn"):
        text, cache = say(model, prompt(30))
        with pytest.raises(UserError, match="this call holds new tokens only"):
            model(prompt(5), **{cache_name(model): cache})
        model(text[:, -1:], **{cache_name(model): cache})  # a token of the answer


def test_a_failed_prefill_of_a_turn_ends_the_chat(model, monkeypatch):
    with compressed(model, "h2o", 0.5, recompress="each_turn"):
        text, cache = say(model, prompt(30))
        more = torch.cat([text, prompt(7)], 1)
        monkeypatch.setattr(model.model.layers[1].mlp, "forward", None)
        with pytest.raises(TypeError):
            say(model, more, cache)
        monkeypatch.undo()
        with pytest.raises(UserError, match="earlier call on this cache ended in an error"):
            say(model, more, cache)


def test_another_way_to_recompress_is_named(model):
    with pytest.raises(UserError, match=r"unknown recompress 'each'\. Did you mean 'each_turn'"):
        compressed(model, "h2o", 0.5, recompress="each")
