"""What the documentation shows is what happens."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from kvmerge import Budget, resolve
from kvmerge.engine import Stop, run_sample
from kvmerge.session import Row
from tests import tiny

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|yaml)\n(.*?)```", re.DOTALL)


def test_the_example_of_add_a_method_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    blocks = dict(BLOCK.findall(text))
    shutil.copytree(resolve.config_dir(), tmp_path / "configs")
    (tmp_path / "configs" / "method" / "key_norm.yaml").write_text(blocks["yaml"], encoding="utf-8")
    (tmp_path / "key_norm.py").write_text(blocks["python"], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import baselines

    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    monkeypatch.setattr(resolve, "config_dir", lambda: tmp_path / "configs")
    try:
        method = resolve.load_method("key_norm", {"recent": 4})
        rows = [Row(method, Budget.parse(0.5))]
        results, _ = run_sample(tiny.shared_model(), tiny.prompt(40), rows, Stop(4, frozenset()))
        assert results[0].stats.entries == [[20, 20], [20, 20]]
        keys = tiny.normal(1, 2, 40, 16)
        kept = sys.modules["baselines.key_norm"].keep(keys, n_keep=20, recent=4)
    finally:
        sys.modules.pop("baselines.key_norm", None)
    assert kept[0, 0, -4:].tolist() == [36, 37, 38, 39]
    others = keys[0, 0, :36].norm(dim=-1).argsort()[:16].sort().values
    assert torch.equal(kept[0, 0, :16], others)


@pytest.mark.parametrize("page", ["README.md", "docs/add_a_method.md", "docs/decisions.md"])
def test_paths_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:kvmerge|baselines|benchmarks|harness|scripts|configs|docs)/[\w./-]*)`", text
    )
    made_up = {"baselines/key_norm.py", "configs/method/key_norm.yaml"}
    assert named
    assert [path for path in named if path not in made_up and not (ROOT / path).exists()] == []


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    assert sorted(phony) == sorted(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
