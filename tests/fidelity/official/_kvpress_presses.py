"""Runs presses of kvpress, in its own environment: nothing of this project can be imported there.

Reads the question as JSON from standard input, and prints the scores and the kept positions of each
layer as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from typing import Any


def main() -> None:
    """Answer one question: what each press keeps of the same prompt on the same model."""
    kvpress: Any = importlib.import_module("kvpress")
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    question = json.load(sys.stdin)
    model = transformers.AutoModelForCausalLM.from_pretrained(question["model"]).eval()
    ids = torch.tensor(question["ids"])

    def build(name: str, settings: dict[str, Any]) -> Any:
        inner = settings.pop("press", None)
        if inner is not None:
            settings["press"] = build(*inner)
        return getattr(kvpress, name)(**settings)

    def prefill(press: Any) -> Any:
        cache = transformers.DynamicCache()
        if press is None:
            model(ids, past_key_values=cache)
        else:
            with press(model):
                model(ids, past_key_values=cache)
        return cache

    answers = {}
    with torch.inference_mode():
        full = prefill(None)
        for label, (name, settings) in question["presses"].items():
            press = build(name, settings)
            scorer, seen = getattr(press, "press", press), []
            score = scorer.score

            def spy(*arguments: Any, score: Any = score, seen: list[Any] = seen) -> Any:
                seen.append(score(*arguments))
                return seen[-1]

            scorer.score = spy
            kept = prefill(press)
            positions = []
            for own, whole in zip(kept.layers, full.layers, strict=True):
                same = (own.keys[0].unsqueeze(2) == whole.keys[0].unsqueeze(1)).all(dim=-1)
                if not bool((same.sum(dim=-1) == 1).all()):
                    raise SystemExit(f"{label} keeps keys that the prompt does not have once")
                positions.append(same.int().argmax(dim=-1).sort(dim=-1).values.tolist())
            answers[label] = {
                "scores": [each[0].tolist() for each in seen],
                "positions": positions,
            }
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    print(json.dumps({"presses": answers, "versions": versions}))


if __name__ == "__main__":
    main()
