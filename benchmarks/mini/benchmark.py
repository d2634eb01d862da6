"""The mini benchmark at its two lengths: its rows, and how they become prompts and scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.encoding import encode_truncating_middle
from benchmarks.mini import prompt, template
from benchmarks.mini.build import ROOM, SHARED, build, expected_sha256
from benchmarks.mini.tasks import SHARING_TASKS, TASKS
from benchmarks.questions import after_context
from benchmarks.rows import TEXT, TEXTS, TEXTS_OR_NULL, parse_rows, read_bytes, sha256
from benchmarks.task import Encoded, PromptFormat, Sample, Task, choose_tasks
from kvmerge.errors import UserError, unknown
from kvmerge.files import is_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = {
    "input": TEXT,
    "context": TEXT,
    "answers": TEXTS,
    "all_classes": TEXTS_OR_NULL,
    "_id": TEXT,
}


class Mini:
    """The benchmark at one of its two lengths, or with several questions about each context.

    Args:
        tasks: names of the tasks to run; None means all.
        length: `short` (prompts of about 1,000 tokens), `long` (about 3,000), or `shared`: four of the
            tasks, with short contexts of which each has several questions.
        data_dir: folder of `<task>.jsonl` to read; None builds them.

    Raises UserError for a task or length that does not exist, and for a missing folder.
    """

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        length: str = "short",
        data_dir: str | None = None,
    ) -> None:
        if length not in (*ROOM, SHARED):
            raise unknown("length of the mini benchmark", length, (*ROOM, SHARED))
        self.length = length
        self.name = "mini" if length == "short" else f"mini_{length}"
        self.tasks = choose_tasks(SHARING_TASKS if length == SHARED else TASKS, tasks, self.name)
        self.data_dir = None if data_dir is None else Path(data_dir).expanduser()
        if self.data_dir is not None and not is_folder(self.data_dir):
            raise UserError(
                f"benchmark.data_dir {self.data_dir} is not a folder. It must hold one "
                f"<task>.jsonl a task; null builds them."
            )
        self._files: dict[str, tuple[bytes, Path]] = {}

    def samples(self, task: Task) -> list[Sample]:
        """Return all rows of `task`, in file order.

        Warns if the file is not the one that the locked packages give. Raises UserError naming the
        file and line of a row that cannot be used.
        """
        data, path = self._read(task)
        return [
            Sample(
                id=row["_id"],
                task=task.name,
                prompt=prompt(task, row),
                question=after_context(template(task.name), row),
                answers=tuple(row["answers"]),
                all_classes=None if row["all_classes"] is None else tuple(row["all_classes"]),
                row=row,
            )
            for _, row in parse_rows(data, str(path), FIELDS, id_field="_id")
        ]

    def encode(
        self, sample: Sample, task: Task, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat
    ) -> Encoded:
        """Return the token ids fed to prefill (`benchmarks.encoding`)."""
        return Encoded(encode_truncating_middle(tokenizer, sample.prompt, fmt, wrap=task.chat))

    def score(self, sample: Sample, task: Task, prediction: str) -> Mapping[str, float]:
        """Return the score of one prediction by LongBench's metric, 0 to 1."""
        return task.mark(prediction, sample.answers, sample.all_classes)

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each chosen task's file."""
        return {task.name: sha256(self._read(task)[0]) for task in self.tasks}

    def notes(self) -> list[str]:
        """Return which tasks' data differ from what the locked packages give: do not compare those."""
        expected = expected_sha256(self.length)
        other = [name for name, digest in self.fingerprint().items() if digest != expected[name]]
        if not other:
            return []
        return [
            f"The data of {self.name} ({', '.join(other)}) are not those that the locked packages "
            f"give: their SHA-256 differs. Do not compare these scores with others. To compare, "
            f"install the locked requirements (make setup)."
        ]

    def _read(self, task: Task) -> tuple[bytes, Path]:
        if task.name not in self._files:
            self._files[task.name] = data, path = self._load(task)
            if sha256(data) != expected_sha256(self.length)[task.name]:
                warnings.warn(
                    f"{path} is not what the locked packages give (its SHA-256 differs); do not "
                    f"compare its scores with others.",
                    stacklevel=3,
                )
        return self._files[task.name]

    def _load(self, task: Task) -> tuple[bytes, Path]:
        if self.data_dir is not None:
            path = self.data_dir / f"{task.name}.jsonl"
            return read_bytes(path), path
        return build(task, self.length), Path(f"{self.name}/{task.name}.jsonl")
