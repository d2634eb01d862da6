"""What each sample asked, to be read beside its answers: both ends of the text fed to the model.

Records hold only a hash of the prompt. Its text is the same for every cell, so it is written once a
sample, as that is first answered. Nothing is computed from it: a line that is damaged is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.records import Scan, scan_lines
from harness.typed import Count, Line
from kvmerge.files import check_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FOLDER = "prompts"
CHARACTERS = 1_000
"""Of either end, at most."""


@dataclass(frozen=True, kw_only=True)
class Prompt(Line):
    """Both ends of one sample's prompt."""

    id: str
    prompt_hash: str
    """As its records have it."""
    prompt_tokens: Count
    head: str
    """The first `CHARACTERS` of the decoded tokens, special ones among them; all, if twice as many."""
    tail: str
    """The last `CHARACTERS`; empty where the head is all."""

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, sample: str, prompt_hash: str, ids: Sequence[int]
    ) -> Prompt:
        """Decode both ends of what was fed to prefill."""

        def text(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

        # A token is a character or more, but for bytes of one, and a decoder may join what it is given:
        # ends are decoded from more tokens than they have characters.
        most = 4 * CHARACTERS
        if len(ids) <= most and len(whole := text(ids)) <= 2 * CHARACTERS:
            head, tail = whole, ""
        else:
            head, tail = text(ids[:most])[:CHARACTERS], text(ids[-most:])[-CHARACTERS:]
        return cls(id=sample, prompt_hash=prompt_hash, prompt_tokens=len(ids), head=head, tail=tail)


Prompts = dict[tuple[str, str], Prompt]
"""By sample and hash of the prompt."""


def prompt_path(folder: Path, task: str) -> Path:
    """Return where the prompts of a task lie. Raises `UserError` where it cannot name a file."""
    check_name("task", task)
    return folder / FOLDER / f"{task}.jsonl"


def read_prompts(path: Path) -> Prompts:
    """Read the prompts of a task; what cannot be read is reported to the log and left out."""
    found, prompts = scan_lines(path, Prompt)
    if problems := [*found.faults(), *found.remarks()]:
        logger.warning("%s; the report shows those prompts as not recorded", problems[0])
    return {(prompt.id, prompt.prompt_hash): prompt for prompt in prompts.values()}


def scan_prompts(folder: Path) -> list[Scan]:
    """Look at every file of prompts of a results folder."""
    return [scan_lines(path, Prompt)[0] for path in sorted(folder.glob(f"{FOLDER}/*.jsonl"))]
