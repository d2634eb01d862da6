"""Time kvpress's prefills, in its own environment: nothing of this project can be imported there.

Reads the question as JSON from standard input and prints the answer as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import time
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Answer one question: seconds of each way in every counted round, one after the other."""
    kvpress: Any = importlib.import_module("kvpress")
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    question = json.load(sys.stdin)
    torch.set_num_threads(question["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(question["model"]).eval()
    ids = torch.tensor(question["ids"])
    ways = {
        question["plain"]: (None, "sdpa"),
        "ObservedAttentionPress, 35%": (
            kvpress.ObservedAttentionPress(compression_ratio=0.65),
            "eager",
        ),
        "SnapKVPress, 35%": (kvpress.SnapKVPress(compression_ratio=0.65), "sdpa"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for attempt in range(question["repeats"] + 1):  # the first warms up
        for name, (press, attention) in ways.items():
            model.set_attn_implementation(attention)
            cache = transformers.DynamicCache()
            gc.collect()
            started = time.perf_counter()
            with torch.inference_mode(), press(model) if press else contextlib.nullcontext():
                model(ids, past_key_values=cache, logits_to_keep=1)
            if attempt:
                seconds[name].append(time.perf_counter() - started)
            if press and cache.get_seq_length() >= ids.shape[1]:
                raise SystemExit(f"{name} left the cache whole")
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
