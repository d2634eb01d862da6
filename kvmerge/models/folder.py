"""A checkpoint folder: which of its files are read, and which of them cannot be, by their look alone.

transformers reports a broken file by whatever its parser stumbles over, and passes some over in
silence: a generation config that cannot be parsed is taken for an absent one, and a Git LFS pointer
is as good a chat template as any. So every file is looked at first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kvmerge.errors import UserError

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Names the weight files of a checkpoint that has several."""
TOKENIZER = "tokenizer.json"
VOCABULARIES = (TOKENIZER, "tokenizer.model", "vocab.json", "tekken.json")
"""What a tokenizer is made from: one of them is needed."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    TOKENIZER_CONFIG,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)

_POINTER = b"version https://git-lfs"
_PAGE = (b"<!doctype", b"<html")
AGAIN = "Copy or download again what is named."
_MAY_BE_EMPTY = ("special_tokens_map.json", "added_tokens.json")


def check_folder(folder: Path, again: str = AGAIN, whole: bool = True) -> None:
    """Refuse a folder of which a file that is read is missing or broken.

    Args:
        folder: a local checkpoint, or a snapshot in the hub's cache.
        again: what to do about it, a sentence.
        whole: whether a missing file is a fault; a download may be under way.

    Raises:
        UserError: naming each such file and what is wrong with it.
    """
    try:
        faults = [
            f"{name} {what}"
            for name, what in _faults(folder)
            if whole or (folder / name).exists() or (folder / name).is_symlink()
        ]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{folder} is no whole checkpoint: {'; '.join(faults[:5])}{more}. {again}")


def small_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, its weights apart, that are there and decide what it does."""
    names = {CONFIG, GENERATION, TEMPLATE, INDEX, *TOKENIZER_FILES}
    templates = folder.glob("additional_chat_templates/*.jinja")
    return sorted([*(path for path in folder.iterdir() if path.name in names), *templates])


def weight_paths(folder: Path) -> list[Path]:
    """Return the weight files that are read from a folder. Raises `UserError` for a damaged index."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return [folder / name for name in weight_files(folder / INDEX)]
    return sorted(folder.glob("pytorch_model*.bin"))


def weight_files(index: Path) -> list[str]:
    """Return the weight files that an index names. Raises `UserError` if it cannot be read."""
    what = file_fault(index) or _index_fault(index)
    if what is not None:
        raise UserError(f"{index} {what}. {AGAIN}")
    return sorted(set(_weight_map(index).values()))


def tensors(folder: Path) -> dict[str, str]:
    """Return which of the safetensors files that are read holds each tensor, by their headers."""
    paths = [path for path in weight_paths(folder) if path.suffix == ".safetensors"]
    return {name: path.name for path in paths for name in _tensors(path)}


def file_fault(path: Path) -> str | None:
    """Return what is wrong with a file, to follow its name in a sentence; None if nothing shows."""
    try:
        if not path.exists():
            return "is a link that leads nowhere" if path.is_symlink() else "is missing"
        if not path.is_file():
            return "is a folder, not a file"
        with path.open("rb") as file:
            head = file.read(512)
        if not head:
            return "is empty"
        if head.startswith(_POINTER):
            return "is a Git LFS pointer, not the file itself (`git lfs pull` fetches it)"
        if head.lstrip().lower().startswith(_PAGE):
            return "is a web page, not the file itself"
        if not any(head):
            return "holds zeros"
        return _content_fault(path)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _content_fault(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            _tensors(path)
        except SafetensorError as error:
            return f"is damaged or truncated ({error})"
    elif path.suffix in (".json", ".jinja", ".txt"):
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else {"text": text}
            if not isinstance(content, dict):
                return "holds no JSON object"
            if not content and path.name not in _MAY_BE_EMPTY:
                return "holds an empty JSON object"
        except (ValueError, RecursionError) as error:
            kind = "JSON" if path.suffix == ".json" else "text"
            return f"is damaged or truncated: it is no {kind} ({error})"
    return None


def _faults(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each file that is read and cannot be, and what is wrong with it."""
    present = {path.name for path in folder.iterdir()}
    names = [CONFIG, TOKENIZER_CONFIG]
    names += [name for name in (GENERATION, TEMPLATE, *TOKENIZER_FILES) if name in present - {*names}]
    if not present.intersection(VOCABULARIES):
        names.append(TOKENIZER)
    index = SINGLE not in present and (INDEX in present or any(folder.glob("model-*-of-*.safetensors")))
    if index:
        names.append(INDEX)
    elif SINGLE in present or not any(folder.glob("pytorch_model*.bin")):
        names.append(SINGLE)
    found = {name: what for name in names if (what := file_fault(folder / name)) is not None}
    yield from found.items()
    if index and INDEX not in found:
        what = _index_fault(folder / INDEX)
        yield from [(INDEX, what)] if what else _shard_faults(folder)


def _index_fault(index: Path) -> str | None:
    content = json.loads(index.read_text(encoding="utf-8"))
    weights = content.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        return "is damaged: it has no weight_map"
    if not all(isinstance(name, str) for name in weights.values()):
        return "is damaged: its weight_map does not give each tensor a file"
    if not isinstance(content.get("metadata"), dict):  # transformers insists
        return "is damaged: it has no metadata"
    return None


def _shard_faults(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the weight files that a sound index names."""
    held: dict[str, set[str]] = {}
    for tensor, name in _weight_map(folder / INDEX).items():
        held.setdefault(name, set()).add(tensor)
    for name in sorted(held):
        what = file_fault(folder / name)
        if what is None:
            lost = sorted(held[name] - _tensors(folder / name))
            what = f"lacks {lost[0]}" if lost else None
        if what is not None:
            yield name, f"{what} ({INDEX} asks for it)"


def _weight_map(index: Path) -> dict[str, str]:
    return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])


def _tensors(path: Path) -> set[str]:
    """Return the names of a safetensors file's tensors; its header must fit its size."""
    with safe_open(path, framework="pt") as file:
        return set(file.keys())
