"""Beside a peer: kvpress, whose presses compress in a prefill of their own.

kvpress asks for an older transformers than the one here, so it runs in an environment of its own
(`make bench PEER=1` makes it) on the same weights and the same prompt. Each side is compared with the
plain prefill of its own environment.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvmerge.errors import UserError, first_line
from scripts.bench import kvpress_prefills
from scripts.bench.measure import Bench, Report, against

_PLAIN = "plain SDPA"


def peer(bench: Bench, python: str, length: int) -> Report:
    """Time prefills: plain and pressed in the peer's environment, plain and compressed in this one.

    Args:
        bench: the model and its prompts.
        python: the Python of an environment with kvpress and torch.
        length: tokens of the prompt.

    Raises:
        UserError: where that Python or its kvpress cannot be used.
    """
    ids = bench.prompt(length)
    theirs = _pressed(bench, python, ids)
    ways: dict[str, Callable[[], object]] = {
        _PLAIN: torch.inference_mode()(partial(bench.plain, ids, use_cache=True, logits_to_keep=1)),
        "H2O, 35%": lambda: bench.run([ids], bench.rows(["h2o@0.35"]), 1),
        "KVMerger, 35%": lambda: bench.run([ids], bench.rows(["kvmerger@0.35"]), 1),
        "seven cells": lambda: bench.run([ids], bench.rows(bench.cells), 1),
    }
    ours = bench.in_turn(ways)
    rows = [
        {"in": where} | line
        for where, seconds in (("kvpress", theirs["seconds"]), ("here", ours))
        for line in against(seconds, _PLAIN)
    ]
    versions = theirs["versions"]
    return Report(
        f"peer_{length}",
        f"Prefill of {length:,} tokens beside kvpress {versions['kvpress']}",
        "One prompt, compressed to 35% of the cache or for all seven cells. kvpress: an environment of "
        f"its own with transformers {versions['transformers']} and torch {versions['torch']}; its "
        "attention scores need eager attention. Ratios are to the plain prefill beside it.",
        rows,
        raw={"kvpress": theirs, "here": ours},
    )


def _pressed(bench: Bench, python: str, ids: Tensor) -> dict[str, Any]:
    """Return the seconds of each way in the peer's environment, and its versions."""
    with tempfile.TemporaryDirectory() as folder:
        bench.plain.save_pretrained(folder)
        question = {"model": folder, "ids": ids.tolist(), "repeats": bench.repeats}
        question |= {"threads": torch.get_num_threads(), "plain": _PLAIN}
        try:
            done = subprocess.run(
                # -P: the script's folder has modules that are named like some of Python's own.
                [python, "-P", str(Path(kvpress_prefills.__file__).resolve())],
                input=json.dumps(question),
                capture_output=True,
                text=True,
                check=True,
            )
        except OSError as error:
            raise UserError(f"--peer {python} cannot be started: {first_line(error)}.") from error
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[-1]
            raise UserError(
                f"kvpress cannot be used with {python}: {reason}. `make bench PEER=1` makes an "
                "environment for it; in your own, `pip install kvpress`."
            ) from error
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
