"""Presses of kvpress on a tiny Llama with grouped queries: the scores of each layer, and what is kept.

They are run as they are published, in the environment that `make bench PEER=1` makes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kvmerge.errors import UserError
from tests.fidelity.official import _inputs

REPOSITORY, REVISION = "NVIDIA/kvpress", "0.5.5"
PEER = True
"""`record` takes the Python of an environment that has it, not a checkout."""
KV_HEADS, KEPT = 2, 22
WINDOW, KERNEL, CHUNK, SINKS, LAG, FUTURE = 8, 5, 6, 3, 8, 50
_RATIO = {"compression_ratio": 1 - KEPT / _inputs.PROMPT}
_SNAPKV = ("SnapKVPress", {"window_size": WINDOW, "kernel_size": KERNEL, **_RATIO})
PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "key_norm": ("KnormPress", _RATIO),
    "keydiff": ("KeyDiffPress", _RATIO),
    "lagkv": ("LagKVPress", {"n_sink": SINKS, "lag_size": LAG, **_RATIO}),
    "lagkv_short": ("LagKVPress", {"n_sink": SINKS, "lag_size": 30, **_RATIO}),
    "chunkkv": ("ChunkKVPress", {"press": _SNAPKV, "chunk_length": CHUNK}),
    "expected_attention": (
        "ExpectedAttentionPress",
        {"n_future_positions": FUTURE, "n_sink": SINKS, **_RATIO},
    ),
    "expected_attention_mean": (
        "ExpectedAttentionPress",
        {
            "n_future_positions": FUTURE,
            "n_sink": SINKS,
            "use_covariance": False,
            "use_vnorm": True,
            "epsilon": 0.01,
            **_RATIO,
        },
    ),
}
"""By name: the class and its settings."""


def record(python: Path) -> dict[str, Any]:
    """Run all presses on one prompt."""
    model = _inputs.tiny_llama(KV_HEADS)
    script = Path(__file__).with_name("_kvpress_presses.py")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ids = _inputs.tokens()[:, : _inputs.PROMPT].tolist()
        question = json.dumps({"model": folder, "ids": ids, "presses": PRESSES})
        done = subprocess.run(
            [str(python), "-P", str(script)],  # this folder has a module called kvpress
            input=question,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise UserError(f"{python} cannot run the presses: {done.stderr.strip()[-600:]}")
    answer = json.loads(done.stdout)
    if answer["versions"]["kvpress"] != REVISION:
        raise UserError(f"{python} has kvpress {answer['versions']['kvpress']}, not {REVISION}.")
    return {"source": "kvpress.presses", **answer}
