"""The exact text that each model is given for one question: what its authors' own format writes.

Weights and tokenizers of most models are not at hand in a test, so small tokenizers with the same
special tokens, the same BOS rule and the official chat template stand in for them. Where the hub's
cache holds the real tokenizer, it is tested as well.
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.encoding import encode_truncating_middle
from benchmarks.longbench.tasks import TASKS
from benchmarks.task import PromptFormat
from kvmerge.models import ModelSpec
from kvmerge.models.checkpoints import converted, save_random
from tests.shipped import shipped_models
from tests.tiny_run import compose

FOLDER = Path(__file__).parent.parent / "golden"
GOLDEN: dict[str, str] = json.loads((FOLDER / "wrapped_prompts.json").read_text(encoding="utf-8"))
QUESTION = "Who built the bridge?\n\nAnswer:"
NAMES = shipped_models()

# Not Meta's template (see golden/templates/NOTICE.txt): the parts of it that one user message meets.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = ("<s>", "</s>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def settings(name: str, *overrides: str) -> tuple[ModelSpec, PromptFormat]:
    run = compose(f"model={name}", *overrides)
    return run.model, run.prompt_format


def template(name: str) -> str:
    return (FOLDER / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def byte_tokenizer(special: tuple[str, ...], chat: str | None, bos: bool) -> PreTrainedTokenizerBase:
    """One token a byte, the given special tokens, and the first of them before every text if `bos`."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{special[0]} $A", special_tokens=[(special[0], 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0] if bos else None,
        eos_token=special[-1],
        chat_template=chat,
    )


@pytest.fixture(scope="module", params=NAMES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, PreTrainedTokenizerBase]:
    """Each model's name, with its tokenizer or the one that stands in for it."""
    name: str = request.param
    if name == "smollm2-135m":
        embedded = settings(name)[0].embedded
        assert embedded is not None
        if importlib.util.find_spec(embedded.package) is None:
            pytest.skip("the package of the default model is not installed")
        return name, AutoTokenizer.from_pretrained(converted(name, embedded))
    if name == "tiny-random":
        spec, folder = settings(name)[0], tmp_path_factory.mktemp("random")
        assert spec.random is not None
        assert spec.context is not None
        save_random(folder, spec.random, spec.context)
        return name, AutoTokenizer.from_pretrained(folder)
    if name.startswith("llama2"):
        return name, byte_tokenizer(LLAMA2, None, bos=True)
    if name.startswith("mistral"):
        return name, byte_tokenizer(LLAMA2, template("mistral-7b-instruct"), bos=True)
    if name.startswith("llama3"):
        return name, byte_tokenizer(LLAMA3, LLAMA3_TEMPLATE, bos=True)
    return name, byte_tokenizer(CHATML, template(name), bos=False)


def wrapped(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, *, wrap: bool = True) -> list[int]:
    return encode_truncating_middle(tokenizer, QUESTION, fmt, wrap=wrap)


def test_every_model_has_its_prompt() -> None:
    assert sorted(GOLDEN) == sorted(NAMES)


def test_a_prompt_is_wrapped_as_recorded(model: tuple[str, PreTrainedTokenizerBase]) -> None:
    name, tokenizer = model
    ids = wrapped(tokenizer, settings(name)[1])
    assert tokenizer.decode(ids) == GOLDEN[name]


def test_special_tokens_are_single_tokens_and_none_is_there_twice(
    model: tuple[str, PreTrainedTokenizerBase],
) -> None:
    name, tokenizer = model
    ids = wrapped(tokenizer, settings(name)[1])
    for text in re.findall(r"<s>|<\|\w+\|>", GOLDEN[name]):
        token = tokenizer.convert_tokens_to_ids(text)
        assert ids.count(token) == GOLDEN[name].count(text), text


def test_a_plain_prompt_gets_the_bos_and_nothing_else(
    model: tuple[str, PreTrainedTokenizerBase],
) -> None:
    name, tokenizer = model
    bos = GOLDEN[name].startswith(("<s>", "<|begin_of_text|>"))
    expected = f"{tokenizer.bos_token}{QUESTION}" if bos else QUESTION
    assert tokenizer.decode(wrapped(tokenizer, settings(name)[1], wrap=False)) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("mistral")])
def test_mistrals_own_template_adds_spaces_and_no_second_bos(name: str) -> None:
    tokenizer = byte_tokenizer(LLAMA2, template("mistral-7b-instruct"), bos=True)
    ids = wrapped(tokenizer, settings(name, "model.chat=template")[1])
    assert tokenizer.decode(ids) == f"<s>[INST] {QUESTION} [/INST]"


def test_qwen3_would_think_unless_told_not_to() -> None:
    tokenizer = byte_tokenizer(CHATML, template("qwen3-8b"), bos=False)
    ids = wrapped(tokenizer, settings("qwen3-8b", "model.template_options={enable_thinking: true}")[1])
    assert tokenizer.decode(ids) == GOLDEN["qwen3-8b"].partition("<think>")[0]


# --- what the files say


ON_THE_HUB = [name for name in NAMES if name not in ("smollm2-135m", "tiny-random")]


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_model_on_the_hub_is_pinned_to_a_commit(name: str) -> None:
    assert re.fullmatch("[0-9a-f]{40}", settings(name)[0].revision or "")


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_prompt_and_answer_fit(name: str) -> None:
    spec, fmt = settings(name)
    wrap = len(GOLDEN[name]) - len(QUESTION)  # characters: more than tokens
    longest = spec.max_length + wrap + max(task.max_new_tokens for task in TASKS)
    assert spec.context is not None
    assert longest <= spec.context == fmt.context
    if name == "mistral-7b-instruct-v0.1":
        assert longest <= 4096, "its sliding window"


# --- the real tokenizers, where the hub's cache has them


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_the_official_tokenizer_wraps_as_recorded(name: str) -> None:
    spec, fmt = settings(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec.path, revision=spec.revision, local_files_only=True
        )
    except OSError:
        pytest.skip("the hub's cache does not hold the tokenizer")
    ids = wrapped(tokenizer, fmt)
    expected = GOLDEN[name]
    # Llama-2's decoder writes the space that its tokenizer puts before a text.
    assert tokenizer.decode(ids).replace("<s> ", "<s>") == expected
    if expected.startswith(("<s>", "<|begin_of_text|>")):
        assert ids.count(tokenizer.bos_token_id) == 1
