"""Records of another run: those of a sample that was fed as another prompt than the folder's own.

They come into a folder by hand, as when files of two runs are copied together. Every line is whole and
sound by itself; only beside the others does it show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.columnar import Records, sound_records
from harness.prompts import prompt_path, read_prompts
from harness.records import listed, scan


@dataclass(frozen=True)
class Foreign:
    """The lines of one sample in one file that are of another prompt than the others."""

    path: Path
    numbers: tuple[int, ...]
    """Counted from 1."""
    sample: str
    prompt_hash: str
    own: str | None
    """The hash of the folder's own prompt; None where nothing tells which of them that is."""

    def __str__(self) -> str:
        """Say it, a sentence's part."""
        lines = f"line{'s' * (len(self.numbers) > 1)} {', '.join(map(str, self.numbers))}"
        place = (
            f"{self.path}, {lines}: sample {self.sample!r} was made with the prompt {self.prompt_hash}"
        )
        if self.own is None:
            return f"{place}, others of it with another one, and nothing tells which is of this run"
        return f"{place}, and this run's is {self.own}: of another run"


def foreign_records(folder: Path) -> list[Foreign]:
    """Return the records of a results folder that are of another run.

    A run writes down each prompt before its records (`harness.prompts`). Where it did, records of that
    sample with another prompt are foreign. Where it did not, or both are written down, all records of a
    sample with more than one prompt are named, and nothing tells whose they are.
    """
    return [found for task in sorted(folder.glob("predictions/*/")) for found in _of_task(folder, task)]


def foreign_listed(folder: Path) -> str:
    """List the foreign records of a folder, and say how to be rid of them."""
    return listed(
        folder,
        [str(found) for found in foreign_records(folder)],
        "takes out those that are known to be of another run and keeps each file as it was beside; "
        "their samples run again. Of others, take one side out by hand.",
    )


def _of_task(folder: Path, task: Path) -> Iterator[Foreign]:
    made_of: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(task.glob("*.jsonl")):
        for sample, prompt_hash in sorted(_readable(path).distinct("id", "prompt_hash")):
            made_of[sample][prompt_hash].append(path)
    recorded: dict[str, list[str]] = defaultdict(list)
    for sample, prompt_hash in read_prompts(prompt_path(folder, task.name)):
        recorded[sample].append(prompt_hash)
    for sample, by_hash in made_of.items():
        own = recorded[sample][0] if len(recorded[sample]) == 1 else None
        if by_hash.keys() == {own} or (own is None and len(by_hash) == 1):
            continue
        for prompt_hash, paths in by_hash.items():
            if prompt_hash != own:
                for path in paths:
                    yield Foreign(path, _numbers(path, sample, prompt_hash), sample, prompt_hash, own)


def _readable(path: Path) -> Records:
    """Return what can be read of a file, whatever else is wrong with it."""
    found = sound_records(path)
    return Records(scan(path).records.values()) if found is None else found


def _numbers(path: Path, sample: str, prompt_hash: str) -> tuple[int, ...]:
    wanted = sample, prompt_hash
    records = scan(path).records.items()
    return tuple(number for number, one in records if (one.id, one.prompt_hash) == wanted)
