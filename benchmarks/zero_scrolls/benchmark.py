"""The benchmark ZeroSCROLLS: its rows, and how they become prompts and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.metric import UNSCORED
from benchmarks.questions import stated
from benchmarks.rows import TEXT, Kind, parse_rows, sha256
from benchmarks.source import Archive, HubFile, Source, folder_or_hub
from benchmarks.task import Encoded, PromptFormat, Sample, Task, choose_tasks
from benchmarks.zero_scrolls import prompt
from benchmarks.zero_scrolls.tasks import PAPER_TASKS, SUMMARIES, TASKS
from benchmarks.zero_scrolls.truncation import (
    Parts,
    encode_cutting_document,
    input_limit,
    split,
    split_for_chat,
)
from kvmerge.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("validation", "test")
CHATS = ("wrap", "none", "format_request")
ANSWER_LENGTHS = ("api", "hf")
HF_NEW_TOKENS = 1024
"""Longest answer of every task in the official run on local models."""

INDICES = ("document_start_index", "document_end_index", "query_start_index", "query_end_index")
"""Character offsets into `input`, ends exclusive, in the order in which they must stand."""

INDEX = Kind("a whole number", lambda value: type(value) is int)
TEXT_OR_NULL = Kind("a string or null", lambda value: value is None or TEXT.fits(value))
FIELDS = {
    "id": TEXT,
    "input": TEXT,
    "output": TEXT,
    **dict.fromkeys(INDICES, INDEX),
    "truncation_seperator": TEXT,
}
"""Official fields in use, misspelt as there; `pid` and `inner_docs_start_indices` are ignored."""

REVISION = "6b18a58745ba43638ef1076a30fb2c38da6d459e"
_SHA256 = {
    "summ_screen_fd": "ae3d08b5ccce1c6754ebdeea631cedf12aa00adbd54cd5a2b27aef3215d3c257",
    "qmsum": "9af2723c789040c22dc4574d0cb4171686e35b7dad1ebd54d1ca18a978502c42",
    "squality": "9ed8989f6a2d4114feded42b0617e70341de9eb61448f5e233883aed652bfb07",
    "narrative_qa": "e5f0cec79a656c98eff4c349ca36ac535ef4c711baa0194809e77458d0d4b505",
    "quality": "0a1697fe2e348025e79af2c5e83260388e375cb2e66638b7d1e92f03e0d7307d",
    "musique": "b075c9457dc2c52530b4272b6e406c07643229132f03e3a2ba5d3d4f49cfb740",
    "space_digest": "3179ecca9252230c6af9ffe310aa1c9f645ffcedc4d7cc1a429aa1eca6b219df",
    "book_sum_sort": "3212bfa79ad1e065a465ee5e0bafce3130fb5c26b250be079b96c73802df6966",
}
"""Of the archives at `REVISION` whose SHA-256 the hub's pages show."""

FILES = tuple(
    HubFile(
        repo="tau/zero_scrolls",
        filename=f"{task.name}.zip",
        revision=REVISION,
        sha256=_SHA256.get(task.name),
        licence="the texts keep the terms of their datasets",
    )
    for task in TASKS
)
"""What the benchmark reads from the hub: an archive a task, with a file a split."""


_ABOUT = {
    "validation": "Scores are of the validation split, about 20 samples a task and meant for a look at "
    "the data: uncertain by several points, and not comparable with the leaderboard's test scores.",
    "test": "Answers of the test split are withheld, so nothing is scored. Once all ten tasks are "
    "complete, submissions/ holds a file a cell for the leaderboard.",
}
"""What a reader must know of each split."""


@dataclass(frozen=True)
class Archives:
    """One split of the tasks' archives."""

    files: Mapping[str, HubFile]
    """By task name."""
    split: str

    def read(self, name: str) -> tuple[bytes, str]:
        """Return a task's rows as JSON lines. Raises UserError as `benchmarks.source.Archive` does."""
        return Archive(self.files[name], suffix=".jsonl").read(self.split)


