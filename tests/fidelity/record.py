"""Record what the authors' code gives on small inputs: the vectors that tests/fidelity compares with.

    python -m tests.fidelity.record --official DIR --peer PYTHON [family ...]

`DIR` holds a checkout of each repository that the families read, in a folder of the repository's name
(`git clone https://github.com/FMInference/H2O DIR/H2O`). A family is a module in
tests/fidelity/official that names its `REPOSITORY` and `REVISION` and has a function
`record(checkout)`, which runs the authors' code and returns tensors, numbers and lists by name.
They are written to tests/fidelity/<family>.json. None of the authors' code is part of this project.

Families of a published package (`PEER = True`) need no checkout: `PYTHON` is that of an environment
with the package (`make bench PEER=1` makes `.venv-peer/bin/python`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvmerge.errors import UserError, unknown
from tests.fidelity import official as vectors

OUTPUT = Path(__file__).parent
DIGITS = 8
"""Significant digits kept of each number: float32 has a little over seven."""


def families() -> list[str]:
    """Names of the modules in tests/fidelity/official; those with an underscore serve the others."""
    return [m.name for m in pkgutil.iter_modules(vectors.__path__) if not m.name.startswith("_")]


def checkout(folder: Path, repository: str, revision: str) -> Path:
    """The checkout of a repository. Raises `UserError` if it is missing or at another revision."""
    path = folder / repository.rpartition("/")[2]
    command = ["git", "-C", str(path), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not found.startswith(revision):
        raise UserError(
            f"{path} is at {found or 'no revision'}, not {revision}: "
            f"git clone https://github.com/{repository} {path} && git -C {path} checkout {revision}"
        )
    return path


def source_of(family: Any, official: Path | None, peer: Path | None) -> Path:
    """What a family's `record` is handed: a checkout, or the Python of an environment.

    Raises:
        UserError: if the command line does not name it.
    """
    given, option = (peer, "--peer PYTHON") if hasattr(family, "PEER") else (official, "--official DIR")
    if given is None:
        raise UserError(f"{family.REPOSITORY} at {family.REVISION} needs {option}.")
    return given if given is peer else checkout(given, family.REPOSITORY, family.REVISION)


def plain(value: Any) -> Any:
    """Tensors as nested lists, numbers rounded to the digits they have."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Record the families named on the command line, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--official", type=Path, help="folder of the checkouts")
    parser.add_argument("--peer", type=Path, help="python of an environment with kvpress")
    parser.add_argument("families", nargs="*", help=f"of {', '.join(families())}; default: all")
    options = parser.parse_args(arguments)
    for name in options.families or families():
        if name not in families():
            raise unknown("family", name, families())
        family = importlib.import_module(f"{vectors.__name__}.{name}")
        source = source_of(family, options.official, options.peer)
        with torch.inference_mode():
            found = plain(family.record(source))
        record = {"repository": family.REPOSITORY, "revision": family.REVISION, **found}
        # one line a name: a diff shows which vector has changed
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
        path = OUTPUT / f"{name}.json"
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
