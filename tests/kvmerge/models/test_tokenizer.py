"""Tokenizers encode as their own tokenizer.json, whatever class tokenizer_config.json names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from kvmerge.models.tokenizer import PROBES, encodes_as, load_tokenizer
from tests.real_tokenizers import TOKENIZERS, shared

FOLDERS = sorted(set(TOKENIZERS.values()))
CLASSES: tuple[dict[str, object], ...] = (
    {},
    {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False},
    {"tokenizer_class": "Qwen2Tokenizer"},
    {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
)
CASES = [
    *(("llama2-7b", changes) for changes in CLASSES),
    *((folder, {}) for folder in FOLDERS if folder != "llama2-7b"),
    ("llama3.1-8b", {"tokenizer_class": "Qwen2Tokenizer"}),
]
"""All classes on the smallest file; the others as they are; one whose digits Qwen splits."""
TEXTS = (
    *PROBES,
    *("", "\n", "a \n b", "\ta\t\tb", "def f(x):\n    return x\n\n\n", "a . b , c ! d ?", "x" * 200),
    *(
        "👩\u200d👩\u200d👧 x",
        "日本語 テキスト",
        "한국어",
        "a\u0301",
        "\u0301x",
        "é",
        "\u00a0a\u3000b",
        "𝔘𝔫𝔦",
    ),
    *("3.14159", "http://a.b/c?d=e&f=%20", "DON'T WE'RE", "\ue000\U000f0000", "<0x0A>", "▁▁"),
    *("<s>", "</s>", "<s> a", "a<s>b", "<unk>", "[INST] x [/INST]", "[INST]x[/INST]"),
    *(
        "<|im_start|>user\nx<|im_end|>",
        "<|endoftext|> a",
        "<|begin_of_text|>a<|eot_id|> b",
        "<think>\n",
    ),
)


def rewritten(folder: str, to: Path, changes: dict[str, object]) -> Path:
    """A copy of a tokenizer whose configuration says something else."""
    source = shared("tokenizers", folder)
    shutil.copyfile(source / "tokenizer.json", to / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8")) | changes
    (to / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


@pytest.mark.parametrize(("folder", "changes"), CASES)
def test_a_tokenizer_encodes_and_decodes_as_its_file(
    folder: str, changes: dict[str, object], tmp_path: Path
) -> None:
    rewritten(folder, tmp_path, changes)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, lambda: tmp_path)
    for text in TEXTS:
        ids = raw.encode(text).ids
        assert tokenizer(text)["input_ids"] == ids, text
        plain = raw.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain, text
        decoded = raw.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == decoded, text


def test_the_class_of_llama_2_drops_a_leading_space_and_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewritten("llama2-7b", tmp_path, {})
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rebuilt = AutoTokenizer.from_pretrained(tmp_path)
    assert not encodes_as(rebuilt, raw)
    with caplog.at_level("INFO"):
        taken = load_tokenizer(tmp_path, lambda: tmp_path)
    assert "LlamaTokenizer of transformers would encode otherwise" in caplog.text
    assert taken.padding_side == rebuilt.padding_side
    assert encodes_as(taken, raw)
    assert (taken.bos_token, taken.eos_token, taken.bos_token_id) == ("<s>", "</s>", 1)
    said = taken.decode(taken.encode("  a", add_special_tokens=False))
    assert said == "  a"