class ZeroScrolls:
    """The benchmark: rows from a folder of `<task>.jsonl`, or from the official archives.

    Args:
        data_dir: folder to read, with the rows of the split; None takes the hub's
            `tau/zero_scrolls` instead.
        tasks: names of the tasks to run; None means all ten.
        split: `validation` (about 20 samples a task, scored) or `test` (answers withheld, for a
            submission). The benchmark's name tells them apart.
        max_new_tokens: longest answers: `api` (those of the official run on chat APIs, 10 to 1,024
            by task), `hf` (1,024 for every task, as in the official run on local models) or a number.
        chat: `wrap` puts the prompt into the model's chat format; `none` does not, as in the official
            run on local models; `format_request` first changes it as the official run on chat APIs
            does: "Do not provide any explanation." joins the instruction except for summaries, and
            the answer cue at the end goes. Documents are cut by one rule in all three.
        max_length: most tokens of a prompt before the chat wrap; None takes the model's maximum, or
            what its context leaves beside the answer and 16 positions if that is less. (Its
            configuration decides for every model, so a long-context model whose file states a
            smaller maximum gets that, not its whole context.)
        revision: commit, branch or tag of the hub repository; None takes `REVISION`, the only one
            whose SHA-256 are known here. The results note another.

    Raises UserError for a choice that does not exist, and for a missing folder or file.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        tasks: Sequence[str] | None = None,
        split: str = "validation",
        max_new_tokens: str | int = "api",
        chat: str = "wrap",
        max_length: int | None = None,
        revision: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise unknown("split of ZeroSCROLLS", split, SPLITS)
        if chat not in CHATS:
            raise unknown("benchmark.chat", chat, CHATS)
        if max_length is not None:
            _check_count("benchmark.max_length", max_length)
        self.name = "zero_scrolls" if split == "validation" else f"zero_scrolls_{split}"
        self.split = split
        self.chat = chat
        self.max_length = max_length
        self.revision = revision
        self.tasks: Sequence[Task] = tuple(
            replace(
                task,
                metric=task.metric if split == "validation" else UNSCORED,
                max_new_tokens=_answer_length(task, max_new_tokens),
                chat=chat != "none",
            )
            for task in choose_tasks(TASKS, tasks, "ZeroSCROLLS")
        )
        self.source = folder_or_hub(
            data_dir,
            revision,
            self._hub,
            [task.name for task in self.tasks],
            known=[task.name for task in TASKS],
        )

    def samples(self, task: Task) -> list[Sample]:
        """Return the samples of `task`, in file order: rows with one id are one sample.

        Their outputs are its references. Raises UserError naming the file, and the line of a row
        that breaks the official schema or has another input than an earlier row with its id.
        """
        data, source = self.source.read(task.name)
        fields = FIELDS if self.split == "validation" else FIELDS | {"output": TEXT_OR_NULL}
        first: dict[str, tuple[str, dict[str, Any]]] = {}
        references: dict[str, list[str]] = {}
        for place, row in parse_rows(data, source, fields, id_field=None):
            _check_indices(row, place)
            if self.split == "validation":
                task.metric.check_answers([row["output"]], None, place)
            before, kept = first.setdefault(row["id"], (place, row))
            if kept["input"] != row["input"]:
                raise UserError(
                    f"{place}: id {row['id']!r} is already that of {before}, with another input. Rows "
                    f"may share an id only as further references of one input."
                )
            references.setdefault(row["id"], []).append(row["output"])
        return [
            Sample(
                id=name,
                task=task.name,
                prompt=prompt(row),
                question=self._question(row, task),
                answers=tuple(references[name]) if self.split == "validation" else (),
                row=row,
            )
            for name, (_, row) in first.items()
        ]

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Return the token ids fed to prefill (`benchmarks.zero_scrolls.truncation`).

        Raises UserError naming the sample where its query alone exceeds the limit.
        """
        limit = self.max_length or input_limit(fmt, task.max_new_tokens)
        try:
            parts = self._parts(sample.row, task)
            return Encoded(encode_cutting_document(tokenizer, parts, limit, fmt, wrap=task.chat))
        except UserError as error:
            raise UserError(f"task {task.name}, sample {sample.id!r}: {error}") from error

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Return the official score of one prediction, 0 to 1; NaN where answers are withheld.

        For summaries also `rouge1`, `rouge2` and `rougel`, which their task's score is made of.
        """
        return task.mark(prediction, sample.answers)

    def notes(self) -> list[str]:
        """Return how far the scores can be compared with published ones."""
        names = [task.name for task in self.tasks]
        notes = [_ABOUT[self.split]]
        if len(names) < len(TASKS):
            notes.append(
                f"The ZeroSCROLLS score is the mean of all ten tasks; this run has {len(names)}: "
                f"{', '.join(names)}."
            )
        if set(names) == PAPER_TASKS:
            notes.append(
                "The paper averages seven tasks without naming them. These seven are our reading: "
                "those with public validation answers."
            )
        return [*notes, *FILES[0].notes(self.revision)]

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each chosen task's file; it is the same in a folder and a zip."""
        return {task.name: sha256(self.source.read(task.name)[0]) for task in self.tasks}

    def _parts(self, row: Mapping[str, Any], task: Task) -> Parts:
        """Return a row's prompt where it can be cut. Raises UserError as `split_for_chat` does."""
        if self.chat == "format_request":
            return split_for_chat(row, request=task.name not in SUMMARIES)
        return split(row)

    def _question(self, row: Mapping[str, Any], task: Task) -> str | None:
        try:
            return stated(self._parts(row, task).query)
        except UserError:
            return None  # `encode` says what is wrong, and of which sample

    def _hub(self) -> Source:
        files = {
            name: file.at(self.revision)
            for name, file in zip([task.name for task in TASKS], FILES, strict=True)
        }
        return Archives(files, self.split)


def _answer_length(task: Task, wanted: str | int) -> int:
    if wanted == "api":
        return task.max_new_tokens
    if wanted == "hf":
        return HF_NEW_TOKENS
    if isinstance(wanted, str):
        raise unknown("benchmark.max_new_tokens", wanted, (*ANSWER_LENGTHS, "a number"))
    _check_count("benchmark.max_new_tokens", wanted)
    return wanted


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number of 1 or more.")


def _check_indices(row: Mapping[str, Any], place: str) -> None:
    """Refuse a row whose offsets would cut the prompt at a wrong place."""
    document, *others = (row[name] for name in INDICES)
    bounds = [document, *others, len(row["input"])]
    if document < 1 or bounds != sorted(bounds):
        found = ", ".join(f"{name} {row[name]}" for name in INDICES)
        raise UserError(
            f"{place}: {found}, and input has {len(row['input'])} characters. "
            f"Needed: 0 < {' <= '.join(INDICES)} <= the length of input."
        )
