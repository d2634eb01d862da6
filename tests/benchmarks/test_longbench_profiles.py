"""The profiles of LongBench: what prompts become, with a tokenizer of one token a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.longbench.benchmark import LongBench
from benchmarks.longbench.profiles import KCF_LLAMA2_LENGTH, find_profile
from benchmarks.longbench.tasks import find_task
from benchmarks.task import PromptFormat
from kvmerge.errors import UserError

LLAMA2 = PromptFormat(max_length=3500, chat="[INST]{prompt}[/INST]", context=4096)
MISTRAL = PromptFormat(max_length=31500, chat="[INST]{prompt}[/INST]", context=32768)
TASKS = ["qasper", "trec", "samsum", "lcc"]
LONG = 5000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    vocabulary = ["<s>", "<unk>", "[INST]", "[/INST]", *(f"w{i}" for i in range(LONG))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


def words(count: int) -> str:
    return " ".join(f"w{i}" for i in range(count))


def encoded(
    tokenizer: PreTrainedTokenizerBase, profile: str, prompt: str, task: str, fmt: PromptFormat
) -> list[str]:
    ids = find_profile(profile).encode(tokenizer, prompt, find_task(task), fmt)
    texts = tokenizer.convert_ids_to_tokens(ids)
    assert isinstance(texts, list)
    return texts


@pytest.mark.parametrize("task", TASKS)
def test_kcf_wraps_llama2_with_spaces_on_every_task(
    tokenizer: PreTrainedTokenizerBase, task: str
) -> None:
    assert encoded(tokenizer, "kcf", "w1 w2", task, LLAMA2) == [
        "<s>",
        "[INST]",
        "w1",
        "w2",
        "[/INST]",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_kcf_cuts_the_wrapped_prompt(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    half = 1975
    # BOS and opening are of the first half, the closing is of the second; the cut glues two words.
    assert encoded(tokenizer, "kcf", words(LONG), task, LLAMA2) == [
        *("<s>", "[INST]", *(f"w{i}" for i in range(half - 3)), "<unk>"),
        *(*(f"w{i}" for i in range(LONG - half + 2, LONG)), "[/INST]"),
    ]


def test_kcf_counts_bos_and_wrap(tokenizer: PreTrainedTokenizerBase) -> None:
    fits = KCF_LLAMA2_LENGTH - 3
    assert "<unk>" not in encoded(tokenizer, "kcf", words(fits), "qasper", LLAMA2)
    assert "<unk>" in encoded(tokenizer, "kcf", words(fits + 1), "qasper", LLAMA2)


@pytest.mark.parametrize("task", TASKS)
def test_kcf_does_not_wrap_mistral(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    assert encoded(tokenizer, "kcf", "w1 w2", task, MISTRAL) == ["<s>", "w1", "w2"]
    short = PromptFormat(max_length=10, chat=MISTRAL.chat, context=MISTRAL.context)
    cut = ["<s>", "w0", "w1", "w2", "<unk>", "w96", "w97", "w98", "w99"]
    assert encoded(tokenizer, "kcf", words(100), task, short) == cut


@pytest.mark.parametrize("chat", ["none", "<user> {prompt}"])
@pytest.mark.parametrize("task", TASKS)
def test_kcf_leaves_other_models_to_longbenchs_way(
    tokenizer: PreTrainedTokenizerBase, task: str, chat: str
) -> None:
    fmt = PromptFormat(max_length=100, chat=chat, context=4096)
    prompt = words(200)
    assert encoded(tokenizer, "kcf", prompt, task, fmt) == encoded(
        tokenizer, "official", prompt, task, fmt
    )


def test_the_official_profile_wraps_after_the_cut_where_the_task_says_so(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    spaced = PromptFormat(max_length=3500, chat="[INST] {prompt} [/INST]", context=4096)
    kept = encoded(tokenizer, "official", words(LONG), "qasper", spaced)
    assert kept[:3] == ["<s>", "[INST]", "w0"]
    assert (kept[-1], len(kept)) == ("[/INST]", 3500 + 1)  # two words glued into one, two of wrap
    assert encoded(tokenizer, "official", "w1", "trec", spaced) == ["<s>", "w1"]


def test_kcf_needs_the_context(tokenizer: PreTrainedTokenizerBase) -> None:
    fmt = PromptFormat(max_length=3500, chat="[INST]{prompt}[/INST]")
    with pytest.raises(UserError, match=r"profile=kcf tells.*model\.context=4096"):
        encoded(tokenizer, "kcf", "w1", "qasper", fmt)


# In the benchmark


def folder(path: Path, *tasks: str) -> str:
    for task in tasks:
        row: dict[str, Any] = {
            "input": "w2",
            "context": "w1",
            "answers": ["w3"],
            "all_classes": ["w3"],
            "dataset": task,
            "_id": "0",
        }
        (path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    return str(path)


def test_the_benchmark_encodes_by_its_profile(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    kept = {}
    for profile in ("official", "kcf"):
        benchmark = LongBench(folder(tmp_path, "trec"), ["trec"], profile=profile)
        (task,) = benchmark.tasks
        (sample,) = benchmark.samples(task)
        ids = benchmark.encode(sample, task, tokenizer, LLAMA2).prompt
        kept[profile] = tokenizer.convert_ids_to_tokens(ids)
    assert kept["kcf"] == ["<s>", "[INST]", *kept["official"][1:], "[/INST]"]


def test_kcf_answers_have_a_token_on_every_task() -> None:
    assert {task.min_new_tokens for task in LongBench(profile="kcf").tasks} == {1}
    with_one = [task.name for task in LongBench().tasks if task.min_new_tokens]
    assert with_one == ["samsum"]


def test_another_profile_is_noted() -> None:
    notes = LongBench(tasks=["trec"], profile="kcf").notes()
    assert "KVCache-Factory" in notes[0]
    assert LongBench(tasks=["trec"]).notes() == []


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown LongBench profile 'kfc'. Did you mean 'kcf'"):
        LongBench(profile="kfc")
