"""A checkpoint's tokenizer, encoding as its own `tokenizer.json` does.

transformers 5 rebuilds the tokenizers of some classes from the vocabulary alone, with the class's own
normalizer and splits. `LlamaTokenizer` then drops the space that SentencePiece puts before a text that
begins with one, and `Qwen2Tokenizer` splits any vocabulary's digits and accents as Qwen's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvmerge.models.folder import TOKENIZER

logger = logging.getLogger(__name__)

PROBES = (
    "bridge",
    " ",
    "  a",
    "\n\n a  b ",
    "a\r\n\tb",
    "e\u0301 \u212b \ufb01",  # what a normalizer would compose
    "I'm 12345 1 22 333",
    "中文 🙂 \x00\ufffd",
    "▁a ▁ b",
)
"""Texts on which rebuilt tokenizers are seen to differ: spaces, line ends, accents, digits, bytes."""


def load_tokenizer(
    location: Path | str, find_folder: Callable[[], Path | None], **options: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one that does not encode as its `tokenizer.json` is replaced by that file.

    Args:
        location: a local checkpoint, or a hub id.
        find_folder: gives the folder of the files once they are loaded (a download may put them there).
        options: of `from_pretrained`.

    Raises:
        Exception: whatever the libraries raise on broken files.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **options)
    folder = find_folder()
    if folder is None or not (folder / TOKENIZER).exists():
        return tokenizer
    if encodes_as(tokenizer, Tokenizer.from_file(str(folder / TOKENIZER))):
        return tokenizer
    logger.info(
        "%s: %s of transformers would encode otherwise than tokenizer.json does; the file is followed.",
        location,
        type(tokenizer).__name__,
    )
    return PreTrainedTokenizerFast.from_pretrained(
        location, padding_side=tokenizer.padding_side, **options
    )


def encodes_as(tokenizer: PreTrainedTokenizerBase, raw: Tokenizer) -> bool:
    """Return whether a tokenizer gives the ids of a raw one on `PROBES`, special tokens left out.

    Those come of the file's own post-processor in either case; they were never seen to differ.
    """
    return all(
        tokenizer.encode(text, add_special_tokens=False)
        == raw.encode(text, add_special_tokens=False).ids
        for text in PROBES
    )
