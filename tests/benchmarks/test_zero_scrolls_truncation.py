"""The document is cut and nothing else, with a tokenizer of one token a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.task import PromptFormat
from benchmarks.zero_scrolls.truncation import (
    Parts,
    encode_cutting_document,
    input_limit,
    split,
    split_for_chat,
)
from kvmerge.errors import UserError

DOCUMENT = [f"d{i}" for i in range(20)]
WORDS = [
    "<s>",
    "<unk>",
    "read",
    "[cut]",
    "Q:",
    "why?",
    "A:",
    "[INST]",
    "[/INST]",
    "hey",
    "bye",
    *DOCUMENT,
]
PARTS = Parts("read " + " ".join(DOCUMENT) + " ", " [cut] ", "Q: why? A:")
SUFFIX = ["[cut]", "Q:", "why?", "A:"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


def encoded(tokenizer, limit, *, chat="none", wrap=True, parts=PARTS):
    fmt = PromptFormat(max_length=1, chat=chat)
    return tokenizer.convert_ids_to_tokens(
        encode_cutting_document(tokenizer, parts, limit, fmt, wrap=wrap)
    )


def test_a_prompt_that_fits_is_left_alone(tokenizer):
    whole = ["<s>", "read", *DOCUMENT, "Q:", "why?", "A:"]
    assert encoded(tokenizer, len(whole)) == whole


def test_the_end_of_the_document_goes_and_the_limit_counts_the_special_token(tokenizer):
    assert encoded(tokenizer, 24) == ["<s>", "read", *DOCUMENT[:18], *SUFFIX]
    assert encoded(tokenizer, 9) == ["<s>", "read", *DOCUMENT[:3], *SUFFIX]


def test_the_beginning_of_text_stands_at_the_front_alone(tokenizer):
    assert encoded(tokenizer, 12).count("<s>") == 1
    assert encoded(tokenizer, 5) == ["<s>", *SUFFIX]


@pytest.mark.parametrize("limit", [4, 1, 0, -7])
@pytest.mark.parametrize("chat", ["none", "[INST] {prompt} [/INST]"])
def test_a_suffix_that_does_not_fit_is_refused_with_its_numbers(tokenizer, limit, chat):
    message = f"may have {limit} tokens, .* already has 5 .*benchmark.max_length"
    with pytest.raises(UserError, match=message):
        encoded(tokenizer, limit, chat=chat)


def test_the_wrap_comes_after_the_cut_and_on_top_of_the_limit(tokenizer):
    chat = "[INST] {prompt} [/INST]"
    cut = encoded(tokenizer, 9, chat=chat)
    assert cut == ["<s>", "[INST]", "read", *DOCUMENT[:3], *SUFFIX, "[/INST]"]
    whole = encoded(tokenizer, 99, chat=chat)
    assert whole == ["<s>", "[INST]", "read", *DOCUMENT, "Q:", "why?", "A:", "[/INST]"]
    assert encoded(tokenizer, 9, chat=chat, wrap=False) == encoded(tokenizer, 9)


def test_the_tokenizers_own_template_gets_no_second_beginning_of_text(tokenizer):
    tokenizer.chat_template = "<s> hey {{ messages[0]['content'] }} bye"
    assert encoded(tokenizer, 9, chat="template") == [
        *("<s>", "hey", "read"),
        *(*DOCUMENT[:3], *SUFFIX, "bye"),
    ]


def test_without_a_wrap_ids_are_fed_as_they_are(tokenizer):
    # Joined as text, the last word of the head and the separator would be one unknown word.
    parts = Parts("read d0 d1 d2 ", "[cut] ", "Q: why? A:")
    assert encoded(tokenizer, 7, parts=parts) == ["<s>", "read", "d0", *SUFFIX]
    joined = encoded(tokenizer, 7, parts=parts, chat="{prompt}")
    assert joined == ["<s>", "read", "<unk>", "Q:", "why?", "A:"]


def official(head, suffix, whole, limit):
    """The official rule on lists of tokens, where no special tokens are added."""
    return whole if len(whole) <= limit else head[: limit - len(suffix)] + suffix


@given(st.integers(0, 20), st.integers(5, 30))
def test_same_as_the_official_rule_without_special_tokens(length, limit):
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    head = ["read", *DOCUMENT[:length]]
    parts = Parts(" ".join(head) + " ", "[cut] ", "Q: why? A:")
    expected = official(head, SUFFIX, [*head, *SUFFIX[1:]], limit)
    found = encoded(tokenizer, limit, parts=parts)
    assert found == expected
    assert len(found) <= limit


# Limit


@pytest.mark.parametrize(
    ("max_length", "context", "answer", "expected"),
    [
        (3500, 4096, 1024, 3056),
        (3500, 4096, 10, 3500),
        (3500, 4096, 580, 3500),
        (3500, 4096, 581, 3499),
        (3500, None, 1024, 3500),
        (31500, 32768, 1024, 31500),
    ],
)
def test_prompt_and_answer_share_the_models_context(max_length, context, answer, expected):
    assert input_limit(PromptFormat(max_length, context=context), answer) == expected


# Where a row is cut


def row(
    instruction="Read it. ", document="Text.\r\n\u2028\U0001f600\ufffd", query="Q:\nWhy?", cue="A:\n"
):
    head = f"{instruction}\n\nStory:\n"
    text = f"{head}{document}\n\n{query}\n\n{cue}"
    return {
        "input": text,
        "document_start_index": len(head),
        "document_end_index": len(head) + len(document),
        "query_start_index": len(head) + len(document) + 2,
        "query_end_index": len(head) + len(document) + 2 + len(query),
        "truncation_seperator": "... [cut]\n\n",
    }


def test_a_row_is_split_where_its_query_starts_in_characters():
    parts = split(row())
    assert parts.query == "Q:\nWhy?\n\nA:\n"
    assert parts.head.endswith("\U0001f600\ufffd\n\n")
    assert parts.whole == row()["input"]
    assert parts.suffix == "... [cut]\n\nQ:\nWhy?\n\nA:\n"


def test_for_chat_apis_the_answer_cue_goes():
    parts = split_for_chat(row(), request=False)
    assert parts.whole == row()["input"].removesuffix("\n\nA:\n")
    assert parts.query == "Q:\nWhy?"


def test_for_chat_apis_the_format_request_joins_the_instruction():
    parts = split_for_chat(row("Read it."), request=True)
    assert parts.head.startswith("Read it. Do not provide any explanation.\n\nStory:\nText.")
    assert parts.query == "Q:\nWhy?"
    assert (
        parts.head + parts.query + "\n\nA:\n"
        == row("Read it. Do not provide any explanation.")["input"]
    )


def test_blanks_around_the_instruction_go_but_do_not_move_the_indices():
    """As in the official run: the cut slips by as many characters."""
    parts = split_for_chat(row("Read it. "), request=True)
    assert parts.head.startswith("Read it. Do not provide any explanation.\n\nStory:\n")
    assert parts.query == ":\nWhy?\n"


def test_an_instruction_without_an_end_is_refused():
    broken = row() | {"input": row()["input"].replace("\n\n", "\n ")}
    with pytest.raises(UserError, match="no blank line ends the instruction"):
        split_for_chat(broken, request=True)
    assert split_for_chat(broken, request=False).query == "Q:\nWhy?"
