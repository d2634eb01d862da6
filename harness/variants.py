"""What a run of `kind=noise` leaves in its folder, for what writes it and the report that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, cast

from harness.typed import parse_object, shape_of
from kvmerge.errors import UserError

FILE = "noise.json"
FOLDER = "variants"
BASE = "base"
"""Name of the variant that changes nothing."""
UNPACKED = "unpacked"
"""Of the one whose linear layers are not packed for oneDNN (`model.pack_weights=false`)."""


class Listed(TypedDict):
    """One variant."""

    name: str
    """Of its folder below `FOLDER`, a run of its own."""
    setting: str
    """What it changes; empty for the base."""
    obstacle: str
    """Why it was not measured; empty where it was."""


class Variants(TypedDict):
    """What `FILE` holds."""

    model: str
    benchmark: str
    variants: list[Listed]


def is_noise(folder: Path) -> bool:
    """Return whether a folder is that of a run of `kind=noise`, finished or not."""
    return (folder / FOLDER).is_dir()


def read_variants(folder: Path) -> Variants:
    """Read which variants a folder holds. Raises `UserError` where it does not say."""
    path = folder / FILE
    try:
        content = parse_object(path.read_bytes())
        wrong = shape_of(Variants).misfits("", content)
        if wrong:
            raise ValueError("; ".join(wrong))
        if not any(each["name"] == BASE for each in content["variants"]):
            raise ValueError(f"no variant is called {BASE}")
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {FILE}, so it is not a finished run of experiment=noise. Give the "
            "output_dir of one, e.g. results/runs/noise/mini/smollm2-135m."
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(
            f"cannot read {path}: {error}. Run experiment=noise again to write it."
        ) from error
    return cast(Variants, content)


def check_noise(folder: Path, model: str, benchmark: str) -> None:
    """Refuse a noise run of another model or benchmark than that whose contrasts it is to stand beside.

    Raises:
        UserError: also where the folder is not that of a noise run.
    """
    content = read_variants(folder)
    for what, theirs, ours in (
        ("model", content["model"], model),
        ("benchmark", content["benchmark"], benchmark),
    ):
        if theirs != ours:
            raise UserError(
                f"noise={folder} was measured with {what} {theirs}, and this run has {ours}: the noise "
                f"of one says nothing of the other. Give a folder of the same {what}, or leave it out."
            )
